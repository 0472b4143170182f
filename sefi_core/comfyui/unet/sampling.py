"""The MODEL side: gives the cross-attention of each prompt its keys and values.

- ``OUTER_SAMPLE`` begins a :class:`Run` and gives every conditioning a number, as one more entry
  of its ``model_conds``: so ComfyUI itself repeats, batches, copies, crops and windows it with the
  context that it belongs to.
- ``DIFFUSION_MODEL`` finds in each row of the batch the prompts that are known, those of the
  conditioning's own dict first, has an ``attn2_patch`` swap their contexts, and swaps the pooled
  output where the model has one (SDXL). Where identities have regions, ``attn2_replace`` patches
  add up what the parts of the picture attend to.
- ``PREDICT_NOISE`` keeps the latents, in which tiles of other packs are found again.

Patches of other packs run first and see ordinary text; what they bring is recognised as well. Only
where nothing is recognised after them, as when they cut contexts, the swap comes before them.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..base_model import cross_attention_layers, representative_layers, uncompiled
from .blending import Blending
from .capture import PATCH as REPLACE
from .capture import previous_patch
from .conditioning import CONDITIONING_KEY, REGISTRY, Known
from .places import Levels, keeping_latents, levels_in, number_conditionings
from .run import Contexts, Places, Run

logger = logging.getLogger(__name__)

WRAPPERS_KEY = "sefi_identity"
RUN_KEY = "sefi_identity_run"
PLACES_KEY = "sefi_identity_rows"
PATCH = "attn2_patch"


def outer_sample(
    executor: WrapperExecutor, noise: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Begin a run where there is something to inject; else nothing of the sampling changes.

    The guider's options and conditionings are copies that live as long as the sampling.
    """
    guider: Any = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    options.pop(RUN_KEY, None)
    conds = [cond for group in guider.conds.values() for cond in group or ()]
    own = [[Known(payload) for payload in cond.get(CONDITIONING_KEY) or ()] for cond in conds]
    size = noise.shape[-2], noise.shape[-1]
    run = Run(guider.model_patcher, own, size)
    found = [_is_found(run, number, cond) for number, cond in enumerate(conds)]
    if not any(found) and not (len(REGISTRY) and options.get("patches", {}).get(PATCH)):
        return executor(noise, *args, **kwargs)
    options[RUN_KEY] = run
    number_conditionings(conds, PLACES_KEY, len(noise), size)
    with uncompiled():
        return executor(noise, *args, **kwargs)


predict_noise = keeping_latents(RUN_KEY)


def diffusion_model(
    executor: WrapperExecutor,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor | None,
    y: torch.Tensor | None,
    control: dict[str, Any] | None,
    transformer_options: dict[str, Any],
    **kwargs: Any,
) -> torch.Tensor:
    """Add the patch if a row of the batch has something to swap, or another patch may bring one."""
    given = kwargs.pop(PLACES_KEY, ())
    run = transformer_options.get(RUN_KEY)
    if run is not None and context is not None:
        levels = levels_in(transformer_options)
        rows = run.rows(context, [place.number for place in given])
        places = run.places(given, x, transformer_options, rows) if run.has_regions else ()
        reader = run.reader(rows, places, levels)
        contexts = run.swap(context, rows, levels, places)
        if contexts is not None and y is not None and len(y) == len(rows):
            y = run.swap_pooled(y, rows, levels, places)
        patches = transformer_options.get("patches", {})
        others = patches.get(PATCH, [])
        if contexts is not None or others:
            unet: Any = executor.class_obj
            blending = Blending(reader, x.shape[-2])
            patch = _swapping(run, levels, context, contexts, others, places, blending)
            transformer_options = {**transformer_options, "patches": {**patches, PATCH: [patch]}}
            if (contexts is not None and contexts.blend) or (places and others) or reader:
                replaced = transformer_options.get("patches_replace", {})
                of_layers = replaced.get(REPLACE, {})
                read = representative_layers(unet) if reader else ()
                of_layers = of_layers | {
                    block: blending.attend(previous_patch(of_layers, block), block in read)
                    for block in cross_attention_layers(unet)
                }
                transformer_options["patches_replace"] = {**replaced, REPLACE: of_layers}
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def apply_to_model(model: ModelPatcher) -> ModelPatcher:
    """A clone of ``model`` that uses the payloads of its conditionings.

    Payloads travel with the conditioning, so one set of wrappers serves any number of identities.
    """
    clone = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.DIFFUSION_MODEL, diffusion_model),
    ):
        clone.remove_wrappers_with_key(kind, WRAPPERS_KEY)
        clone.add_wrapper_with_key(kind, WRAPPERS_KEY, wrapper)
    return clone


def uses_identities(model: ModelPatcher) -> bool:
    """Whether ``model`` comes from :func:`apply_to_model`."""
    return bool(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, WRAPPERS_KEY))


def _is_found(run: Run, number: int, cond: dict[str, Any]) -> bool:
    """Whether a conditioning's context has a known prompt in it; says where one was changed."""
    context = cond.get("cross_attn")
    if context is None or not (run.own[number] or len(REGISTRY)):
        return False
    found = any(run.rows(context, [number] * len(context)))
    if run.own[number] and not found and context.any():
        names = " and ".join(
            f"<{name}>" for known in run.own[number] for name in known.payload["names"].split()
        )
        logger.info(
            "SeFi Apply Identity: another node changed the conditioning of a prompt with %s, which "
            "is drawn by a textual inversion of its vectors, without its stages.",
            names,
        )
    return found


def _swapping(
    run: Run,
    levels: Levels,
    context: torch.Tensor,
    contexts: Contexts | None,
    others: Sequence[Callable[..., tuple[torch.Tensor, ...]]],
    places: Places,
    blending: Blending,
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """One ``attn2_patch`` in the place of the ``others``, which it runs.

    ``contexts`` are what the model's ``context`` becomes, None if it stays; ``blending`` is told
    what the layer has to blend.
    """

    def others_on(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        for other in others:
            query, key, value = other(query, key, value, options)
        return query, key, value

    def patch(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        new_query, new_key, new_value = others_on(query, key, value, options)
        blending.blend, blending.own = None, False
        if _same(new_key, context) and _same(new_value, context):
            if contexts is None:
                return new_query, new_key, new_value
            blending.blend, blending.own = contexts.blend, True
            return new_query, contexts.keys, contexts.values
        found = [run.rows(brought) for brought in (new_key, new_value)]
        if contexts is not None and not any(map(any, found)) and _same(key, context):
            whole = run.swap(context, run.rows(context), levels) if contexts.blend else contexts
            return others_on(query, *(whole or contexts)[:2], options)
        # With other rows than the model's it is not known what of the picture each is.
        alike = all(map(operator.is_, *found)) and len(found[0]) == len(places)
        known = places if alike else ()
        swapped_key = run.swap(new_key, found[0], levels, known)
        swapped_value = run.swap(new_value, found[1], levels, known)
        if swapped_key is not None:
            new_key, blending.blend = swapped_key.keys, swapped_key.blend
        if swapped_value is not None:
            new_value = swapped_value.values
        return new_query, new_key, new_value

    return patch


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are one; gradient checkpointing makes another object of it."""
    return first is second or (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.data_ptr() == second.data_ptr()
    )
