"""ComfyUI in this process, on the CPU, with directories of its own."""

import logging

import pytest
from sefi_ide.tools.comfyui import start

start(cpu=True, prefix="sefi-tests-")

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from sefi_ide.tests.comfy import composition, random_checkpoint  # noqa: E402
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime  # noqa: E402


@pytest.fixture(scope="session")
def family(request) -> str:
    """The family of the random miniature; :data:`random_checkpoint.of_all_families` chooses it."""
    return getattr(request, "param", "sd1")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder for random miniatures, each made once."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def mini_checkpoint(checkpoints, family) -> str:
    """Path of a miniature checkpoint of the family with random fp32 weights."""
    random_checkpoint.register()
    path = checkpoints / f"{family}.safetensors"
    if not path.exists():
        random_checkpoint.save(path, torch.float32, family=random_checkpoint.FAMILIES[family])
    return str(path)


@pytest.fixture(scope="session")
def mini():
    """The shipped miniature Stable Diffusion; nothing changes it."""
    return MiniSDRuntime()


@pytest.fixture(scope="module")
def inference_mode():
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def setting(mini_checkpoint, inference_mode):
    """The two worlds and the oracle of the tests of composition."""
    return composition.setting(mini_checkpoint)


@pytest.fixture
def mini_sd(mini_checkpoint):
    """Fresh ``(model, clip, vae)`` of the random miniature, as a loader node gives them."""
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            mini_checkpoint, embedding_directory=None
        )
    return model, clip, vae


@pytest.fixture
def fresh_compiler(caplog):
    """Nothing is compiled before, and what the test compiles is forgotten."""
    caplog.set_level(logging.WARNING, logger="torch.__trace")  # it traces itself all the time
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An identity folder of ComfyUI that does not exist yet."""
    folder = tmp_path / "models" / "sefi"
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "sefi", ([str(folder)], {".safetensors"})
    )
    return folder


@pytest.fixture
def encoder_folder(tmp_path, monkeypatch):
    """ComfyUI's folder of face encoders, empty, as is that of face adapters beside it."""
    folder = tmp_path / "models" / "face2diffusion"
    folder.mkdir(parents=True)
    beside = tmp_path / "models" / "face_adapters"
    adapters = ([str(beside)], {".safetensors", ".bin"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "face_adapters", adapters)
    entry = ([str(folder)], {".safetensors", ".pt"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "face2diffusion", entry)
    return folder
