"""What an identity file shows of itself where nobody knows the pack.

ComfyUI's Model Library and other programs read the ``modelspec.`` keys of a safetensors file's
metadata (https://github.com/Stability-AI/ModelSpec), and ComfyUI's preview route
``ssmd_cover_images``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

from ..families import label_of
from .identity import Identity
from .thumbnail import media_type

FREE_TEXTS = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.description",
    "modelspec.usage_hint",
)
"""Texts that only people read; they may be worded otherwise by another version of the pack."""

THUMBNAIL = "modelspec.thumbnail"

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}

_MOST = 10**9
"""Photos or steps that are worth telling; the training settings of a file may say anything."""


def shown_metadata(identity: Identity) -> dict[str, str]:
    """The metadata for others: :data:`FREE_TEXTS`, the placeholder and, if there is one, the face.

    The thumbnail is there twice, as a data URL and as a list of base64 texts in JSON.
    """
    shown = {
        "modelspec.title": identity.name,
        "modelspec.architecture": (
            f"{ARCHITECTURES.get(identity.family, identity.family)}/sefi-identity"
        ),
        "modelspec.description": _description(identity),
        "modelspec.trigger_phrase": identity.placeholder,
        "modelspec.usage_hint": (
            f"Load it with SeFi Load Identity, connect SeFi Apply Identity, and write "
            f"{identity.placeholder} in prompts where you would write {identity.class_word}."
        ),
    }
    if identity.thumbnail is not None:
        encoded = base64.b64encode(identity.thumbnail).decode()
        shown[THUMBNAIL] = f"data:{media_type(identity.thumbnail)};base64,{encoded}"
        shown["ssmd_cover_images"] = json.dumps([encoded])
    return shown


def shown_thumbnail(metadata: Mapping[str, str]) -> bytes | None:
    """The thumbnail in the metadata; ValueError if what should be one is no data URL."""
    if THUMBNAIL not in metadata:
        return None
    return base64.b64decode(metadata[THUMBNAIL].partition(";base64,")[2], validate=True)


def _description(identity: Identity) -> str:
    made = "predicted for" if identity.predicted else "learned on"
    parts = [f"Stands for {identity.class_word}; {made} {label_of(identity.family)}"]
    if photos := _count(identity.training.get("photos")):
        parts.append(f"from {photos} photo{'' if photos == 1 else 's'}")
    if steps := _count(identity.training.get("steps_done")):
        parts.append(f"in {steps} step{'' if steps == 1 else 's'}")
    return " ".join(parts) + "."


def _count(value: object) -> int:
    """``value`` if it counts something, else 0."""
    return value if type(value) is int and 0 < value < _MOST else 0
