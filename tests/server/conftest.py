"""A running ComfyUI server with the pack, and the shipped workflows as prompts for it."""

import pytest
import skimage.data
from PIL import Image
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.demo import choose_face_files
from sefi_ide.tools.server import ComfyServer
from sefi_ide.tools.templates import template
from sefi_ide.tools.workflow import nodes_of, to_prompt

MINI_SD = REPOSITORY / "tests" / "mini_sd" / "mini_sd.safetensors"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One real server on the CPU for the whole session, with the miniature checkpoint."""
    with ComfyServer(tmp_path_factory.mktemp("comfyui"), [MINI_SD]) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    """Every node that the server has, as the frontend sees it."""
    return server.get("/object_info")


@pytest.fixture(scope="session")
def shipped_prompt(object_info):
    """``shipped_prompt(name, picture)``: a shipped workflow as a prompt for the miniature.

    Only the names of files are exchanged: checkpoint, picture, identity, face encoder and adapter.
    """

    def make(name: str, picture: str) -> dict:
        prompt = to_prompt(template(name), object_info)
        for node in nodes_of(prompt, "CheckpointLoaderSimple"):
            node["inputs"]["ckpt_name"] = MINI_SD.name
        for node in nodes_of(prompt, "LoadImage"):
            node["inputs"]["image"] = picture
        people = ("anna.safetensors", "ben.safetensors")
        for node, file in zip(nodes_of(prompt, "SeFiLoadIdentity"), people, strict=False):
            node["inputs"]["file"] = file
        choose_face_files(prompt)
        return prompt

    return make


@pytest.fixture(scope="session")
def picture(server, tmp_path_factory):
    """A real photo, uploaded."""
    file = tmp_path_factory.mktemp("pictures") / "astronaut.png"
    Image.fromarray(skimage.data.astronaut()).save(file)
    return server.upload(file)
