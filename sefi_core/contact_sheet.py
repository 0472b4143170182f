"""Small pictures in rows, each with a line of words below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .faces.face import Face
from .faces.regions import outline
from .images import float_tensor

CELL, STRIP, GAP = 256, 30, 8
"""Side of a picture, height of its words and space between, in pixels."""
MOST_COLUMNS = 8
_PAPER, _INK, _PALE, _LINE = "white", "black", (150, 150, 150), (255, 210, 0)


@dataclass(frozen=True)
class Entry:
    """A picture (height, width, 3), uint8, its words, and the face that is marked in it."""

    picture: np.ndarray
    words: str
    face: Face | None = None
    faint: bool = False
    """Whether the words are pale, as of what is left out."""


def contact_sheet(entries: Sequence[Entry]) -> torch.Tensor:
    """The entries from left to right and from top to bottom, (height, width, 3) in [0, 1].

    A picture is made to fit its cell; around the face it has an ellipse.
    """
    columns = min(MOST_COLUMNS, ceil(sqrt(len(entries))))
    rows = ceil(len(entries) / columns)
    across, down = CELL + GAP, CELL + STRIP + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + rows * down), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, entry in enumerate(entries):
        row, column = divmod(number, columns)
        left, top = GAP + column * across, GAP + row * down
        small = _fitted(entry)
        sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        words = entry.words
        while draw.textlength(words, font) > CELL:
            words = words.removesuffix("…")[:-1] + "…"
        place = (left + CELL / 2, top + CELL + STRIP / 2)
        draw.text(place, words, _PALE if entry.faint else _INK, font, anchor="mm")
    return float_tensor(sheet)


def _fitted(entry: Entry) -> Image.Image:
    picture = Image.fromarray(entry.picture)
    scale = CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    if entry.face is not None:
        points = [tuple(point) for point in outline(entry.face, "oval") * scale]
        ImageDraw.Draw(small).line([*points, points[0]], fill=_LINE, width=2)
    return small
