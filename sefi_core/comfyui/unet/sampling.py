"""The MODEL side: gives the cross-attention of each prompt its keys and values.

Three wrappers do it. What they keep of a run is in the options of its calls:

- ``OUTER_SAMPLE`` puts a fresh :class:`Run` into the options of this sampling;
- ``CALC_COND_BATCH`` sees every conditioning of a step, finds out by content which payloads apply
  to it, and looks up the stage once; the :class:`Step` goes into the options of this call;
- ``DIFFUSION_MODEL`` recognises each row of the batch by its context, and only if a row has
  something to swap adds an ``attn2_patch`` to the options of this one forward.

The patch goes in front of all others, so they see and change what the prompts really stand for.
Neither the place nor the ``uuid`` of a row is trusted by itself: with areas ComfyUI copies the
dict of the positive, uuid included, into the negative; tiling wrappers reorder rows; guiders have
orders of their own. They only decide between conditionings of equal context.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch.utils.weak import WeakTensorKeyDictionary

from ...stages import stage_edges, stage_of_sigma
from ..base_model import training_sigmas, uncompiled
from .conditioning import CONDITIONING_KEY, REGISTRY, Payload, Segment, find_segments

logger = logging.getLogger(__name__)

WRAPPERS_KEY = "sefi_identity"
RUN_KEY = "sefi_identity_run"
STEP_KEY = "sefi_identity_step"

Conditioning = dict[str, Any]
Swapped = tuple[torch.Tensor, torch.Tensor] | None
"""Keys' and values' context for a batch of contexts (rows, tokens, width), None to leave it."""


@dataclass
class Prompt:
    """What one prompt of the current step stands for.

    ``context`` (1, tokens, width) is what ComfyUI feeds to the U-Net; ``swaps`` are the parts of it
    that have other keys and values now: (start, end, key, value).
    """

    context: torch.Tensor
    swaps: list[tuple[int, int, torch.Tensor, torch.Tensor]]

    def repeated(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The context as a row of the batch ``rows`` (rows, tokens, width), None if it can't be.

        ComfyUI repeats contexts to the least common multiple of the lengths in a batch.
        """
        _, tokens, width = self.context.shape
        if width != rows.shape[2] or rows.shape[1] % tokens:
            return None
        return self.context.to(rows).repeat(1, rows.shape[1] // tokens, 1)


@dataclass
class Step:
    """What the conditionings of a step stand for; one serves all steps where that is the same."""

    state: Sequence[object]
    """Places, uuids, contexts and current phases, objects by their ids."""
    contexts: Sequence[torch.Tensor]
    """Keeps these ids taken."""
    prompts: dict[tuple[int, object], list[Prompt]]
    """The rows of each conditioning, by place in the list of lists and uuid."""
    swapped: dict[tuple[object, ...], tuple[torch.Tensor, Swapped]] = field(default_factory=dict)
    """Device, type and places of a batch -> the contexts of the last one, and what it became."""


@dataclass
class Run:
    """The state of one sampling."""

    previous: Step | None = None
    """The step before, which may serve once more; None if nothing was to be swapped in it."""
    segments: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Context -> for each of its rows the payloads in it, found once."""
    edges: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Number of stages -> the sigmas between them."""
    percents: dict[float, float] = field(default_factory=dict)
    """Percent of the sampling -> its sigma."""
    moved: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Payload tensors and their copies on the model's device."""
    warned: bool = False

    def on_device_of(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A payload's tensor on the device and of the type of ``like``, moved once per run."""
        key = id(tensor), like.device, like.dtype
        if key not in self.moved:
            self.moved[key] = tensor, tensor.to(like)  # the first keeps its id taken
        return self.moved[key][1]


def outer_sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Begin a run. The guider's options are a copy that lives as long as the sampling."""
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    options[RUN_KEY] = Run()
    return executor(*args, **kwargs)


def calc_cond_batch(
    executor: WrapperExecutor,
    model: BaseModel,
    conds: list[list[Conditioning] | None],
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """Resolve the conditionings of a step, and hand it down in the options of this call.

    Gradient checkpointing calls the U-Net again in the backward pass, with these options.
    """
    options = model_options.get("transformer_options", {})
    run = options.get(RUN_KEY) or Run()  # there is none without a guider
    step = run.previous = _resolve(run, model, conds, timestep)
    options = {**options, RUN_KEY: run, STEP_KEY: step}
    model_options = {**model_options, "transformer_options": options}
    with uncompiled() if step else nullcontext():
        return executor(model, conds, x, timestep, model_options)


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
    """Add the patch if a row of the batch has something to swap."""
    step = transformer_options.get(STEP_KEY)
    if step is not None and context is not None:
        run = transformer_options[RUN_KEY]
        swapped = _swapped_contexts(run, step, context, transformer_options)
        if swapped is not None:
            patches = dict(transformer_options.get("patches", {}))
            patches["attn2_patch"] = [_swap(*swapped), *patches.get("attn2_patch", [])]
            transformer_options = {**transformer_options, "patches": patches}
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def apply_to_model(model: ModelPatcher) -> ModelPatcher:
    """A clone of ``model`` that uses the payloads of its conditionings.

    Payloads travel with the conditioning, so one set of wrappers serves any number of identities.
    """
    clone = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.DIFFUSION_MODEL, diffusion_model),
    ):
        clone.remove_wrappers_with_key(kind, WRAPPERS_KEY)
        clone.add_wrapper_with_key(kind, WRAPPERS_KEY, wrapper)
    return clone


def uses_identities(model: ModelPatcher) -> bool:
    """Whether ``model`` comes from :func:`apply_to_model`."""
    return bool(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, WRAPPERS_KEY))


