"""The ways to teach a model a new identity that the quality benchmark compares."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.face_encoders import (
    OpenedEncoder,
    Wish,
    open_encoder,
    predict_identity,
)
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.photos import Photo
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime

from .encoder_mini import trained_form
from .lora import apply_lora, train_lora

LORA = "lora"
ENCODER, REFINED = "face_encoder", "refined"
"""Predicted by the miniature's face encoder (:mod:`.encoder_mini`), and that trained on."""
FORM = "form"
"""Of a predicted identity, one of ``encoder_mini.FORMS``; goes with the settings that differ."""
SHIPPED_FORM = "two vectors"
_PLAIN = {"background_weight": 1.0, "captions": ()}
_FREE = {"attention_weight": 0.0, "leak_weight": 0.0}
_INVERSION = {"stages": 1, "parametrisation": "shared", **_FREE}
_ONE_STAGE = {"stages": 1, "parametrisation": "direct"}
IDENTITY_METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": {**_INVERSION, **_PLAIN},
    "textual_inversion_prepared": _INVERSION,
    "per_stage_5": {**_INVERSION, **_PLAIN, "stages": 5},
    "per_stage_10": {**_INVERSION, **_PLAIN, "stages": 10},
    "sefi_paper": {
        "stages": 5,
        "parametrisation": "direct",
        "attention_weight": 0.003,
        "leak_weight": 0.0,
        **_PLAIN,
    },
    "sefi_no_attention_loss": {**_ONE_STAGE, **_FREE},
    "sefi_swept": _ONE_STAGE,
    "sefi": {},
}
"""What each method changes of the pack's defaults."""
SWEPT: dict[str, dict[str, tuple[float, int]]] = {
    "person": {
        "textual_inversion": (5e-3, 900),
        "textual_inversion_prepared": (5e-3, 900),
        "per_stage_5": (5e-3, 900),
        "per_stage_10": (5e-3, 900),
        LORA: (5e-4, 900),
        "sefi_paper": (2e-2, 900),
        "sefi_no_attention_loss": (5e-3, 900),
        "sefi_swept": (2e-2, 300),
    },
    "robot": {
        "textual_inversion": (1.25e-3, 900),
        "textual_inversion_prepared": (1.25e-3, 900),
        "per_stage_5": (2e-2, 900),
        "per_stage_10": (2e-2, 900),
        LORA: (5e-4, 900),
        "sefi_paper": (2e-2, 900),
        "sefi_no_attention_loss": (5e-3, 300),
        "sefi_swept": (1.25e-3, 900),
    },
}
"""Learning rate and steps at which each method was at its best, by class: the first rows of
``docs/sweep_people.md`` and ``docs/sweep_robots.md``. SeFi was swept with one stage."""
TITLES = {
    "class_word": "class word (floor)",
    "textual_inversion": "textual inversion",
    "textual_inversion_prepared": "textual inversion (with mask and captions)",
    "per_stage_5": "5 stages, K = V (ProSpect-like)",
    "per_stage_10": "10 stages, K = V (ProSpect-like)",
    "lora": "LoRA (core's Train LoRA node)",
    "sefi_paper": "SeFi (as published)",
    "sefi_no_attention_loss": "SeFi (one stage, without attention loss)",
    "sefi_swept": "SeFi (one stage, at the best of its sweep)",
    "sefi": "SeFi (the pack's defaults)",
    "named": "known by name (ceiling)",
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


def swept(method: str, kind: str) -> dict[str, Any]:
    """The settings of :data:`SWEPT`; none for a method that was not swept.

    ``kind`` is a class of the miniature's world, "person" or "robot".
    """
    if method not in SWEPT[kind]:
        return {}
    return dict(zip(("learning_rate", "steps"), SWEPT[kind][method], strict=True))


def learn(
    mini: MiniSDRuntime,
    method: str,
    photos: Sequence[Photo],
    class_word: str,
    overrides: Mapping[str, Any],
) -> Learned:
    """Learn who is in the photos; ``overrides`` are ``learning_rate``, ``steps`` and the like."""
    started = time.monotonic()
    if method == LORA:
        return _learn_lora(mini, photos, class_word, overrides, started)
    identity = learn_identity(mini, method, photos, class_word, overrides)
    seconds = time.monotonic() - started
    return with_identity(mini, identity)._replace(seconds=seconds, size=len(to_bytes(identity)))


def with_identity(mini: MiniSDRuntime, identity: Identity) -> Learned:
    """MODEL and CLIP with the identity applied."""
    model, clip = apply_identity(mini.model, mini.clip, AppliedIdentity(identity))
    return Learned(model, clip, identity.placeholder)


def learn_identity(
    mini: MiniSDRuntime,
    method: str,
    photos: Sequence[Photo],
    class_word: str,
    overrides: Mapping[str, Any],
) -> Identity:
    """The identity that one of ``IDENTITY_METHODS``, :data:`ENCODER` or :data:`REFINED` makes."""
    start = None
    if method in (ENCODER, REFINED):
        overrides = dict(overrides)
        start = predict(photos, class_word, overrides.pop(FORM, SHIPPED_FORM))
        if method == ENCODER:
            return start
    changed = {**IDENTITY_METHODS.get(method, {}), **overrides}
    settings = TrainingSettings(**{**changed, "resolution": 128, "preview_every": 0})
    return train_identity(
        mini.model, mini.clip, mini.vae, photos, PLACEHOLDER, class_word,
        settings.going_on_from(start), start,
    ).identity  # fmt: skip


@cache
def face_encoder(form: str) -> OpenedEncoder:
    """The trained encoder of the drawn world, with the mapping of a form."""
    return open_encoder([trained_form(form)])


def predict(photos: Sequence[Photo], class_word: str, form: str = SHIPPED_FORM) -> Identity:
    """The identity that the encoder sees in photos with masks."""
    return predict_identity(face_encoder(form), photos, Wish(PLACEHOLDER, class_word))[0]


def _learn_lora(mini, photos, class_word, overrides, started) -> Learned:
    with torch.no_grad():
        pictures = torch.stack([photo.picture for photo in photos])
        latents = mini.vae.encode(pictures)
        conditioning = mini.encode(f"a photo of a {class_word}")
    lora = train_lora(mini.model, latents, conditioning, seed=0, **overrides)
    seconds = time.monotonic() - started
    size = len(safetensors.torch.save({k: v.half().contiguous() for k, v in lora.items()}))
    return Learned(apply_lora(mini.model, lora), mini.clip, class_word, seconds, size)
