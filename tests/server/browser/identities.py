"""Identities in the server's library and small graphs in the frontend, for tests in the browser."""

import json
from pathlib import Path

import skimage.data
import torch
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.thumbnail import thumbnail_of

SIZES = {"sd1": {"l": 768}, "sdxl": {"l": 768, "g": 1280}}
OPEN_PROMPT = "(prompt) => app.loadApiJson(prompt, 'small')"


def face() -> bytes:
    """The astronaut's face, as a thumbnail."""
    photo = torch.from_numpy(skimage.data.astronaut()[:220, 130:350].copy())
    return thumbnail_of(photo.float() / 255)


def put_identity(server, file, name, family="sd1", class_word="person", steps=60) -> Path:
    """Save an identity of random content into the server's models/sefi."""
    tensors = {encoder: torch.randn(5, 1, width) for encoder, width in SIZES[family].items()}
    made = Identity(name, class_word, family, tensors, tensors, {"steps": steps}, face())
    return put_file(server, file, to_bytes(made))


def put_file(server, file, content: bytes, folder="sefi") -> Path:
    path = server.directory / "models" / folder / file
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
    """A prompt that loads an identity, applies it and draws the miniature's picture."""
    sampler = {"steps": 1, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
    sampler |= {"denoise": 1.0, "seed": 0}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("SeFiLoadIdentity", file=file, name=""),
        "3": node(
            "SeFiApplyIdentity",
            model=["1", 0],
            clip=["1", 1],
            identity=["2", 0],
            strength_k=1.0,
            strength_v=1.0,
        ),
        "4": node("CLIPTextEncode", clip=["3", 1], text=text),
        "5": node("CLIPTextEncode", clip=["1", 1], text="drawing"),
        "6": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "7": node(
            "KSampler",
            model=["3", 0],
            positive=["4", 0],
            negative=["5", 0],
            latent_image=["6", 0],
            **sampler,
        ),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("PreviewImage", images=["8", 0]),
    }
