"""The ways to teach a model a new identity that the quality benchmark compares."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.base_model import family_of
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.clip.encoder import AppliedIdentity
from sefi_ide.sefi_core.comfyui.learning import denoiser as predictor
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.photos import Photo
from sefi_ide.sefi_core.learning.settings import TrainingSettings

from .lora import apply_lora, train_lora
from .miniature import MiniSDRuntime

LORA = "lora"
_PLAIN = {"background_weight": 1.0, "captions": ()}
_FREE = {"attention_weight": 0.0, "leak_weight": 0.0}
_INVERSION = {"stages": 1, "parametrisation": "shared", **_FREE}
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
    "sefi_no_attention_loss": _FREE,
    "sefi": {},
}
"""What each method changes of the pack's defaults."""
METHODS = (*IDENTITY_METHODS, LORA)
TITLES = {
    "class_word": "class word (floor)",
    "textual_inversion": "textual inversion",
    "textual_inversion_prepared": "textual inversion (with mask and captions)",
    "per_stage_5": "5 stages, K = V (ProSpect-like)",
    "per_stage_10": "10 stages, K = V (ProSpect-like)",
    "lora": "LoRA (core's Train LoRA node)",
    "sefi_paper": "SeFi (as published)",
    "sefi_no_attention_loss": "SeFi (without attention loss)",
    "sefi_swept": "SeFi (at the best of its sweep)",
    "sefi": "SeFi (the pack's defaults)",
    "named": "known by name (ceiling)",
}
PLACEHOLDER = "subject"
INITIAL = ("class word", "zero", "random")
"""What training can start from; the pack starts from the first."""
STRENGTHS = ("strength_k", "strength_v", "start_percent", "end_percent")
"""What overrides can have of :class:`AppliedIdentity`, for drawing."""
MASKS = ("head", "ellipse", "larger ellipse", "none")
"""Which masks photos can have: the head as it was drawn; an ellipse over it, as SeFi Face Mask
makes one, that touches the head's bounding box or is a quarter larger; none."""


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
    """Learn who is in the photos.

    ``overrides`` are ``learning_rate``, ``steps`` and the like, and :data:`STRENGTHS`.
    """
    started = time.monotonic()
    if method == LORA:
        return _learn_lora(mini, photos, class_word, overrides, started)
    training = {name: value for name, value in overrides.items() if name not in STRENGTHS}
    strengths = {name: value for name, value in overrides.items() if name in STRENGTHS}
    identity = learn_identity(mini, method, photos, class_word, training)
    seconds = time.monotonic() - started
    learned = with_identity(mini, identity, **strengths)
    return learned._replace(seconds=seconds, size=len(to_bytes(identity)))


def with_identity(mini: MiniSDRuntime, identity: Identity, **strengths: float) -> Learned:
    """MODEL and CLIP with the identity applied; ``strengths`` are some of :data:`STRENGTHS`."""
    model, clip = apply_identity(mini.model, mini.clip, AppliedIdentity(identity, **strengths))
    return Learned(model, clip, identity.placeholder)


def learn_identity(
    mini: MiniSDRuntime,
    method: str,
    photos: Sequence[Photo],
    class_word: str,
    overrides: Mapping[str, Any],
) -> Identity:
    """The identity that one of ``IDENTITY_METHODS`` learns.

    Beside settings, ``overrides`` may have three things that are no settings of the pack:
    ``initial``, one of ``INITIAL``; ``levels``, those of the U-Net whose attention counts; and
    ``mask``, one of ``MASKS``.
    """
    changed = {**IDENTITY_METHODS[method], **overrides}
    initial, levels = changed.pop("initial", INITIAL[0]), changed.pop("levels", predictor.LEVELS)
    mask = changed.pop("mask", MASKS[0])
    photos = [with_mask(photo, mask) for photo in photos]
    settings = TrainingSettings(**{**changed, "resolution": 128, "preview_every": 0})
    start = None if initial == INITIAL[0] else _start(mini, class_word, settings, initial)
    with mock.patch.object(predictor, "LEVELS", tuple(levels)):
        return train_identity(
            mini.model, mini.clip, mini.vae, photos, PLACEHOLDER, class_word, settings, start
        ).identity


def with_mask(photo: Photo, kind: str) -> Photo:
    """A photo, whose mask is that of the head, with a mask of :data:`MASKS`."""
    if kind == "head":
        return photo
    if kind == "none":
        return photo._replace(mask=None)
    size = 1.25 if kind == "larger ellipse" else 1.0
    rows, columns = (photo.mask > 0.5).nonzero(as_tuple=True)
    distance = 0.0
    for places, side in ((rows, 0), (columns, 1)):
        low, high = places.min().item(), places.max().item() + 1
        centres = torch.arange(photo.mask.shape[side]) + 0.5
        along = (2 * centres - low - high) / (size * (high - low))
        distance = distance + along.square().unsqueeze(1 - side)
    return photo._replace(mask=(distance <= 1).float())


def _start(mini, class_word: str, settings: TrainingSettings, initial: str) -> Identity:
    """An identity to start from that is not the class word's."""
    ((encoder, rows),) = class_word_embedding(mini.clip, class_word).items()
    shape = settings.stages, *rows.shape
    spread = rows.std() if initial == "random" else 0.0
    vectors = spread * torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
    start = {encoder: vectors}
    return Identity(PLACEHOLDER, class_word, family_of(mini.model), start, start)


def _learn_lora(mini, photos, class_word, overrides, started) -> Learned:
    with torch.no_grad():
        pictures = torch.stack([photo.picture for photo in photos])
        latents = mini.vae.encode(pictures)
        conditioning = mini.encode(f"a photo of a {class_word}")
    lora = train_lora(mini.model, latents, conditioning, seed=0, **overrides)
    seconds = time.monotonic() - started
    size = len(safetensors.torch.save({k: v.half().contiguous() for k, v in lora.items()}))
    return Learned(apply_lora(mini.model, lora), mini.clip, class_word, seconds, size)
