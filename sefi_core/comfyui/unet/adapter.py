"""The MODEL side of face adapters: an attention to image tokens beside the text's.

What acts is in the transformer options, under :data:`BESIDE_KEY`; whoever takes that away from a
call of the U-Net takes the adapters away. While the U-Net is called, ``attn2_replace`` patches wrap
those that are there and add what the same queries get from the image tokens, in front of the
layer's output projection. They are set for one call, so that other packs find the MODEL's slots as
they would be without an adapter.

Rows of the batch are of a conditioning or of a negative one, which have other tokens. Each carries
its number in ``model_conds``, as in :mod:`.sampling`; where other packs have re-ordered rows, their
contexts tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...injection import Beside
from ...regions import resized
from ..base_model import Block, model_sampling_of, uncompiled
from .capture import PATCH as REPLACE
from .capture import Attend, plain_attention, previous_patch
from .conditioning import Marks, fingerprints
from .places import Place, keeping_latents, levels_in, number_conditionings, of_rows, rows_in

BESIDE_KEY = "sefi_face_adapters"
"""The transformer option that has what acts, a tuple of :class:`Beside`."""

WRAPPERS_KEY = "sefi_face_adapter"
RUN_KEY = "sefi_face_adapter_run"
PLACES_KEY = "sefi_face_adapter_rows"
PATCH = "attn2_patch"


class Rows(NamedTuple):
    """Which rows of a batch are negative ones, what of the picture each is, what acts in it."""

    negative: tuple[bool, ...]
    places: Sequence[Place | None]
    acting: Sequence[Sequence[Beside]]


class AdapterRun:
    """What is known in one sampling.

    ``negative`` says of each conditioning whether it is a negative one, ``contexts`` are theirs,
    ``size`` is (height, width) of the latents.
    """

    def __init__(
        self,
        model: ModelPatcher,
        negative: Sequence[bool],
        contexts: Sequence[torch.Tensor | None],
        size: tuple[int, int],
    ) -> None:
        self.sampling = model_sampling_of(model)  # nodes may have changed it after Apply
        self.negative, self.contexts, self.size = negative, contexts, size
        self.latents: torch.Tensor | None = None
        """Those of the current step, before they are scaled for the model."""
        self._sides: dict[tuple[torch.dtype, int], dict[Marks, bool | None]] = {}
        self._moved: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._shares: dict[Beside, torch.Tensor] = {}

    def acting(self, besides: Sequence[Beside], sigma: float) -> list[Beside]:
        """Those that act at a noise level."""
        of_percent = self.sampling.percent_to_sigma
        return [
            one
            for one in besides
            if of_percent(one.end_percent) <= sigma <= of_percent(one.start_percent)
        ]

    def rows(
        self,
        given: Sequence[Place],
        x: torch.Tensor,
        context: torch.Tensor,
        options: Mapping[str, Any],
        acting: Sequence[Sequence[Beside]],
    ) -> Rows:
        """What the rows of a call of the U-Net are; ``given`` are ComfyUI's."""
        places = rows_in(given, x, self.sampling, self.latents, options["sigmas"])
        if len(given) == len(x):
            return Rows(tuple(self.negative[place.number] for place in given), places, acting)
        sides = self.sides_of(context)
        if None in sides:
            groups = options.get("cond_or_uncond") or [0]
            sides = [groups[row * len(groups) // len(x)] != 0 for row in range(len(x))]
        return Rows(tuple(side is True for side in sides), places, acting)

    def sides_of(self, contexts: torch.Tensor) -> list[bool | None]:
        """Whether contexts are those of negative conditionings; None where that is not known."""
        key = contexts.dtype, contexts.shape[1]
        if key not in self._sides:
            known: dict[Marks, bool | None] = {}
            for negative, context in zip(self.negative, self.contexts, strict=True):
                if context is None or contexts.shape[1] % context.shape[1]:
                    continue
                repeated = context.repeat(1, contexts.shape[1] // context.shape[1], 1)
                for marks in fingerprints(repeated.to(contexts)):
                    known[marks] = negative if known.get(marks, negative) == negative else None
            self._sides[key] = known
        return [self._sides[key].get(marks) for marks in fingerprints(contexts)]

    def tokens(
        self, beside: Beside, block: Block, negative: tuple[bool, ...], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values (rows, tokens, channels), moved once a sampling."""
        key = beside, block, negative, like.device, like.dtype
        if key not in self._moved:
            index = [int(one) for one in negative]
            keys, values = (one[index].to(like) for one in beside.layers[block])
            self._moved[key] = keys, values
        return self._moved[key]

    def share(self, beside: Beside, place: Place | None) -> torch.Tensor:
        """How much of a region there is in the cells (height, width) that a row sees."""
        assert beside.region is not None
        if beside not in self._shares:
            self._shares[beside] = resized(beside.region, self.size)
        shares = self._shares[beside]
        if place is None:  # somewhere in the picture
            return torch.ones(1, 1)
        rows = slice(place.top, place.top + place.height)
        columns = slice(place.left, place.left + place.width)
        return shares[place.latent % len(shares), rows, columns]


class Addition:
    """What the adapters add during one call of the U-Net."""

    def __init__(self, run: AdapterRun, rows: Rows) -> None:
        self.run, self.batch = run, rows
        self.acting = list(dict.fromkeys(one for acting in rows.acting for one in acting))
        self.now = rows
        """Of the queries of the layer that computes; other packs may have other rows there."""
        self._queries: torch.Tensor | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._planes: dict[tuple[object, ...], torch.Tensor] = {}

    def before(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """An ``attn2_patch`` in front of all others, which changes nothing."""
        self._queries, self.now = query, self.batch
        return query, key, value

    def behind(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """An ``attn2_patch`` behind all others, which sees what rows they have made.

        A new row is the old one whose queries it has; of several, one of the same side as its
        context.
        """
        before = self._queries
        if before is not None and len(query) != len(before):
            equal = (query[:, None, :1] == before[None, :, :1]).flatten(2).all(2)
            sides = self.run.sides_of(key) if len(key) == len(query) else [None] * len(query)
            negative, places, acting = [], [], []
            for number, (found, side) in enumerate(zip(equal.tolist(), sides, strict=True)):
                rows = [row for row, is_it in enumerate(found) if is_it]
                best = [row for row in rows if self.batch.negative[row] is (side is True)]
                row = next(iter(best or rows), None)
                negative.append(side is True if row is None else self.batch.negative[row])
                places.append(None if row is None else self.batch.places[row])
                acting.append(self._acting_in(number if row is None else row))
            self.now = Rows(tuple(negative), places, acting)
        return query, key, value

    def attend(self, block: Block, previous: Attend | None) -> Attend:
        """An ``attn2_replace`` patch around the one that was there."""

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
        ) -> torch.Tensor:
            rows = self._rows_of(q)
            with_text = [all(one.with_text for one in acting) for acting in rows.acting]
            if not any(with_text):
                return self._of(block, rows, q, options)
            text = (previous or plain_attention)(q, k, v, options)
            return _only(text, with_text) + self._of(block, rows, q, options)

        return attend

    def _acting_in(self, row: int) -> Sequence[Beside]:
        """What acts in a row; rows that others have added repeat those of the batch."""
        return self.batch.acting[row % len(self.batch.acting)]

    def _rows_of(self, q: torch.Tensor) -> Rows:
        """What the rows of a layer's queries are."""
        if len(self.now.negative) == len(q):
            return self.now
        # What cannot be told apart is a conditioning.
        acting = [self._acting_in(row) for row in range(len(q))]
        return Rows((False,) * len(q), (None,) * len(q), acting)

    def _of(
        self, block: Block, rows: Rows, q: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """All that is beside the text's attention, once for the same queries.

        Where identities have regions a layer attends once for each part of the picture.
        """
        if self._last is not None and self._last[0] is q:
            return self._last[1]
        total = torch.zeros_like(q)
        for one in self.acting:
            keys, values = self.run.tokens(one, block, rows.negative, q)
            found = plain_attention(q, keys, values, options)
            if one.region is not None:
                found = found * self._plane(one, rows.places, options, q)
            total = total + one.strength * _only(found, [one in acting for acting in rows.acting])
        self._last = q, total
        return total

    def _plane(
        self,
        beside: Beside,
        places: Sequence[Place | None],
        options: dict[str, Any],
        q: torch.Tensor,
    ) -> torch.Tensor:
        """A region's share of each query, (rows, queries, 1)."""
        height, width = options["activations_shape"][-2:]
        key = beside, height, width, tuple(places)
        if key not in self._planes:
            shares = (self.run.share(beside, place)[None] for place in places)
            planes = [resized(share, (height, width))[0] for share in shares]
            self._planes[key] = torch.stack(planes).flatten(1)[..., None].to(q)
        return self._planes[key]


def outer_sample(
    executor: WrapperExecutor, noise: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Begin a run; the guider's options and conditionings live as long as the sampling."""
    guider: Any = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    options.pop(RUN_KEY, None)
    if not options.get(BESIDE_KEY):
        return executor(noise, *args, **kwargs)
    named = [(name, cond) for name, group in guider.conds.items() for cond in group or ()]
    size = noise.shape[-2], noise.shape[-1]
    negative = [_is_negative(name) for name, _ in named]
    contexts = [cond.get("cross_attn") for _, cond in named]
    options[RUN_KEY] = AdapterRun(guider.model_patcher, negative, contexts, size)
    number_conditionings([cond for _, cond in named], PLACES_KEY, len(noise), size)
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
    """Set the patches for this call, if anything acts."""
    given = kwargs.pop(PLACES_KEY, ())
    run: AdapterRun | None = transformer_options.get(RUN_KEY)
    besides = transformer_options.get(BESIDE_KEY, ())
    if run is not None and besides and context is not None:
        of_each = of_rows(levels_in(transformer_options), len(x))
        acting = {sigma: run.acting(besides, sigma) for sigma in dict.fromkeys(of_each)}
        if any(acting.values()):
            of_each_acting = [acting[sigma] for sigma in of_each]
            rows = run.rows(given, x, context, transformer_options, of_each_acting)
            transformer_options = _patched(Addition(run, rows), transformer_options)
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def add_beside(model: ModelPatcher, beside: Beside) -> ModelPatcher:
    """A clone of ``model`` with one more attention beside the text's."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options[BESIDE_KEY] = (*options.get(BESIDE_KEY, ()), beside)
    wrappers: tuple[tuple[str, Callable[..., Any]], ...] = (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.DIFFUSION_MODEL, diffusion_model),
    )
    for kind, wrapper in wrappers:
        clone.remove_wrappers_with_key(kind, WRAPPERS_KEY)
        clone.add_wrapper_with_key(kind, WRAPPERS_KEY, wrapper)
    return clone


def _patched(addition: Addition, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the patches of ``addition``."""
    replaced = options.get("patches_replace", {})
    of_layers = replaced.get(REPLACE, {})
    blocks = {block for one in addition.acting for block in one.layers}
    of_layers = of_layers | {
        block: addition.attend(block, previous_patch(of_layers, block)) for block in blocks
    }
    made = {**options, "patches_replace": {**replaced, REPLACE: of_layers}}
    patches = options.get("patches", {})
    if others := patches.get(PATCH, []):
        made["patches"] = {**patches, PATCH: [addition.before, *others, addition.behind]}
    return made


def _only(rows: torch.Tensor, which: Sequence[bool]) -> torch.Tensor:
    """The rows that are named, and zeros in the place of the others."""
    if all(which):
        return rows
    return rows * rows.new_tensor(which).view(-1, *[1] * (rows.ndim - 1))


def _is_negative(group: str) -> bool:
    """Whether a guider's conditionings of that name are what it leads away from."""
    return any(word in group for word in ("negative", "uncond", "empty"))
