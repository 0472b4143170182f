"""Identities and files of them for tests, sound ones and such as somebody tampered with."""

import base64
import io
import json
import re

import safetensors.torch
import torch
from PIL import Image
from sefi_ide.sefi_core.identity import file as identity_file
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.thumbnail import thumbnail_of

PICTURE = torch.rand(64, 48, 3, generator=torch.Generator().manual_seed(0))


def make_identity(widths=None, stages=5, vectors=1, seed=0, **changes) -> Identity:
    generator = torch.Generator().manual_seed(seed)

    def embeddings():
        return {
            encoder: torch.randn(stages, vectors, width, generator=generator)
            for encoder, width in (widths or {"l": 768}).items()
        }

    fields = {
        "name": "anna",
        "class_word": "person",
        "family": "sd1",
        "key_vectors": embeddings(),
        "value_vectors": embeddings(),
        "training": {"steps": 200, "learning_rate": 5e-3, "templates": ["a photo of <name>"]},
        "thumbnail": thumbnail_of(PICTURE),
    }
    return Identity(**fields | changes)


def png_of(picture: torch.Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray((picture * 255).to(torch.uint8).numpy()).save(content, "PNG")
    return content.getvalue()


def parts_of(identity: Identity):
    """Tensors and metadata of its file, to be tampered with."""
    content = to_bytes(identity)
    metadata = dict(identity_file._split(content)[0]["__metadata__"])
    del metadata["checksum"]
    return safetensors.torch.load(content), metadata


def old_parts_of(identity: Identity):
    """The same of a file of format version 1."""
    tensors, metadata = parts_of(identity)
    png = bytearray(png_of(PICTURE))
    tensors["thumbnail"] = torch.frombuffer(png, dtype=torch.uint8)
    metadata = {
        name: text
        for name, text in metadata.items()
        if not name.startswith(("modelspec.", "ssmd_"))
    }
    return tensors, metadata | {"format_version": "1"}


def with_face(content: bytes) -> dict[str, str]:
    """Metadata that shows a picture."""
    encoded = base64.b64encode(content).decode()
    kind = "png" if content.startswith(b"\x89PNG\r\n\x1a\n") else "jpeg"
    return {
        "modelspec.thumbnail": f"data:image/{kind};base64,{encoded}",
        "ssmd_cover_images": json.dumps([encoded]),
    }


def sealed(tensors, metadata):
    """With a checksum that is right, so that only the other checks can object."""
    checksum = identity_file._checksum(metadata, tensors)
    return safetensors.torch.save(tensors, metadata | {"checksum": checksum})


def assert_one_clear_sentence(error, path):
    message = str(error)
    assert str(path) in message
    assert "\n" not in message and ". " not in message.replace(str(path), "")
    assert ":" in message  # what is wrong: what to do
    assert re.search(r"\b(copy|train|choose|update|load|save)\b", message)
