"""Regions that nobody has painted: who is where, read from the cross-attention as it begins.

In the first steps, while the layout is made, all identities act everywhere, and the maps of each
placeholder's own tokens are added up. At the first noise level below these steps the picture is
divided among the people (:mod:`sefi_core.dividing`), and stays so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ...attention.maps import attention_probabilities
from ...dividing import divided
from ...injection import Crowd, Row
from ...regions import resized
from .capture import Layer
from .places import Place

logger = logging.getLogger(__name__)

READING = 0.1
"""The share of the sampling in which it is read who is where."""


class _Reading:
    """The maps of one picture's people: their sum (people, height, width) in latent cells."""

    def __init__(self, crowd: Crowd, first: float) -> None:
        self.crowd, self.first = crowd, first
        self.sum: torch.Tensor | None = None
        self.read: set[tuple[float, Place]] = set()
        self.shares: torch.Tensor | None = None
        self.done = False


class _Wanted(NamedTuple):
    """A row of the batch that is read: its number, where, and the tokens of each person."""

    row: int
    place: Place
    reading: _Reading
    columns: Sequence[Sequence[int]]


class Automatic:
    """Who is where in the pictures of one sampling.

    ``size`` is that of the latents, ``until`` the noise level at which reading ends. A sampling
    that begins below it reads at its first noise level. Everything goes by noise levels: how often
    a sampler asks the model at one of them makes no difference.
    """

    def __init__(self, size: tuple[int, int], until: float) -> None:
        self.size, self.until = size, until
        self.found = 0
        """Of how many pictures it is known by now; what was made before is then out of date."""
        self._readings: dict[tuple[int, Crowd, int], _Reading] = {}
        self._told = False

    def begin(
        self, rows: Sequence[Row], places: Sequence[Place | None], sigma: float
    ) -> Reader | None:
        """Begin a call of the U-Net: what reads in it, None where nothing has to be read."""
        wanted = []
        for number, (row, place) in enumerate(zip(rows, places, strict=False)):
            if place is None:
                continue
            for crowd, columns in _columns(row, sigma).items():
                key = place.number, crowd, place.latent
                reading = self._readings.setdefault(key, _Reading(crowd, sigma))
                if reading.done:
                    continue
                if sigma < min(self.until, reading.first):
                    self._finish(reading, place.latent)
                elif (sigma, place) not in reading.read:
                    reading.read.add((sigma, place))
                    wanted.append(_Wanted(number, place, reading, columns))
        return Reader(wanted, len(rows), self.size) if wanted else None

    def share(self, crowd: Crowd, person: str, place: Place) -> torch.Tensor | float:
        """How much of each latent cell of a picture (height, width) is somebody's.

        As long as that is not known, all of it is everybody's together, whose name is "".
        """
        reading = self._readings.get((place.number, crowd, place.latent))
        if reading is None or reading.shares is None:
            return float(person == "")
        return reading.shares[list(crowd.columns).index(person)] if person else 0.0

    def _finish(self, reading: _Reading, picture: int) -> None:
        reading.done = True
        names = " and ".join(f"<{name}>" for name in reading.crowd.columns)
        if reading.sum is None:
            if not self._told:
                logger.info(
                    "SeFi Apply Identity: where %s are cannot be read, since another node has "
                    "changed what the model attends to: they act everywhere.",
                    names,
                )
            self._told = True
            return
        self.found += 1
        reading.shares = divided(reading.sum.cpu())
        if picture:  # a batch may have many
            return
        logger.info(
            "SeFi Apply Identity: %s share the picture: %s",
            names,
            ", ".join(
                f"{100 * float(share.mean()):.0f} % about {_middle(share)}"
                for share in reading.shares
            ),
        )


class Reader:
    """Reads who is where in one call of the U-Net, whose batch has so many ``rows``."""

    def __init__(self, wanted: Sequence[_Wanted], rows: int, size: tuple[int, int]) -> None:
        self.wanted, self.rows, self.size = wanted, rows, size

    def look(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add a layer's maps to those of its pictures; see :data:`capture.Look`."""
        if len(q) != self.rows:
            return
        for one in self.wanted:
            row = slice(one.row, one.row + 1)
            attention = attention_probabilities(q[row], k[row], layer.heads).mean(1)
            share = layer.share.of_queries
            if isinstance(share, torch.Tensor):
                attention = attention * share[row]
            maps = torch.stack([attention[0][:, columns].sum(-1) for columns in one.columns])
            place, reading = one.place, one.reading
            planes = resized(maps.unflatten(1, layer.size), (place.height, place.width))
            if reading.sum is None:
                reading.sum = planes.new_zeros(len(planes), *self.size)
            rows = slice(place.top, place.top + place.height)
            reading.sum[:, rows, place.left : place.left + place.width] += planes


def _columns(row: Row, sigma: float) -> dict[Crowd, list[list[int]]]:
    """The tokens of each person of the crowds in a row; a prompt may stand in it twice."""
    columns: dict[Crowd, list[list[int]]] = {}
    for segment in row:
        injection = segment.at(sigma)
        if injection and injection.crowd:
            of_prompt = injection.crowd.columns.values()
            found = columns.setdefault(injection.crowd, [[] for _ in of_prompt])
            for mine, places in zip(found, of_prompt, strict=True):
                # Of SDXL's two texts the context may end with the shorter one.
                mine += [
                    column for place in places if (column := segment.start + place) < segment.end
                ]
    return columns


def _middle(share: torch.Tensor) -> str:
    """The middle of somebody's part in percent of the picture, for the log."""
    rows, columns = (torch.linspace(0, 100, count) for count in share.shape)
    total = share.sum()
    x, y = (share.sum(0) * columns).sum() / total, (share.sum(1) * rows).sum() / total
    return f"({float(x):.0f}, {float(y):.0f})"


def crowd_of(payload: Mapping[str, object]) -> Crowd | None:
    """Those of a payload who share the picture, None where nobody does."""
    columns = payload.get("automatic")
    return Crowd(columns) if isinstance(columns, Mapping) else None
