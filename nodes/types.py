"""What the nodes of the pack share: their menu, the type of an identity, and what may arrive.

Switch nodes and loaders of other packs can put anything into any input, whatever its colour says.
Each node checks what arrived where it begins, and everything behind it counts on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import comfy.sd
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..sefi_core.comfyui.face_adapters import OpenedAdapter
from ..sefi_core.comfyui.face_encoders import OpenedEncoder
from ..sefi_core.errors import SeFiError
from ..sefi_core.identity.identity import Identity
from ..sefi_core.images import is_image

SEFI_IDENTITY = io.Custom("SEFI_IDENTITY")
"""Carries a :class:`sefi_core.identity.Identity` from node to node, as it is."""

SEFI_FACE_ENCODER = io.Custom("SEFI_FACE_ENCODER")
"""Carries a :class:`sefi_core.comfyui.face_encoders.OpenedEncoder`."""

SEFI_FACE_ADAPTER = io.Custom("SEFI_FACE_ADAPTER")
"""Carries a :class:`sefi_core.comfyui.face_adapters.OpenedAdapter`."""

CATEGORY = "SeFi-IDE"

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate, which JSON can bring alone; it has no UTF-8, and tokenizers fail on it."""


class Socket(NamedTuple):
    """A kind of input: what ``fits`` it, and what to connect where something else has come."""

    fits: Callable[[Any], bool]
    remedy: str


def _is_vae(value: Any) -> bool:
    # Packs bring VAEs of classes of their own; a CLIP has these two as well.
    return (
        hasattr(value, "encode")
        and hasattr(value, "decode")
        and not isinstance(value, comfy.sd.CLIP)
    )


def _is_latent(value: Any) -> bool:
    return isinstance(value, Mapping) and torch.is_tensor(value.get("samples"))


def _is_mask(value: Any) -> bool:
    return torch.is_tensor(value) and 2 <= value.ndim <= 4 and 0 not in value.shape[-2:]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _HALF_CHARACTER.search(value)


MODEL = Socket(
    lambda value: isinstance(value, ModelPatcher),
    "connect a MODEL, such as that of Load Checkpoint",
)
CLIP = Socket(
    lambda value: isinstance(value, comfy.sd.CLIP),
    "connect the CLIP of the same checkpoint, or that of another loader if the checkpoint has no "
    "text encoder",
)
CLIP_VISION = Socket(
    lambda value: isinstance(value, ClipVisionModel),
    "connect the CLIP_VISION of Load CLIP Vision",
)
VAE = Socket(_is_vae, "connect the VAE of the same checkpoint, or that of Load VAE")
LATENT = Socket(_is_latent, "connect the LATENT of one picture, such as that of KSampler")
IMAGE = Socket(is_image, "connect an IMAGE (batch, height, width, channels), as Load Image gives")
MASK = Socket(_is_mask, "connect a MASK (batch, height, width), such as that of SeFi Face Mask")
IDENTITY = Socket(
    lambda value: isinstance(value, Identity),
    "connect the identity of SeFi Load Identity or SeFi Train Identity",
)
FACE_ENCODER = Socket(
    lambda value: isinstance(value, OpenedEncoder),
    "connect the face encoder of SeFi Load Face Encoder",
)
FACE_ADAPTER = Socket(
    lambda value: isinstance(value, OpenedAdapter),
    "connect the face adapter of SeFi Load Face Adapter",
)
TEXT = Socket(_is_text, "write a text, or connect a node that gives one")


def check_input(name: str, value: Any, socket: Socket) -> Any:
    """``value`` if it is what the input ``name`` takes.

    Raises :class:`SeFiError` otherwise, one sentence with what has come and what to connect.
    """
    if socket.fits(value):
        return value
    if value is None:
        raise SeFiError(f"the {name} input is empty: {socket.remedy}")
    raise SeFiError(f"{name} is {_described(value)}: {socket.remedy}")


def check_inputs(name: str, values: list[Any] | None, socket: Socket) -> list[Any]:
    """The same of every value of an input that takes a list, which must not be empty."""
    return [check_input(name, value, socket) for value in values or [None]]


def check_identity(identity: object, name: str = "identity") -> Identity:
    """``identity`` if it is one; raises :class:`SeFiError` with the input's ``name`` otherwise."""
    return check_input(name, identity, IDENTITY)


def _described(value: object) -> str:
    if torch.is_tensor(value):
        return f"a tensor of the shape {tuple(value.shape)}"
    if isinstance(value, Mapping) and "samples" in value:
        return "a LATENT whose samples are no single tensor"
    if isinstance(value, str) and not _is_text(value):
        return "a text with a broken character (half of a surrogate pair)"
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"
