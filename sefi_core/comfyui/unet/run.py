"""What is known in one sampling: the prompts of each row, and what their contexts become."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ...injection import (
    EVERYWHERE,
    Injection,
    Part,
    Row,
    Segment,
    ShareOf,
    pooled_swapped,
    swapped,
    variants,
)
from ...regions import resized
from ...stages import stage_edges
from ..base_model import model_sampling_of, training_sigmas
from .automatic import READING, Automatic, Reader, crowd_of
from .blending import Blend
from .conditioning import REGISTRY, Known, Marks, find, fingerprints
from .places import Levels, Place, of_rows, rows_in

logger = logging.getLogger(__name__)

KEPT_BATCHES = 8
"""Of contexts that were swapped; windows of frames have many, which take memory on the device."""


class Contexts(NamedTuple):
    """Of keys and of values, (rows, tokens, width) each; with a blend all pieces in one row."""

    keys: torch.Tensor
    values: torch.Tensor
    blend: Blend | None = None


Places = Sequence[Place | None]
"""What of the picture each row is, None where it is not known."""


class Run:
    """What is known in one sampling: ``own`` are the payloads of each conditioning's dict.

    ``size`` is (height, width) of the latents.
    """

    def __init__(
        self, model: ModelPatcher, own: Sequence[Sequence[Known]], size: tuple[int, int]
    ) -> None:
        self.size = size
        self.latents: torch.Tensor | None = None
        """Those of the current step, before they are scaled for the model."""
        self.sampling = model_sampling_of(model)  # nodes may have changed it after Apply
        self.sigmas = training_sigmas(self.sampling, model.model.model_config)
        self.own = own
        self._edges: dict[int, tuple[float, ...]] = {}
        self._injections: dict[Known, Sequence[Injection]] = {}
        self._rows: dict[tuple[int | None, torch.dtype, Marks], Row] = {}
        self._moved: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._shares: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._blends: list[Blend] = []
        self._swapped: dict[tuple[object, ...], tuple[list[int], Contexts]] = {}
        self._told = False
        every = [known for group in own for known in group] + REGISTRY.all()
        self.has_regions = any(
            phase.get("parts") for known in every for phase in known.payload["phases"]
        )
        """Whether a prompt that may come up has identities with regions."""
        self._automatic = None
        if any(known.payload.get("automatic") for known in every):
            self._automatic = Automatic(size, self.sampling.percent_to_sigma(READING))

    def rows(self, contexts: torch.Tensor, numbers: Sequence[int] = ()) -> list[Row]:
        """The known prompts of each row of a batch of contexts (rows, tokens, width).

        ``numbers`` are of the rows' conditionings; where rows were added since, they say nothing.
        """
        marks = fingerprints(contexts)
        known = numbers if len(numbers) == len(marks) else [None] * len(marks)
        return [self._row(*pair, contexts.dtype) for pair in zip(known, marks, strict=True)]

    def places(
        self,
        given: Sequence[Place],
        x: torch.Tensor,
        options: Mapping[str, Any],
        rows: Sequence[Row] = (),
    ) -> Places:
        """What of the picture each row of the U-Net's input is.

        ``given`` are ComfyUI's. Rows that another pack has cut once more, into tiles, are looked
        for in the latents. Where that fails and ``rows`` have regions, the log says so.
        """
        found = rows_in(given, x, self.sampling, self.latents, options["sigmas"])
        regions = any(
            injection.parts for row in rows for segment in row for injection in segment.injections
        )
        if regions and None in found and not self._told:
            self._told = True
            logger.info(
                "SeFi Apply Identity: another node changed the part of the picture that the model "
                "sees, and regions cannot be found in it: there identities act everywhere."
            )
        return found

    def reader(self, rows: Sequence[Row], places: Places, levels: Levels) -> Reader | None:
        """What reads in a call of the U-Net who is where; None where nothing has to be read."""
        if self._automatic is None:
            return None
        of_places = of_rows(levels, len(places))
        readers = [
            self._automatic.begin(
                rows,
                [one if own == level else None for one, own in zip(places, of_places, strict=True)],
                level,
            )
            for level in dict.fromkeys(of_places)
        ]
        wanted = [one for reader in readers if reader is not None for one in reader.wanted]
        return Reader(wanted, len(rows), self.size) if wanted else None

    def swap(
        self, contexts: torch.Tensor, rows: Sequence[Row], levels: Levels, places: Places = ()
    ) -> Contexts | None:
        """The contexts of keys and values at noise levels, None where they are not changed.

        ``rows`` are the known prompts in them; without their ``places`` there are no regions. Most
        batches of a sampling are alike, and made once.
        """
        of_each = of_rows(levels, len(rows))
        acting = [
            segment.at(sigma) for row, sigma in zip(rows, of_each, strict=True) for segment in row
        ]
        if not any(acting):
            return None
        # A row is one object for each context, so that its id tells the context.
        batch = contexts.device, contexts.dtype, tuple(map(id, rows)), tuple(places)
        state = [*map(id, acting), self._automatic.found if self._automatic else 0]
        if batch not in self._swapped or self._swapped[batch][0] != state:
            while len(self._swapped) >= KEPT_BATCHES:
                del self._swapped[next(iter(self._swapped))]
            found = self._contexts(contexts, rows, of_each, places or [None] * len(rows))
            self._swapped[batch] = state, found
        return self._swapped[batch][1]

    def swap_pooled(
        self, vectors: torch.Tensor, rows: Sequence[Row], levels: Levels, places: Places
    ) -> torch.Tensor:
        """The vectors (rows, width) of a batch, which begin with the prompts' pooled outputs."""
        parts = [
            pooled_swapped(
                vector,
                row,
                sigma,
                lambda tensor: self._on_device_of(vectors, tensor),
                self._share_at(place),
            )
            for vector, row, sigma, place in zip(
                vectors.split(1),
                rows,
                of_rows(levels, len(rows)),
                places or [None] * len(rows),
                strict=True,
            )
        ]
        return torch.cat(parts)

    def _contexts(
        self,
        contexts: torch.Tensor,
        rows: Sequence[Row],
        levels: Sequence[float],
        places: Places,
    ) -> Contexts:
        """What :meth:`swap` keeps; a row with fewer parts than another repeats its first."""
        parts = []
        for row, sigma, place in zip(rows, levels, places, strict=True):
            share_of = self._share_at(place)
            parts.append(variants(row, sigma, share_of) if share_of else [(EVERYWHERE, None)])
        count = max(map(len, parts))
        pieces: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        indices = []
        for context, row, sigma, of_row in zip(contexts.split(1), rows, levels, parts, strict=True):
            acting = [id(segment.at(sigma)) for segment in row]
            names = [(id(row), *acting, *map(id, choice.values())) for choice, _ in of_row]
            for name, (choice, _) in zip(names, of_row, strict=True):
                if name not in pieces:
                    moved = partial(self._on_device_of, contexts)
                    pieces[name] = swapped(context, row, sigma, moved, choice)
            numbers = [list(pieces).index(name) for name in names]
            indices.append(numbers + numbers[:1] * (count - len(numbers)))
        keys, values = zip(*pieces.values(), strict=True)
        if count == 1:
            of_rows = [index for (index,) in indices]
            return Contexts(
                torch.cat([keys[n] for n in of_rows]), torch.cat([values[n] for n in of_rows])
            )
        size = next(share.shape for of_row in parts for _, share in of_row if share is not None)
        shares = torch.zeros(count, len(rows), *size)
        for number, of_row in enumerate(parts):
            for part, (_, share) in enumerate(of_row):
                shares[part, number] = 1.0 if share is None else share
        blend = self._blend(shares, torch.tensor(indices).T, len(pieces))
        return Contexts(torch.cat(keys, dim=1), torch.cat(values, dim=1), blend)

    def _blend(self, shares: torch.Tensor, indices: torch.Tensor, pieces: int) -> Blend:
        """A blend of these; that of another stage, whose contexts alone are others, serves."""
        for blend in self._blends:
            if torch.equal(blend.shares, shares) and torch.equal(blend.indices.cpu(), indices):
                return blend
        self._blends = [*self._blends[1 - KEPT_BATCHES :], Blend(shares, indices, pieces)]
        return self._blends[-1]

    def _share_at(self, place: Place | None) -> ShareOf | None:
        """What gives the shares of what a row sees."""
        if place is None:
            return None

        def share_of(injection: Injection, part: Part) -> torch.Tensor:
            # Parts of all stages have the same shares.
            if id(part.share) not in self._shares:
                self._shares[id(part.share)] = part.share, resized(part.share, self.size)
            shares = self._shares[id(part.share)][1]
            rows = slice(place.top, place.top + place.height)
            columns = slice(place.left, place.left + place.width)
            share = shares[place.latent % len(shares)]
            if self._automatic and injection.crowd and part.person is not None:
                share = share * self._automatic.share(injection.crowd, part.person, place)
            return share[rows, columns]

        return share_of

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
            crowd = crowd_of(known.payload)
            for phase in known.payload["phases"]:
                lowest = self.sampling.percent_to_sigma(phase["end_percent"])
                highest = self.sampling.percent_to_sigma(phase["start_percent"])
                for stage, stages in phase["stages"]:
                    edges = (float("-inf"), *self._edges_of(stages), float("inf"))
                    lowest, highest = max(lowest, edges[stage]), min(highest, edges[stage + 1])
                parts = [
                    Part(
                        part["key"],
                        part["value"],
                        part["pooled"],
                        part["share"],
                        part.get("person"),
                    )
                    for part in phase.get("parts", ())
                ]
                contexts = phase["key"], phase["value"], phase.get("pooled")
                injections.append(Injection(lowest, highest, *contexts, parts, crowd))
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