def _resolve(
    run: Run,
    model: BaseModel,
    conds: list[list[Conditioning] | None],
    timestep: torch.Tensor,
) -> Step | None:
    """What the conditionings of a step stand for, or None if there is nothing to swap."""
    contexts = [
        (place, cond, cond["model_conds"]["c_crossattn"].cond)
        for place, group in enumerate(conds)
        for cond in group or []
        if "c_crossattn" in cond.get("model_conds", {})
    ]
    # The dict of another conditioning may have been copied to a context; see the module.
    owners = {
        id(context): cond for _, cond, context in contexts if cond.get("cross_attn") is context
    }
    for _, cond, context in contexts:
        if context not in run.segments:
            run.segments[context] = _segments(run, context, owners.get(id(context), cond))
    if not any(any(run.segments[context]) for _, _, context in contexts):
        return None
    sigma = float(timestep.detach().flatten()[0])
    phases = [
        [[_phase(run, model, segment.payload, sigma) for segment in row] for row in segments]
        for segments in (run.segments[context] for _, _, context in contexts)
    ]
    if not any(phase for rows in phases for row in rows for phase in row):
        return None
    state = [
        (place, cond["uuid"], id(context), [id(phase) for row in rows for phase in row])
        for (place, cond, context), rows in zip(contexts, phases, strict=True)
    ]
    if run.previous is not None and run.previous.state == state:
        return run.previous
    prompts = {
        (place, cond["uuid"]): [
            Prompt(row, _swaps(*found))
            for row, *found in zip(context.split(1), run.segments[context], rows, strict=True)
        ]
        for (place, cond, context), rows in zip(contexts, phases, strict=True)
    }
    return Step(state, [context for _, _, context in contexts], prompts)


def _segments(run: Run, context: torch.Tensor, cond: Conditioning) -> list[list[Segment]]:
    """The payloads of each row; several rows are a prompt for each picture of the batch."""
    own = cond.get(CONDITIONING_KEY) or []
    registered = list(REGISTRY)
    rows = context.split(1)
    if len(rows) == 1:
        segments = [find_segments(context, cond, registered)]
    else:  # the dict is that of one row, and nothing says of which
        pooled = cond.get("pooled_output")
        pooled = pooled.split(1) if pooled is not None else ()
        dicts = (
            [{"pooled_output": p} for p in pooled] if len(pooled) == len(rows) else [{}] * len(rows)
        )
        segments = [
            find_segments(row, one, [*own, *registered])
            for row, one in zip(rows, dicts, strict=True)
        ]
    if own and not any(segments) and context.any() and not run.warned:
        run.warned = True
        names = " and ".join(f"<{name}>" for payload in own for name in payload["names"].split())
        logger.warning(
            "SeFi Apply Identity: the conditioning of a prompt with %s was changed by another "
            "node, such as ConditioningAverage, and is sampled as it is, without the identity.",
            names,
        )
    return segments


def _swaps(
    segments: Sequence[Segment], phases: Sequence[dict[str, Any] | None]
) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
    return [
        (segment.start, segment.end, phase["key"], phase["value"])
        for segment, phase in zip(segments, phases, strict=True)
        if phase is not None
    ]


