"""Identity files in ComfyUI's Model Library, and what nodes say of them and of prompts."""

import asyncio
import base64
import html
import io
import json
import struct
import urllib.error
import urllib.parse

import aiohttp
import pytest
import torch
from PIL import Image
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.thumbnail import thumbnail_of
from sefi_ide.tools.comfyui import REPOSITORY

FACE = torch.linspace(0, 1, 200).repeat(300, 1)[..., None] * torch.tensor([1.0, 0.6, 0.2])
TEXT = 3
"""The type of a message that holds a progress text."""


@pytest.fixture(scope="module")
def library(server):
    """The server's folder of identities, with ``people/anna`` in it."""
    folder = server.directory / "models" / "sefi"
    (folder / "people").mkdir(parents=True, exist_ok=True)
    vectors = {"l": torch.randn(1, 1, 128)}
    settings = {"photos": 1, "steps_done": 60}
    anna = Identity("anna", "person", "sd1", vectors, vectors, settings, thumbnail_of(FACE))
    (folder / "people" / "anna.safetensors").write_bytes(to_bytes(anna))
    (folder / "people" / "<b>.safetensors").write_bytes(b"")  # in a list, hostile or broken
    old = REPOSITORY / "tests" / "data" / "identity_v1.safetensors"
    (folder / "old.safetensors").write_bytes(old.read_bytes())
    return folder


def metadata_of(server, file):
    return server.get("/view_metadata/sefi?" + urllib.parse.urlencode({"filename": file}))


def preview_of(server, file) -> Image.Image:
    path = urllib.parse.quote(file.replace(".safetensors", ".webp"))
    content = server.get_bytes(f"/experiment/models/preview/sefi/0/{path}")
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_the_library_shows_face_and_placeholder(server, library):
    shown = metadata_of(server, "people/anna.safetensors")
    assert shown["modelspec.title"] == "anna"
    assert shown["modelspec.trigger_phrase"] == "<anna>"
    assert shown["modelspec.description"] == (
        "Stands for person; learned on SD 1.x from 1 photo in 60 steps."
    )
    assert (shown["family"], shown["class_word"]) == ("sd1", "person")
    head, _, encoded = shown["modelspec.thumbnail"].partition(",")
    assert head == "data:image/jpeg;base64"
    face = Image.open(io.BytesIO(base64.b64decode(encoded)))
    preview = preview_of(server, "people/anna.safetensors")
    assert face.size == preview.size == (171, 256)
    for picture in (face, preview):
        pixels = torch.tensor([picture.getpixel((x, 128)) for x in (0, 85, 170)])
        expected = torch.tensor([[0, 0, 0], [128, 77, 26], [255, 153, 51]])
        assert (pixels - expected).abs().max() < 16


def test_the_folder_and_its_files_are_listed(server, library):
    folders = {folder["name"]: folder for folder in server.get("/experiment/models")}
    assert str(library) in folders["sefi"]["folders"]
    names = {file["name"] for file in server.get("/experiment/models/sefi")}
    assert {"people/anna.safetensors", "old.safetensors"} <= names
    options = server.get("/object_info/SeFiLoadIdentity")["SeFiLoadIdentity"]["input"]["required"]
    assert "people/anna.safetensors" in options["file"][1]["options"]


def test_files_of_earlier_versions_have_names_and_no_face(server, library):
    shown = metadata_of(server, "old.safetensors")
    assert (shown["name"], shown["family"]) == ("Zoë-2", "sdxl")
    assert not any(name.startswith("modelspec.") for name in shown)
    with pytest.raises(urllib.error.HTTPError):
        preview_of(server, "old.safetensors")


def test_a_saved_file_is_told_on_the_node_and_is_in_the_lists_at_once(server, library):
    save = {"identity": ["1", 0], "file_name": "people/anna_3", "if_exists": "overwrite"}
    prompt = {
        "1": {"class_type": "SeFiLoadIdentity", "inputs": {"file": "people/anna.safetensors"}},
        "2": {"class_type": "SeFiSaveIdentity", "inputs": save},
    }
    told, outputs = asyncio.run(run_watched(server, prompt))
    (text,) = outputs["2"]["text"]
    assert text == (
        "Saved as people/anna_3.safetensors. Write <anna> in prompts; to write <anna_3>, set name "
        "in SeFi Load Identity to anna_3."
    )
    assert told == [("2", text)]
    options = server.get("/object_info/SeFiLoadIdentity")["SeFiLoadIdentity"]["input"]["required"]
    assert "people/anna_3.safetensors" in options["file"][1]["options"]


def drawing(text):
    encode = {"clip": ["3", 1], "text": text}
    sampler = {"model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0], "seed": 0}
    sampler |= {"latent_image": ["6", 0], "steps": 1, "cfg": 5.0, "denoise": 1.0}
    sampler |= {"sampler_name": "euler", "scheduler": "normal"}
    apply = {"model": ["1", 0], "clip": ["1", 1], "identity": ["2", 0]}
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "mini_sd.safetensors"}),
        "2": ("SeFiLoadIdentity", {"file": "people/anna.safetensors"}),
        "3": ("SeFiApplyIdentity", {**apply, "strength_k": 1.0, "strength_v": 1.0}),
        "4": ("CLIPTextEncode", encode),
        "5": ("CLIPTextEncode", {"clip": ["1", 1], "text": "<nobody> here"}),
        "6": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "7": ("KSampler", sampler),
        "8": ("SaveLatent", {"samples": ["7", 0], "filename_prefix": "notices"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def test_an_unknown_placeholder_is_told_on_the_text_node_until_it_is_mended(server, library):
    for text, told in (
        ("a photo of <Anna>", ["<Anna> is no identity here", "did you mean <anna>?"]),
        ("a photo of <bob> <lora:x:1>", ["<bob> is no identity", "Known: <anna>."]),
        ("a photo of <anna>", [" "]),
        ("a photo of (<anna>:1.2)", []),
    ):
        shown, _ = asyncio.run(run_watched(server, drawing(text)))
        assert [node for node, _ in shown] == ["4"] * bool(told), (text, shown)
        assert all(part in shown[0][1] for part in told), (text, shown)


async def run_watched(server, prompt):
    """Run a prompt as a browser does; gives the texts on nodes, unescaped, and the outputs."""
    told, outputs = [], {}
    address = f"{server.url.replace('http', 'ws')}/ws?clientId=watcher"
    async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
        queued = {"prompt": prompt, "client_id": "watcher"}
        queued["extra_data"] = {"extra_pnginfo": {"workflow": {"id": "notices"}}}
        server.post("/prompt", queued)
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                kind, length = struct.unpack(">II", message.data[:8])
                if kind == TEXT:
                    node, text = message.data[8 : 8 + length], message.data[8 + length :].decode()
                    assert not set("<>\"'") & set(text)
                    told.append((node.decode(), html.unescape(text)))
                continue
            event = json.loads(message.data)
            if event["type"] == "executed":
                outputs[event["data"]["node"]] = event["data"]["output"]
            assert event["type"] != "execution_error", event
            if event["type"] == "execution_success":
                break
    return told, outputs
