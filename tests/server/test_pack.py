"""The pack as the server and its frontend see it."""

import json
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.server import PACK, ComfyServer

NODE_IDS = [
    "SeFiFaceMask",
    "SeFiTrainIdentity",
    "SeFiTrainIdentities",
    "SeFiLoadFaceEncoder",
    "SeFiPredictIdentity",
    "SeFiLoadFaceAdapter",
    "SeFiApplyFaceAdapter",
    "SeFiSaveIdentity",
    "SeFiLoadIdentity",
    "SeFiMixIdentities",
    "SeFiApplyIdentity",
    "SeFiMixedAttention",
    "SeFiAttentionMap",
    "SeFiLikeness",
    "SeFiPromptScore",
    "SeFiExportEmbedding",
    "SeFiLoadEmbedding",
]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))

# Runs in the server's process before ComfyUI does.
WITHOUT_OPTIONAL_PACKAGES = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Blinkered(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("insightface", "onnxruntime", "diffusers", "skimage"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blinkered
Path(__file__).with_name("blinkered").touch()
"""


def all_inputs(info):
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def test_the_server_has_these_nodes_and_no_other_of_the_pack(object_info):
    assert {name for name in object_info if name.startswith("SeFi")} == set(NODE_IDS)


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_node_describes_itself_and_every_input(object_info, node_id):
    info = object_info[node_id]
    assert info["category"] == "SeFi-IDE"
    assert info["display_name"].startswith("SeFi ")
    assert info["description"]
    without_tooltip = [
        name for name, spec in all_inputs(info).items() if not (spec[1:] and spec[1].get("tooltip"))
    ]
    assert not without_tooltip


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_page_is_served_and_speaks_of_every_input(server, object_info, node_id):
    page = server.get_bytes(f"/extensions/{PACK}/docs/{node_id}/en.md").decode()
    assert page.startswith(f"# {object_info[node_id]['display_name']}\n")
    missing = [name for name in all_inputs(object_info[node_id]) if f"`{name}`" not in page]
    assert not missing


def test_training_is_not_repeated_by_a_seed_that_changes_itself(object_info):
    seed = all_inputs(object_info["SeFiTrainIdentity"])["seed"][1]
    assert seed["control_after_generate"] is False


def test_templates_are_listed_and_served_with_thumbnails(server):
    assert WORKFLOWS
    listed = server.get("/workflow_templates")[PACK]
    assert sorted(listed) == [file.stem for file in WORKFLOWS]
    for file in WORKFLOWS:
        url = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(file.stem)}"
        assert server.get(url + ".json") == json.loads(file.read_text(encoding="utf-8"))
        assert server.get_bytes(url + ".jpg")[:2] == b"\xff\xd8"
        assert Image.open(file.with_suffix(".jpg")).width >= 200


def test_model_folder_lists_safetensors_files_only(server):
    folder = server.directory / "models" / "sefi"
    folder.mkdir(exist_ok=True)
    files = [folder / "stray.txt", folder / "zoe.safetensors"]
    for file in files:
        file.write_bytes(b"")
    try:
        assert "zoe.safetensors" in server.get("/models/sefi")
        assert "stray.txt" not in server.get("/models/sefi")
    finally:
        for file in files:
            file.unlink()


def test_the_pack_loads_without_its_optional_packages(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_OPTIONAL_PACKAGES)
    environment = {"PYTHONPATH": str(tmp_path)}
    with ComfyServer(tmp_path / "comfyui", [], environment=environment) as server:
        for node_id in NODE_IDS:
            assert node_id in server.get(f"/object_info/{node_id}")
        log = server.log.read_text()
    assert (tmp_path / "blinkered").exists()
    assert "could not be loaded" not in log
    assert "IMPORT FAILED" not in log


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps one of before
    assert server.get("/system_stats")


def test_the_servers_own_folder_comes_before_the_users(tmp_path):
    """Or the demo would save into the user's models folder, and not find what it has saved."""
    users = tmp_path / "users.yaml"
    users.write_text(f"user:\n  sefi: {tmp_path / 'identities'}\n")
    arguments = ("--cpu", "--extra-model-paths-config", str(users))
    with ComfyServer(tmp_path / "comfyui", [], arguments) as server:
        folders = server.get("/internal/folder_paths")["sefi"]
    own = tmp_path / "comfyui" / "models" / "sefi"
    assert folders == [str(own), str(tmp_path / "identities")]


def test_errors_of_the_test_client_are_real(server):
    with pytest.raises(urllib.error.HTTPError):
        server.get_bytes(f"/extensions/{PACK}/docs/NoSuchNode/en.md")
