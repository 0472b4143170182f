"""The contact sheet of ``make bench-people``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sefi_ide.tests.mini_sd import render, world

from .crowds import Crowd, asked, cast_of
from .subjects import Subject

CELL = 160  # pixels
CAPTION = 76  # five lines
LABEL = 120
PROMPTS = 6


def sheet(crowds: Sequence[Sequence[Crowd]], titles: Mapping[str, str]) -> Image.Image:
    """A block for each of ``crowds``, which are the same people in several rows.

    A row has its title, what each looks like (the photo that was learned, or a picture of whom the
    miniature knows by name) and pictures of the first prompts, which stand above.
    """
    count, columns = crowds[0][0].count, min(PROMPTS, crowds[0][0].prompts)
    width = LABEL + (count + columns) * CELL
    height = sum(CAPTION + len(rows) * CELL for rows in crowds)
    paper = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(size=12)
    top = 0
    for rows in crowds:
        for n, shot in enumerate(asked(rows[0])[:columns]):
            left = LABEL + (count + n) * CELL
            text = "\n".join(wrap(shot.caption(), 26))
            draw.multiline_text((left + 4, top + 4), text, "black", font)
        top += CAPTION
        for crowd in rows:
            draw.text((4, top + CELL // 2), "\n".join(wrap(titles[crowd.row], 18)), "black", font)
            pictures = [*_people(crowd), *_drawn(crowd)[:columns]]
            for n, picture in enumerate(pictures):
                paper.paste(picture.resize((CELL, CELL)), (LABEL + n * CELL, top))
            top += CELL
    return paper


def _people(crowd: Crowd) -> list[Image.Image]:
    if crowd.people:
        pictures = [Subject(crowd.seed, n).photos(1)[0].picture.numpy() for n in crowd.people]
        return [Image.fromarray((255 * picture).round().astype(np.uint8)) for picture in pictures]
    shots = [world.solo(look, look.kind) for _, look in cast_of(crowd)]
    return [Image.fromarray(render.render(shot).picture) for shot in shots]


def _drawn(crowd: Crowd) -> list[Image.Image]:
    strip = Image.open(crowd.strip)
    side = strip.height
    return [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
