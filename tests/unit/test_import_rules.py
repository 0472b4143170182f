"""What the design forbids in the source: wrong imports, printing, unsafe loading, the network."""

import ast
import sys
from pathlib import Path

import pytest
from sefi_ide.tools.comfyui import REPOSITORY, comfyui_path

PACK_FILES = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("__init__.py", "nodes/**/*.py", "sefi_core/**/*.py")
    for path in REPOSITORY.glob(pattern)
)
# Everything that `import` finds in ComfyUI's own directory.
COMFYUI_MODULES = {
    path.stem for path in comfyui_path().iterdir() if path.is_dir() or path.suffix == ".py"
}
OPTIONAL = {"insightface", "onnxruntime", "diffusers", "skimage", "accelerate", "tensorboard"}
FORBIDDEN = {"pickle", "requests", "urllib", "http", "socket", "aiohttp", "huggingface_hub"}

ROOMS = (
    {"adapter_training"},
    {"encoder_training", "face_adapters"},
    {"face_embedding"},
    {"learning", "likeness", "prompt_score"},
    {"face_encoders", "embedding_files"},
    {"apply", "attention_maps", "faces", "library", "mixed_attention"},
    {"methods"},
    {"clip"},
    {"unet"},
    {"base_model", "notices"},
)
"""Of the bridge, ``sefi_core/comfyui``: each imports of itself and of later rows only."""


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(level of relative import, module) of every import statement; level 0 is absolute."""
    found = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            found += [(0, alias.name) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            names = [statement.module] if statement.module else [a.name for a in statement.names]
            found += [(statement.level, name) for name in names]
    return found


def absolute(tree: ast.AST) -> set[str]:
    return {module.split(".")[0] for level, module in imports(tree) if level == 0}


def reached_from(path: Path, tree: ast.AST) -> set[tuple[str, ...]]:
    """The modules of the pack that a file imports, each as its path in the repository."""
    package = path.parts[:-1]
    return {
        (*package[: len(package) - level + 1], *module.split("."))
        for level, module in imports(tree)
        if level > 0
    }


def row_of(room: str) -> int:
    """Where a room of the bridge stands in :data:`ROOMS`."""
    (row,) = (row for row, rooms in enumerate(ROOMS) if room in rooms)
    return row


@pytest.fixture(params=PACK_FILES, ids=str)
def source(request):
    return request.param, ast.parse((REPOSITORY / request.param).read_text(encoding="utf-8"))


def test_only_the_bridge_and_the_nodes_know_comfyui(source):
    path, tree = source
    if path.parts[0] == "sefi_core" and path.parts[1] != "comfyui":
        assert not absolute(tree) & COMFYUI_MODULES


def test_imports_run_from_nodes_to_bridge_to_core(source):
    path, tree = source
    reached = reached_from(path, tree)
    assert {module[0] for module in reached} <= {"nodes", "sefi_core"}
    if path.parts[0] == "sefi_core":
        assert not [module for module in reached if module[0] != "sefi_core"]
        if path.parts[1] != "comfyui":
            assert not [module for module in reached if module[:2] == ("sefi_core", "comfyui")]


def test_imports_within_the_bridge_run_one_way(source):
    """No room knows what is built on it: text and U-Net know no method, a method no training."""
    path, tree = source
    if path.parts[:2] != ("sefi_core", "comfyui") or path.name == "__init__.py" == path.parts[2]:
        return
    own = path.parts[2].removesuffix(".py")
    others = {m[2] for m in reached_from(path, tree) if m[:2] == ("sefi_core", "comfyui")} - {own}
    assert not [room for room in others if row_of(room) <= row_of(own)]


def test_the_pack_is_imported_relatively(source):
    _, tree = source
    assert not absolute(tree) & {"nodes", "sefi_core", "sefi_ide"}


def test_optional_packages_are_imported_only_where_they_are_used(source):
    _, tree = source
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not absolute(ast.Module(at_import, [])) & OPTIONAL


def test_no_print_no_pickle_no_network(source):
    """Foreign pickles are read as tensors only; only one module has routes for ComfyUI's server."""
    path, tree = source
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {ast.unparse(call.func) for call in calls} & {"print", "eval", "exec", "torch.save"}
    for call in calls:
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in map(ast.unparse, call.keywords)
    served = {"aiohttp"} if path.name == "routes.py" else set()
    assert not absolute(tree) & FORBIDDEN - served


def test_the_rules_look_at_the_right_files():
    names = {str(path) for path in PACK_FILES}
    assert {"__init__.py", "nodes/__init__.py", "sefi_core/identity/identity.py"} <= names
    assert {"comfy", "folder_paths", "nodes", "comfy_api", "server"} <= COMFYUI_MODULES
    assert not COMFYUI_MODULES & set(sys.stdlib_module_names)
