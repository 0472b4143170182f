"""The ways to teach a model a new identity that the quality benchmark compares."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.encoding import AppliedIdentity
from sefi_ide.sefi_core.comfyui.train import train_identity
from sefi_ide.sefi_core.pictures import Photo
from sefi_ide.sefi_core.training import TrainingSettings

from .lora import apply_lora, train_lora
from .miniature import MiniSDRuntime

LORA = "lora"
IDENTITY_METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": {"stages": 1, "parametrisation": "shared", "attention_weight": 0.0},
    "per_stage_5": {"stages": 5, "parametrisation": "shared", "attention_weight": 0.0},
    "per_stage_10": {"stages": 10, "parametrisation": "shared", "attention_weight": 0.0},
    "sefi_no_attention_loss": {"attention_weight": 0.0},
    "sefi": {},
}
"""What each method changes of the pack's defaults."""
METHODS = (*IDENTITY_METHODS, LORA)
TITLES = {
    "class_word": "class word (floor)",
    "textual_inversion": "textual inversion",
    "per_stage_5": "5 stages, K = V (ProSpect-like)",
    "per_stage_10": "10 stages, K = V (ProSpect-like)",
    "lora": "LoRA (core's Train LoRA node)",
    "sefi_no_attention_loss": "SeFi without attention loss",
    "sefi": "SeFi",
    "named": "named people (ceiling)",
}
PLACEHOLDER = "subject"


class Learned(NamedTuple):
    """A MODEL and CLIP that know someone by ``word``, what that cost, and how it was drawn.

    ``seconds`` is the wall time of learning, ``size`` the bytes of the file to share.
    """

    model: ModelPatcher
    clip: CLIP
    word: str
    seconds: float = 0.0
    size: int = 0


def learn(
    mini: MiniSDRuntime,
    method: str,
    photos: Sequence[Photo],
    class_word: str,
    overrides: Mapping[str, Any],
) -> Learned:
    """Learn who is in the photos. ``overrides`` are ``learning_rate``, ``steps`` and the like."""
    started = time.monotonic()
    if method == LORA:
        return _learn_lora(mini, photos, class_word, overrides, started)
    settings = TrainingSettings(
        **{**IDENTITY_METHODS[method], **overrides, "resolution": 128, "preview_every": 0}
    )
    identity = train_identity(
        mini.model, mini.clip, mini.vae, photos, PLACEHOLDER, class_word, settings
    ).identity
    seconds = time.monotonic() - started
    model, clip = apply_identity(mini.model, mini.clip, AppliedIdentity(identity))
    size = len(identity.to_bytes())
    return Learned(model, clip, identity.placeholder, seconds, size)


def _learn_lora(mini, photos, class_word, overrides, started) -> Learned:
    with torch.no_grad():
        latents = mini.vae.encode(torch.stack([photo.picture for photo in photos]))
        conditioning = mini.encode(f"a photo of a {class_word}")
    lora = train_lora(mini.model, latents, conditioning, seed=0, **overrides)
    seconds = time.monotonic() - started
    size = len(safetensors.torch.save({k: v.half().contiguous() for k, v in lora.items()}))
    return Learned(apply_lora(mini.model, lora), mini.clip, class_word, seconds, size)
