"""Draw a ``Shot`` as a 128 pixel picture, and tell where in it everything is.

Coordinates are pixels of the 128 pixel frame; drawing happens at twice that size and is
averaged down. Unsaid details (clothes, where clouds are) come from the shot's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import backdrops, people, props, robots, styles
from .canvas import SCALE, SIZE, Canvas
from .world import Actor, Shot

REGIONS = ("head", "body", "object")


@dataclass(frozen=True)
class Rendering:
    """``picture`` (128, 128, 3) uint8; ``regions`` one entry per actor, each a dict of
    masks (128, 128) uint8 in {0, 255} for ``REGIONS``."""

    picture: np.ndarray
    regions: tuple[dict[str, np.ndarray], ...]


def render(shot: Shot) -> Rendering:
    """Draw a shot. The same shot gives the same picture, bit for bit."""
    rng = np.random.default_rng(shot.seed)
    image = Image.new("RGB", (SCALE * SIZE, SCALE * SIZE))
    backdrops.draw(Canvas(image), shot.scene, rng)
    regions = []
    for actor in shot.actors:
        masks = {name: Canvas(Image.new("L", image.size)) for name in REGIONS}
        _draw_actor(image, masks, actor, len(shot.actors), rng)
        regions.append({n: np.asarray(m.image.reduce(SCALE)) for n, m in masks.items()})
    heads = [r["head"] for r in regions]
    return Rendering(styles.picture_in(shot.style, image, heads, rng), tuple(regions))


# Where someone is, by how many there are and the place; how large, and how far from there at most.
_ACROSS = {
    1: {"left": 40.0, "right": 88.0, "anywhere": 64.0, "middle": 64.0},
    2: {"left": 33.0, "right": 95.0},
    3: {"left": 21.5, "middle": 64.0, "right": 106.5},
}
_SCALES = {1: (1.22, 1.46), 2: (0.98, 1.08), 3: (0.76, 0.82)}
_SPREADS = {1: 3.0, 2: 2.0, 3: 1.2}


def _draw_actor(image, masks, actor: Actor, count: int, rng) -> None:
    scale = rng.uniform(*_SCALES[count])
    spread = 7.0 if actor.place == "anywhere" else _SPREADS[count]
    x = _ACROSS[count][actor.place] + rng.uniform(-spread, spread)
    y = 56.0 + rng.uniform(-3.0, 3.0)
    canvas = Canvas(image)
    person = actor.look.kind == "person"
    draw = people.draw if person else robots.draw
    draw(canvas, masks, actor, x, y, scale, rng)
    if actor.holds == "none":
        return
    if count == 1:
        anywhere = actor.place in ("anywhere", "middle")
        side = -1.0 if actor.place == "right" or (anywhere and rng.random() < 0.5) else 1.0
    else:
        side = 1.0 if actor.place == "right" else -1.0
    hand = people.skin_rgb(actor.look.measure("skin")) if person else (90, 94, 104)
    if count == 3:  # before the chest: there is no room beside it
        props.draw(canvas, masks["object"], actor.holds, x, 107.0, 0.82, hand)
        return
    hold_x = min(max(x + side * 27 * scale, 18), SIZE - 18)
    props.draw(canvas, masks["object"], actor.holds, hold_x, 107.0, 1.05, hand)
