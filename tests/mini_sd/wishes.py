"""What a picture is asked to show: wishes, and the shots that fulfil them.

A wish maps some of ``scene``, ``object``, ``expression``, ``eyes`` and (in the second world)
``style`` to what is prompted; the attribute judge of ``judges.py`` reads the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from . import render, world

Wish = dict[str, str]

PROMPTABLE: dict[str, tuple[str, ...]] = {
    "scene": world.SCENES[1:],
    "object": world.OBJECTS[1:],
    "expression": world.EXPRESSIONS[1:],
    "eyes": ("closed",),
    **({"style": world.STYLES[1:]} if len(world.STYLES) > 1 else {}),
}


def random_wish(rng: np.random.Generator, count: int | None = None) -> Wish:
    """``count`` prompted attributes, or one to three."""
    count = int(rng.integers(1, 4)) if count is None else count
    chosen = rng.choice(list(PROMPTABLE), size=count, replace=False)
    return {str(name): str(rng.choice(PROMPTABLE[name])) for name in chosen}


def single_wishes() -> Iterator[Wish]:
    """Every attribute's every value alone."""
    for name, values in PROMPTABLE.items():
        for value in values:
            yield {name: value}


def shot_of(look: world.Look, word: str, wish: Wish, seed: int) -> world.Shot:
    """The shot that shows an individual, called ``word``, as wished."""
    shot = world.solo(
        look,
        word,
        seed=seed,
        scene=wish.get("scene", "plain"),
        expression=wish.get("expression", "neutral"),
        eyes_closed=wish.get("eyes") == "closed",
        holds=wish.get("object", "none"),
    )
    return replace(shot, style=wish.get("style", "photo"))


def caption_of(wish: Wish, word: str, kind: str = "person") -> str:
    """The prompt for a wish, in the world's own grammar; ``word`` is how it calls the subject."""
    anyone = world.unseen_look(0, kind)
    return shot_of(anyone, word, wish, seed=0).caption()


def pictures_of(shots: list[world.Shot]) -> torch.Tensor:
    """Renders (B, 128, 128, 3) in [0, 1]."""
    return torch.stack(
        [torch.from_numpy(render.render(s).picture.copy()).float() / 255 for s in shots]
    )
