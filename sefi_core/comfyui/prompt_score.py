"""CLIP embeddings of pictures and of texts in ComfyUI, in one space or not at all.

ComfyUI's CLIPVision gives a picture's embedding in the space that it shares with the text encoder
of the same CLIP model: ViT-L with ``l`` (768), ViT-H with ``h`` (1024), ViT-bigG with ``g`` (1280).
A text encoder gets there by its ``text_projection``. Checkpoints of SD 1.x, and the ``l`` of SDXL,
do not have that matrix, and ComfyUI leaves whatever was in memory in its place. So the two are
tried out before they are believed: on pictures of one plain colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel

from ..errors import SeFiError
from ..identity.identity import Identity
from ..images import checked_pictures
from ..prompt_score import Rule, Scores, in_plain_words, prompts_for, scored, texts_to_compare
from .clip.encoder import applied_to
from .clip.tokens import check_clip, encoder_models

AT_A_TIME = 8
"""Pictures that are encoded together."""
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.7, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
COLOUR_PROMPT = "a plain {} background"
ENOUGH = 4
"""Colours of the six that must be told right; by chance as many are in one case of a hundred."""

_LOADERS = {
    768: "CLIP-ViT-L/14 goes with clip_l.safetensors, by CLIP Loader of type stable_diffusion",
    1024: "CLIP-ViT-H/14 goes with the CLIP of an SD 2.x checkpoint",
    1280: "CLIP-ViT-bigG/14 goes with the CLIP of an SDXL checkpoint",
}
_agreeing: WeakKeyDictionary[ClipVisionModel, WeakKeyDictionary[Any, int]] = WeakKeyDictionary()
"""Vision model -> text model -> colours told right, for those that were tried."""


def prompt_scores(
    images: torch.Tensor,
    prompts: str,
    clip: CLIP,
    clip_vision: ClipVisionModel,
    identity: Identity | None,
    rule: Rule,
) -> Scores:
    """Score an IMAGE batch (B, H, W, C) against prompts, one a line, with a bar and cancelling.

    A placeholder of ``identity``, or of one that is applied to ``clip``, becomes its class word.
    Raises :class:`SeFiError` for what is no batch of pictures, for prompts that do not fit it, and
    for a CLIP and a vision model that are not of one kind.
    """
    images = checked_pictures(images, "images")
    words = _class_words(clip, identity)
    lines = [in_plain_words(line, words) for line in prompts_for(prompts, len(images))]
    encoder = matching_encoder(clip, clip_vision)
    bar = comfy.utils.ProgressBar(len(images))
    pictures = _image_embeddings(images, clip_vision, bar.update)
    texts = texts_to_compare(lines, words)
    embeddings = dict(zip(texts, text_embeddings(clip, encoder, texts), strict=True))
    return scored(pictures, embeddings, lines, rule)


def matching_encoder(clip: CLIP, clip_vision: ClipVisionModel) -> str:
    """The text encoder ("l", "h", "g") of the CLIP that shares its space with a vision model.

    Raises :class:`SeFiError` when none has its width, or when the one that has does not tell
    plain colours with it.
    """
    check_clip(clip)
    width = clip_vision.config.get("projection_dim")
    if clip_vision.model_type != "clip_vision_model" or width is None:
        raise SeFiError(
            f"clip_vision is a {clip_vision.model_type}, which shares no space with text: load a "
            "CLIP vision model, such as CLIP-ViT-L/14"
        )
    models = encoder_models(clip)
    widths = {
        name: int(model.transformer.text_projection.weight.shape[0])
        for name, model in models.items()
        if hasattr(model.transformer, "text_projection")
    }
    name = next((name for name, own in widths.items() if own == width), None)
    if name is None:
        has = ", ".join(f"{name} {own}" for name, own in widths.items()) or "none"
        raise SeFiError(
            f"clip_vision and clip do not go together (pictures have {width} numbers, texts "
            f"{has}): {_advice(width)}"
        )
    if _colours_told(clip, name, clip_vision) < ENOUGH:
        raise SeFiError(
            "clip_vision and clip do not understand each other: they do not tell a red picture "
            "from a blue one. Checkpoints of SD 1.x lack the matrix that leads from texts to "
            f"pictures, and models of two kinds may be equally wide: {_advice(width)}"
        )
    return name


def text_embeddings(clip: CLIP, encoder: str, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings (N, D) of texts in the space that they share with pictures, on the CPU.

    Of a long text its first 75 tokens count; prompt weights do not.
    """
    model: SDClipModel = encoder_models(clip)[encoder]
    found = []
    for text in texts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        tokens = clip.tokenize(text)
        clip.load_model(tokens)
        model.reset_clip_options()
        model.set_clip_options(
            {"execution_device": clip.patcher.load_device, "projected_pooled": True}
        )
        try:
            with comfy.model_management.cuda_device_context(clip.patcher.load_device):
                found.append(model.encode_token_weights(tokens[encoder][:1])[1])
        finally:
            model.reset_clip_options()
    return torch.cat(found).float().cpu()


def _image_embeddings(
    images: torch.Tensor, clip_vision: ClipVisionModel, on_pictures: Callable[[int], None]
) -> torch.Tensor:
    found = []
    for few in images.split(AT_A_TIME):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found.append(clip_vision.encode_image(few)["image_embeds"].float().cpu())
        on_pictures(len(few))
    embeddings = torch.cat(found)
    if not torch.isfinite(embeddings).all():
        raise SeFiError(
            "images holds values that are not numbers (NaN or infinite): check the node that made "
            "them, often a VAE decoding in half precision"
        )
    return embeddings


def _colours_told(clip: CLIP, encoder: str, clip_vision: ClipVisionModel) -> int:
    """How many plain colours the two models give the right name, remembered for each pair.

    Every picture and every text has something in common with all others; that is taken off first.
    """
    tried = _agreeing.setdefault(clip_vision, WeakKeyDictionary())
    key = encoder_models(clip)[encoder].transformer
    if key not in tried:
        pictures = torch.tensor(list(COLOURS.values()))[:, None, None].expand(-1, 64, 64, -1)
        seen = _image_embeddings(pictures.contiguous(), clip_vision, lambda _: None)
        read = text_embeddings(clip, encoder, [COLOUR_PROMPT.format(name) for name in COLOURS])
        seen, read = (F.normalize(one, dim=-1) for one in (seen, read))
        table = (seen - seen.mean(dim=0)) @ (read - read.mean(dim=0)).T
        right = table.argmax(dim=1) == torch.arange(len(COLOURS))
        tried[key] = int(right.sum()) if torch.isfinite(table).all() and table.any() else 0
    return tried[key]


def _class_words(clip: CLIP, identity: Identity | None) -> Mapping[str, str]:
    applied = applied_to(clip)
    known = [one.identity for one in applied.applied.values()] if applied else []
    known += [identity] if identity is not None else []
    return {one.name: one.class_word for one in known}


def _advice(width: int) -> str:
    return _LOADERS.get(width, "load the vision model and the text encoder of one CLIP model")