def _phase(run: Run, model: BaseModel, payload: Payload, sigma: float) -> dict[str, Any] | None:
    """The phase of a payload that ``sigma`` falls into, or None outside all of them."""
    for phase in payload["phases"]:
        begins = _sigma_of_percent(run, model, phase["start_percent"])
        ends = _sigma_of_percent(run, model, phase["end_percent"])
        if ends <= sigma <= begins and all(
            stage_of_sigma(sigma, _edges(run, model, stages)) == stage
            for stage, stages in phase["stages"]
        ):
            return phase
    return None


def _edges(run: Run, model: BaseModel, stages: int) -> tuple[float, ...]:
    if stages not in run.edges:
        run.edges[stages] = stage_edges(training_sigmas(model), stages)
    return run.edges[stages]


def _sigma_of_percent(run: Run, model: BaseModel, percent: float) -> float:
    if percent not in run.percents:
        run.percents[percent] = model.model_sampling.percent_to_sigma(percent)
    return run.percents[percent]


def _swapped_contexts(
    run: Run, step: Step, context: torch.Tensor, transformer_options: dict[str, Any]
) -> Swapped:
    """Keys' and values' context for a batch of contexts (rows, tokens, width).

    Most batches of a sampling are alike, and only compared with the one before.
    """
    places = tuple(
        zip(
            transformer_options.get("cond_or_uncond", ()),
            transformer_options.get("uuids", ()),
            strict=False,
        )
    )
    batch = context.device, context.dtype, places
    last, swapped = step.swapped.get(batch, (None, None))
    if last is None or not torch.equal(last, context):
        prompts = _prompts_of_rows(step, context, places)
        swapped = _swapped_rows(run, context, prompts)
        step.swapped[batch] = context, swapped
    return swapped


def _swapped_rows(run: Run, context: torch.Tensor, prompts: Sequence[Prompt | None]) -> Swapped:
    """The contexts of rows that stand for these prompts."""
    rows = context.split(1)
    swapped = {}
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt is not None and prompt.swaps and id(prompt) not in swapped:
            swapped[id(prompt)] = _swapped_row(run, row, prompt)
    if not swapped:
        return None
    pairs = [swapped.get(id(prompt), (row, row)) for row, prompt in zip(rows, prompts, strict=True)]
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys), torch.cat(values)


def _swapped_row(run: Run, row: torch.Tensor, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys' and values' context (1, tokens, width) of one row."""
    tokens = prompt.context.shape[1]
    keys, values = [], []
    done = 0
    for start, end, key, value in prompt.swaps:
        keys += [row[:, done:start], run.on_device_of(key, row)]
        values += [row[:, done:start], run.on_device_of(value, row)]
        done = end
    copies = row.shape[1] // tokens
    rest = row[:, done:tokens]
    return (
        torch.cat([*keys, rest], dim=1).repeat(1, copies, 1),
        torch.cat([*values, rest], dim=1).repeat(1, copies, 1),
    )


def _prompts_of_rows(
    step: Step, context: torch.Tensor, places: Sequence[tuple[int, object]]
) -> list[Prompt | None]:
    """The prompt that each row of the batch is the context of."""
    rows = context.shape[0]
    repeated = [
        (prompt, prompt.repeated(context)) for group in step.prompts.values() for prompt in group
    ]
    candidates = [(prompt, expected) for prompt, expected in repeated if expected is not None]
    if not candidates:
        return [None] * rows
    equal = [(context == expected).flatten(1).all(1) for _, expected in candidates]
    matches = torch.stack(equal, dim=1).tolist()
    prompts: list[Prompt | None] = []
    # ComfyUI repeats the rows of a conditioning for all pictures of the batch.
    copies = max(1, rows // max(1, len(places)))
    for row in range(rows):
        matching = [
            prompt for (prompt, _), match in zip(candidates, matches[row], strict=True) if match
        ]
        # Equal contexts may stand for different things; then the row's own place decides, and in
        # it the prompt whose turn it is.
        by_place = step.prompts.get(places[row * len(places) // rows], []) if places else []
        turn = row % copies % len(by_place) if by_place else 0
        own = [*by_place[turn:], *by_place[:turn]]
        prompts.append(next((p for p in (*own, *matching) if _is_among(p, matching)), None))
    return prompts


def _is_among(prompt: Prompt, prompts: Sequence[Prompt]) -> bool:
    return any(prompt is other for other in prompts)  # equality would compare tensors


def _swap(key: torch.Tensor, value: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
    """An ``attn2_patch`` that sets the contexts of keys and values."""

    def patch(
        query: torch.Tensor, context: torch.Tensor, _: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        return query, key, value

    return patch
