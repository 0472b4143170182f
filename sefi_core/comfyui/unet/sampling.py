"""The MODEL side: gives the cross-attention of each prompt its keys and values.

- ``OUTER_SAMPLE`` begins a :class:`Run` and gives every conditioning a number, as one more entry
  of its ``model_conds``: so ComfyUI itself repeats, batches, copies, crops and windows it with the
  context that it belongs to.
- ``DIFFUSION_MODEL`` finds in each row of the batch the prompts that are known, those of the
  conditioning's own dict first, has an ``attn2_patch`` swap their contexts, and swaps the pooled
  output where the model has one (SDXL).

Patches of other packs run first and see ordinary text; what they bring is recognised as well. Only
where nothing is recognised after them, as when they cut contexts, the swap comes before them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.conds
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...injection import Injection, Row, Segment, pooled_swapped, swapped
from ...stages import stage_edges
from ..base_model import model_sampling_of, training_sigmas, uncompiled
from .conditioning import (
    CONDITIONING_KEY,
    REGISTRY,
    Known,
    Marks,
    find,
    fingerprints,
)

logger = logging.getLogger(__name__)

WRAPPERS_KEY = "sefi_identity"
RUN_KEY = "sefi_identity_run"
NUMBERS_KEY = "sefi_identity_rows"
PATCH = "attn2_patch"

KEPT_BATCHES = 8
"""Of contexts that were swapped; windows of frames have many, which take memory on the device."""

Contexts = tuple[torch.Tensor, torch.Tensor]
"""Of keys and of values, (rows, tokens, width) each."""


class RowNumbers(comfy.conds.CONDRegular):
    """The number of its conditioning for each row, (rows,); a list where a batch is put together.

    As a list it stays on the CPU, where it is read.
    """

    def concat(self, others: Sequence[RowNumbers]) -> list[int]:
        """The numbers of all rows of the batch."""
        return torch.cat([self.cond, *(other.cond for other in others)]).tolist()


class Run:
    """What is known in one sampling: ``own`` are the payloads of each conditioning's dict."""

    def __init__(self, model: ModelPatcher, own: Sequence[Sequence[Known]]) -> None:
        self.sampling = model_sampling_of(model)  # nodes may have changed it after Apply
        self.sigmas = training_sigmas(self.sampling, model.model.model_config)
        self.own = own
        self._edges: dict[int, tuple[float, ...]] = {}
        self._injections: dict[Known, Sequence[Injection]] = {}
        self._rows: dict[tuple[int | None, torch.dtype, Marks], Row] = {}
        self._moved: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._swapped: dict[tuple[object, ...], tuple[list[int], Contexts]] = {}

    def rows(self, contexts: torch.Tensor, numbers: Sequence[int] = ()) -> list[Row]:
        """The known prompts of each row of a batch of contexts (rows, tokens, width).

        ``numbers`` are of the rows' conditionings; where rows were added since, they say nothing.
        """
        marks = fingerprints(contexts)
        known = numbers if len(numbers) == len(marks) else [None] * len(marks)
        return [self._row(*pair, contexts.dtype) for pair in zip(known, marks, strict=True)]

    def swap(self, contexts: torch.Tensor, rows: Sequence[Row], sigma: float) -> Contexts | None:
        """The contexts of keys and values at a noise level, None where they are not changed.

        ``rows`` are the known prompts in them. Most batches of a sampling are alike, and made once.
        """
        acting = [segment.at(sigma) for row in rows for segment in row]
        if not any(acting):
            return None
        # A row is one object for each context, so that its id tells the context.
        batch = contexts.device, contexts.dtype, tuple(map(id, rows))
        state = list(map(id, acting))
        if batch not in self._swapped or self._swapped[batch][0] != state:
            parts = [
                swapped(context, row, sigma, lambda tensor: self._on_device_of(contexts, tensor))
                for context, row in zip(contexts.split(1), rows, strict=True)
            ]
            keys, values = zip(*parts, strict=True)
            while len(self._swapped) >= KEPT_BATCHES:
                del self._swapped[next(iter(self._swapped))]
            self._swapped[batch] = state, (torch.cat(keys), torch.cat(values))
        return self._swapped[batch][1]

    def swap_pooled(self, vectors: torch.Tensor, rows: Sequence[Row], sigma: float) -> torch.Tensor:
        """The vectors (rows, width) of a batch, which begin with the prompts' pooled outputs."""
        parts = [
            pooled_swapped(vector, row, sigma, lambda tensor: self._on_device_of(vectors, tensor))
            for vector, row in zip(vectors.split(1), rows, strict=True)
        ]
        return torch.cat(parts)

    def _row(self, number: int | None, marks: Marks, dtype: torch.dtype) -> Row:
        place = number, dtype, marks
        if place not in self._rows:
            # Rows may have changed their places since they got their numbers.
            every = [known for group in self.own for known in group]
            candidates = every
            if number is not None:
                others = (known for known in every if known.tells)
                candidates = [*self.own[number], *others]
            self._rows[place] = [
                Segment(
                    start,
                    start + len(known.marks(dtype)),
                    self._injections_of(known),
                    known.payload.get("pooled"),
                )
                for start, known in find(marks, dtype, candidates, REGISTRY)
            ]
        return self._rows[place]

    def _injections_of(self, known: Known) -> Sequence[Injection]:
        """A payload's phases with noise levels in the place of percents and stages."""
        if known not in self._injections:
            injections = []
            for phase in known.payload["phases"]:
                lowest = self.sampling.percent_to_sigma(phase["end_percent"])
                highest = self.sampling.percent_to_sigma(phase["start_percent"])
                for stage, stages in phase["stages"]:
                    edges = (float("-inf"), *self._edges_of(stages), float("inf"))
                    lowest, highest = max(lowest, edges[stage]), min(highest, edges[stage + 1])
                injections.append(
                    Injection(lowest, highest, phase["key"], phase["value"], phase.get("pooled"))
                )
            self._injections[known] = injections
        return self._injections[known]

    def _edges_of(self, stages: int) -> tuple[float, ...]:
        if stages not in self._edges:
            self._edges[stages] = stage_edges(self.sigmas, stages)
        return self._edges[stages]

    def _on_device_of(self, like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """A payload's tensor on the device and of the type of ``like``, moved once per run."""
        key = id(tensor), like.device, like.dtype
        if key not in self._moved:
            self._moved[key] = tensor, tensor.to(like)  # the first keeps its id taken
        return self._moved[key][1]


def outer_sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Begin a run where there is something to inject; else nothing of the sampling changes.

    The guider's options and conditionings are copies that live as long as the sampling.
    """
    guider: Any = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    options.pop(RUN_KEY, None)
    conds = [cond for group in guider.conds.values() for cond in group or ()]
    own = [[Known(payload) for payload in cond.get(CONDITIONING_KEY) or ()] for cond in conds]
    run = Run(guider.model_patcher, own)
    found = [_is_found(run, number, cond) for number, cond in enumerate(conds)]
    if not any(found) and not (len(REGISTRY) and options.get("patches", {}).get(PATCH)):
        return executor(*args, **kwargs)
    options[RUN_KEY] = run
    for number, cond in enumerate(conds):
        rows = 1 if cond.get("cross_attn") is None else len(cond["cross_attn"])
        numbers = RowNumbers(torch.full((rows,), number))
        cond["model_conds"] = {**cond.get("model_conds", {}), NUMBERS_KEY: numbers}
    with uncompiled():
        return executor(*args, **kwargs)


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
    numbers = kwargs.pop(NUMBERS_KEY, ())
    run = transformer_options.get(RUN_KEY)
    if run is not None and context is not None:
        sigma = float(transformer_options["sigmas"].detach().flatten()[0])
        rows = run.rows(context, numbers)
        contexts = run.swap(context, rows, sigma)
        if contexts is not None and y is not None and len(y) == len(rows):
            y = run.swap_pooled(y, rows, sigma)
        patches = transformer_options.get("patches", {})
        others = patches.get(PATCH, [])
        if contexts is not None or others:
            patch = _swapping(run, sigma, context, contexts, others)
            patches = {**patches, PATCH: [patch]}
            transformer_options = {**transformer_options, "patches": patches}
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def apply_to_model(model: ModelPatcher) -> ModelPatcher:
    """A clone of ``model`` that uses the payloads of its conditionings.

    Payloads travel with the conditioning, so one set of wrappers serves any number of identities.
    """
    clone = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
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
    sigma: float,
    context: torch.Tensor,
    contexts: Contexts | None,
    others: Sequence[Callable[..., tuple[torch.Tensor, ...]]],
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """One ``attn2_patch`` in the place of the ``others``, which it runs.

    ``contexts`` are what the model's ``context`` becomes, None if it stays.
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
        if _same(new_key, context) and _same(new_value, context):
            return new_query, *(contexts or (new_key, new_value))
        found = [run.rows(brought) for brought in (new_key, new_value)]
        if contexts is not None and not any(map(any, found)) and _same(key, context):
            return others_on(query, *contexts, options)
        swapped_key = run.swap(new_key, found[0], sigma)
        swapped_value = run.swap(new_value, found[1], sigma)
        return (
            new_query,
            new_key if swapped_key is None else swapped_key[0],
            new_value if swapped_value is None else swapped_value[1],
        )

    return patch


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are one; gradient checkpointing makes another object of it."""
    return first is second or (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.data_ptr() == second.data_ptr()
    )
