"""Identities in the server's library and small graphs in the frontend, for tests in the browser."""

import json
from pathlib import Path

import skimage.data
import torch
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.thumbnail import thumbnail_of

WIDTHS = {"sd1": {"l": 128}, "sdxl": {"l": 768, "g": 1280}}
"""Of the miniature of SD 1.x, and of the real SDXL."""

OPEN_PROMPT = "(prompt) => app.loadApiJson(prompt, 'small')"
OPENED = """() => window.app?.vueAppReady && app.graph?.nodes.length
    && !document.querySelector("#splash-loader")"""
QUEUED = "async () => (await app.graphToPrompt()).output"
PLACE = """([type, name]) => {
    const node = app.graph.nodes.find((node) => node.type === type)
    const { last_y } = node.widgets.find((widget) => widget.name === name)
    return app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + last_y + 10])
}"""
"""Where on the screen a classic node draws a widget."""


def put_identity(server, file, name, family="sd1", class_word="person", steps=60) -> Path:
    """Save an identity of any content and the astronaut's face into the server's models/sefi."""
    photo = torch.from_numpy(skimage.data.astronaut()[:220, 130:350].copy()).float() / 255
    tensors = {encoder: torch.randn(5, 1, width) for encoder, width in WIDTHS[family].items()}
    training = {"steps": steps}
    made = Identity(name, class_word, family, tensors, tensors, training, thumbnail_of(photo))
    return put_file(server, f"sefi/{file}", to_bytes(made))


def put_file(server, file, content: bytes) -> Path:
    """Write a file below the server's models folder."""
    path = server.directory / "models" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def header_only(metadata: dict[str, str]) -> bytes:
    """A safetensors file that has no tensors, only metadata."""
    text = json.dumps({"__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text


def node(class_type, **inputs) -> dict:
    """A node of a prompt; a list [id, output] is a link."""
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def load_and_draw(file="anna.safetensors", text="a photo of ", checkpoint="mini_sd.safetensors"):
    """A prompt that loads an identity, applies it and draws with the miniature."""
    sampler = {"steps": 1, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
    sampler |= {"denoise": 1.0, "seed": 0, "model": ["3", 0], "latent_image": ["6", 0]}
    applied = {"model": ["1", 0], "clip": ["1", 1], "identity": ["2", 0]}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("SeFiLoadIdentity", file=file, name=""),
        "3": node("SeFiApplyIdentity", **applied, strength_k=1.0, strength_v=1.0),
        "4": node("CLIPTextEncode", clip=["3", 1], text=text),
        "5": node("CLIPTextEncode", clip=["1", 1], text="drawing"),
        "6": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "7": node("KSampler", positive=["4", 0], negative=["5", 0], **sampler),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("PreviewImage", images=["8", 0]),
    }


def open_prompt(page, prompt):
    """Open a prompt as a workflow, once the frontend has opened its own first one."""
    page.wait_for_function(OPENED)
    page.evaluate(OPEN_PROMPT, prompt)


def prompt_field(page, text):
    """The visible text field that holds ``text``."""
    fields = page.locator("textarea:visible")
    fields.first.wait_for()
    (field,) = [field for field in fields.all() if field.input_value() == text]
    return field
