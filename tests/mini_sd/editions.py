"""The two drawn worlds, each with a miniature of its own.

The first one shows a person alone, or two now and then, always drawn the same way: figures of one
person are of it, and both miniatures know it. The second one adds people together at named places,
styles and marks; only the miniature SD 1.x knows it, in ``world_2``. Everything that differs
between them is asked of an ``Edition``. ``WORLD`` in the environment names the one of a process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Edition:
    """One drawn world: what can be in its pictures.

    ``styles`` are the ways of drawing, the first of them unsaid. ``places`` are where someone may
    be. ``shares`` are the shares of training pictures with one, two and three actors. Looks have
    marks where ``marked``.
    """

    number: int
    styles: tuple[str, ...]
    places: tuple[str, ...]
    shares: tuple[float, ...]
    marked: bool


FIRST = Edition(1, ("photo",), ("anywhere", "left", "right"), (0.9, 0.1, 0.0), False)
SECOND = Edition(
    2,
    ("photo", "pencil", "oil", "mono", "pixel"),
    ("anywhere", "left", "right", "middle"),
    (0.55, 0.30, 0.15),
    True,
)
EDITIONS = {str(edition.number): edition for edition in (FIRST, SECOND)}


def _chosen() -> Edition:
    number = os.environ.get("WORLD") or "1"
    if number not in EDITIONS:
        raise SystemExit(f"WORLD is {number}; there are {', '.join(EDITIONS)}.")
    return EDITIONS[number]


EDITION = _chosen()
"""The world of this process."""
