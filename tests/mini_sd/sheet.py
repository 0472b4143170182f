"""``python tests/mini_sd/sheet.py``: the drawn world on one sheet, ``output/world.png``.

Rows: looks with all their marks, styles of one and the same person, two people, three people.
"""

from __future__ import annotations

# ruff: noqa: E402
import runpy
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

if __name__ == "__main__":  # as a file, whose package is still to be found
    __package__ = "sefi_ide.tests.mini_sd"
    runpy.run_path(str(REPOSITORY / "tools" / "comfyui.py"))["name_the_pack"]()

import numpy as np
from PIL import Image

from . import render, world
from .editions import SECOND

COLUMNS = 10


def shots() -> list[world.Shot]:
    """What is on the sheet, row by row."""
    rows = []
    for first, kind in ((0, "person"), (10, "person"), (0, "robot")):
        looks = [world.unseen_look(first + n, kind, SECOND) for n in range(COLUMNS)]
        rows += [world.solo(look, kind, seed=n) for n, look in enumerate(looks)]
    styles = SECOND.styles
    for n in range(2):
        for person in (2, 5):
            shot = world.solo(
                world.unseen_look(20 + person, "person", SECOND), "person", seed=person,
                scene=("beach", "city")[n], holds=("cup", "guitar")[n],
                expression=("smiling", "sad")[n],
            )  # fmt: skip
            rows += [replace(shot, style=style) for style in styles]
    rng = np.random.default_rng(3)

    def cast(rng, kind):
        return kind, world.random_look(rng, kind, SECOND)

    for shares in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        rows += [world.random_shot(rng, cast, shares, SECOND) for _ in range(2 * COLUMNS)]
    return rows


def main() -> None:
    pictures = [render.render(shot).picture for shot in shots()]
    rows = [np.concatenate(pictures[n : n + COLUMNS], 1) for n in range(0, len(pictures), COLUMNS)]
    path = REPOSITORY / "output" / "world.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
