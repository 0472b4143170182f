"""A picture by formula: a face of ellipses before a plain wall, and what the tests need of it."""

from __future__ import annotations

import numpy as np

Colour = tuple[float, float, float]

# In units of half the picture's side, from its middle: centre and half axes of each ellipse.
PARTS: tuple[tuple[Colour, float, float, float, float], ...] = (
    ((60, 70, 120), 0.0, 1.05, 0.75, 0.5),  # shoulders
    ((190, 140, 110), 0.0, 0.5, 0.16, 0.3),  # neck
    ((50, 35, 25), 0.0, -0.14, 0.44, 0.52),  # hair
    ((215, 165, 135), 0.0, 0.0, 0.36, 0.47),  # face
    ((60, 40, 30), -0.15, -0.17, 0.1, 0.025),  # brows
    ((60, 40, 30), 0.15, -0.17, 0.1, 0.025),
    ((245, 245, 245), -0.15, -0.08, 0.075, 0.04),  # eyes
    ((245, 245, 245), 0.15, -0.08, 0.075, 0.04),
    ((40, 30, 25), -0.15, -0.08, 0.035, 0.04),
    ((40, 30, 25), 0.15, -0.08, 0.035, 0.04),
    ((175, 120, 95), 0.0, 0.08, 0.045, 0.08),  # nose
    ((165, 70, 75), 0.0, 0.25, 0.13, 0.045),  # mouth
)
FACE = (0.0, 0.0, 0.36, 0.47)
FIVE = ((-0.15, -0.08), (0.15, -0.08), (0.0, 0.1), (-0.12, 0.25), (0.12, 0.25))
WALL: Colour = (150, 165, 175)


def drawn(side: int, zoom: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """RGB (side, side, 3), uint8, with the face ``zoom`` times as large and moved to ``centre``."""
    at = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid((at - centre[0]) / zoom, (at - centre[1]) / zoom)
    soft = 2 / side / zoom
    picture = np.zeros((side, side, 3)) + WALL
    for colour, cx, cy, rx, ry in PARTS:
        inside = (1 - np.hypot((x - cx) / rx, (y - cy) / ry)) * min(rx, ry) / soft + 0.5
        cover = np.clip(inside, 0, 1)[..., None]
        picture = picture * (1 - cover) + np.array(colour) * cover
    return picture.round().astype(np.uint8)


def places(side: int, zoom: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """The five points (5, 2) of such a picture, in pixels."""
    return ((np.array(FIVE) * zoom + centre) + 1) / 2 * side
