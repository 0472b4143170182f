"""What a training is made of, as one text: equal texts, equal results.

Models count by what they hold and not by what they are called: every bit of their weights, the
patches on them, sampling type and precision. So another checkpoint of the same name, or a LoRA of
another strength, is another training, and the same checkpoint loaded again is the same one, in
another process too. Whatever cannot be read so, such as functions of other packs, counts by being
the very same object, and never outlives it.
"""

from __future__ import annotations

import logging
import secrets
import types
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy.weight_adapter import WeightAdapterBase

from ...digest import digest, weights_digest
from ...identity.identity import Identity
from ...learning.photos import Photo
from ...learning.settings import TrainingSettings

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised with every change of what a training makes of the same things."""

_UNUSED = "clip_l.transformer.text_projection.weight"
"""No family has a use for it, checkpoints lack it, and ComfyUI leaves in it what was in memory."""

_marks: dict[int, tuple[weakref.ref[Any], str]] = {}
"""Id of an object -> a reference that does not keep it, and the text that stands for it."""


def training_key(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Sequence[Photo],
    name: str,
    class_word: str,
    settings: TrainingSettings,
    start: Identity | None = None,
) -> str | None:
    """64 hexadecimal digits for all that a training's result depends on.

    None where that cannot be told: with hooks, whose strength other nodes change by themselves,
    and with embedding files in the texts.
    """
    texts = (class_word, *settings.templates, *settings.captions)
    patchers = model, clip.patcher
    hooked = any(
        patcher.hook_patches or patcher.forced_hooks or patcher.current_hooks
        for patcher in patchers
    )
    if hooked or clip.apply_hooks_to_conds or any("embedding:" in text for text in texts):
        return None
    try:
        return digest(
            [
                VERSION,
                _model(model),
                _clip(clip),
                _vae(vae),
                [[photo.picture, photo.mask] for photo in photos],
                name,
                class_word,
                settings.as_json(),
                None if start is None else _identity(start),
            ],
            _described,
        )
    except Exception as error:  # it is for convenience only, and packs bring anything
        logger.info("SeFi Train Identity does not remember this training: %s", error)
        return None


def _model(model: ModelPatcher) -> list[Any]:
    base = model.model
    # The sampling type is asked for by name: it may be in force already, or be a patch as yet.
    named = ("model_sampling", "latent_format")
    others = {name: one for name, one in model.object_patches.items() if name not in named}
    return [
        _class(base),
        _exchanged(base.diffusion_model),
        str(base.model_type),
        base.model_config.unet_config,
        base.get_dtype_inference(),
        model.load_device,
        _weights(model, "diffusion_model."),
        [[_settings_of(one), _buffers(one)] for one in map(model.get_model_object, named)],
        others,
        # These do not reach the training, but they do reach the sample in the report.
        model.model_options,
        model.wrappers,
        model.callbacks,
        model.attachments,
        model.weight_wrapper_patches,
        model.additional_models,
    ]


def _clip(clip: CLIP) -> list[Any]:
    return [
        _class(clip),
        _kinds(clip.cond_stage_model) if type(clip) is CLIP else _mark(clip.cond_stage_model),
        _tokenizer(clip.tokenizer),
        clip.layer_idx,
        clip.tokenizer_options,
        clip.use_clip_schedule,
        clip.patcher.load_device,
        clip.patcher.object_patches,
        clip.patcher.model_options,
        clip.patcher.weight_wrapper_patches,
        _weights(clip.patcher),
    ]


def _vae(vae: VAE) -> list[Any]:
    if type(vae) is not VAE:  # packs bring VAEs of classes of their own
        return [_mark(vae)]
    network: Any = vae.first_stage_model
    return [_kinds(network), vae.vae_dtype, vae.device, _weights(vae.patcher)]


def _identity(identity: Identity) -> dict[str, Any]:
    """All of it, but for what is another one's in the end."""
    names = {field.name for field in fields(identity)} - {"name", "thumbnail"}
    return {name: getattr(identity, name) for name in sorted(names)}


def _weights(patcher: ModelPatcher, prefix: str | None = None) -> list[Any]:
    """Every weight as it is without patches, and the patches."""
    original = patcher.get_key_patches(prefix)
    weights = {key: ones[0][0] for key, ones in sorted(original.items()) if key != _UNUSED}
    patches = {key: patcher.patches[key] for key in weights if key in patcher.patches}
    return [{key: _weight(weight) for key, weight in weights.items()}, patches]


def _weight(weight: object) -> object:
    # Quantised ones are tensors of classes of their own.
    if isinstance(weight, torch.Tensor) and type(weight) in (torch.Tensor, torch.nn.Parameter):
        return weights_digest(weight)
    return _mark(weight)


def _tokenizer(tokenizer: Any) -> object:
    """Its class, if it and all within it are ComfyUI's own; SeFi Apply Identity puts in others."""
    inner = [one for one in vars(tokenizer).values() if hasattr(one, "tokenize_with_weights")]
    own = _comes_from([tokenizer, *inner], "comfy.")
    vocabularies = [getattr(one, "tokenizer", None) for one in inner]
    if own and inner and _comes_from(vocabularies, "transformers."):
        return [_class(tokenizer), *map(_class, [*inner, *vocabularies])]
    return _mark(tokenizer)


def _settings_of(one: Any) -> list[Any]:
    """The class of an object, and its public attributes.

    ComfyUI puts classes together at run time, so all that it comes from count.
    """
    own = {name: value for name, value in vars(one).items() if not name.startswith("_")}
    return [[_name(kind) for kind in type(one).__mro__], own]


def _kinds(network: torch.nn.Module) -> list[Any]:
    """What a network is built of, beside its weights."""
    parts = [(name, _class(part)) for name, part in network.named_modules()]
    return [parts, _exchanged(network)]


def _exchanged(network: torch.nn.Module) -> list[Any]:
    """Methods of a network's parts that were exchanged in place, as some packs do."""
    return [
        (part, name, value)
        for part, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (types.FunctionType, types.MethodType))
    ]


def _buffers(one: object) -> dict[str, torch.Tensor]:
    return dict(one.state_dict()) if isinstance(one, torch.nn.Module) else {}


def _described(value: object) -> object:
    """What stands for an object within patches and options."""
    if isinstance(value, WeightAdapterBase):
        return [_class(value), vars(value)]
    if isinstance(value, type):
        return _name(value) if "<locals>" not in value.__qualname__ else _mark(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType) and not (value.__closure__ or value.__defaults__):
        code = value.__code__
        return [value.__module__, value.__qualname__, code.co_code, repr(code.co_consts)]
    return _mark(value)


def _mark(one: object) -> str:
    """A text that stands for this very object as long as it lives, and for nothing after it."""
    known = _marks.get(id(one))
    if known is not None and known[0]() is one:
        return known[1]
    mark, number = secrets.token_hex(16), id(one)
    try:
        # A new object may have the id before the old one's end is told.
        def forget(gone: weakref.ref[Any]) -> None:
            if number in _marks and _marks[number][0] is gone:
                del _marks[number]

        _marks[number] = weakref.ref(one, forget), mark
    except TypeError:
        pass  # no references to it are possible: another mark each time
    return mark


def _comes_from(ones: Iterable[object], pack: str) -> bool:
    return all(type(one).__module__.startswith(pack) for one in ones)


def _class(one: object) -> str:
    return _name(type(one))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
