"""The scenes behind the actors. Each takes the canvas and the shot's random generator."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZE = 128


def draw(c, scene: str, rng: np.random.Generator) -> None:
    """Fill the whole canvas with a scene of ``world.SCENES``."""
    _SCENES[scene](c, rng)


def _gradient(c, top, bottom) -> None:
    t = np.linspace(0, 1, c.image.height)[:, None, None]
    rows = (1 - t) * np.array(top) + t * np.array(bottom)
    c.image.paste(
        Image.fromarray(np.broadcast_to(rows, (c.image.height, c.image.width, 3)).astype(np.uint8))
    )


def _plain(c, rng):
    base = rng.integers(90, 220, 3)
    _gradient(c, base, base * 0.8)


def _eiffel(c, rng):
    _gradient(c, (120, 180, 240), (220, 236, 250))
    c.box(64, 122, 70, 14, (110, 160, 84))
    iron = (110, 82, 58)
    for x in (18 + rng.uniform(-3, 3), 110 + rng.uniform(-3, 3)):
        c.polygon([(x - 17, 112), (x - 8, 112), (x, 40), (x - 2.5, 40)], iron)
        c.polygon([(x + 17, 112), (x + 8, 112), (x, 40), (x + 2.5, 40)], iron)
        c.polygon([(x - 2, 60), (x + 2, 60), (x, 6)], iron)
        for y, w in ((88, 12), (66, 7), (46, 4)):
            c.box(x, y, w, 2, iron)


def _beach(c, rng):
    _gradient(c, (90, 190, 250), (200, 236, 250))
    c.box(64, 86, 70, 16, (28, 120, 190))
    for y in (78, 88, 96):
        c.line([(x, y + 2 * np.sin(x / 6 + y)) for x in range(0, 129, 4)], (150, 210, 240), 1.2)
    c.box(64, 118, 70, 17, (240, 216, 150))
    c.ellipse(rng.uniform(14, 30), 20, 10, 10, (255, 232, 90))


def _forest(c, rng):
    _gradient(c, (60, 110, 60), (30, 70, 36))
    for x in np.linspace(4, 124, 7) + rng.uniform(-4, 4, 7):
        c.box(x, 84, 3, 46, (82, 54, 32))
        for y in (50, 32, 14):
            c.polygon(
                [(x - 13, y + 22), (x + 13, y + 22), (x, y - 10)],
                (22, 92, 40) if y != 32 else (34, 116, 52),
            )


def _snow(c, rng):
    _gradient(c, (170, 194, 220), (214, 226, 238))
    for x, h in ((10, 58), (58, 80), (112, 66)):
        c.polygon([(x - 48, 116), (x, 100 - h), (x + 48, 116)], (124, 142, 170))
        c.polygon(
            [(x - 14, 100 - h * 0.72), (x, 100 - h), (x + 14, 100 - h * 0.72)], (250, 252, 255)
        )
    c.box(64, 122, 70, 18, (246, 250, 255))
    for _ in range(26):
        c.ellipse(rng.uniform(0, 128), rng.uniform(0, 128), 1.6, 1.6, (255, 255, 255))


def _city(c, rng):
    _gradient(c, (14, 16, 50), (50, 36, 86))
    for i, x in enumerate(np.linspace(6, 122, 7)):
        top = rng.uniform(18, 52)
        c.box(x, (top + 128) / 2, 9, (128 - top) / 2, (26, 28, 44) if i % 2 else (40, 40, 60))
        for y in np.arange(top + 6, 120, 9):
            for dx in (-4, 4):
                if rng.random() < 0.75:
                    c.box(x + dx, y, 1.8, 2.4, (255, 220, 110))


def _desert(c, rng):
    _gradient(c, (250, 176, 90), (255, 226, 160))
    c.ellipse(30, 128, 70, 40, (222, 158, 80))
    c.ellipse(100, 134, 70, 44, (206, 138, 62))
    for x in (14 + rng.uniform(-4, 4), 114 + rng.uniform(-4, 4)):
        c.box(x, 78, 4, 26, (46, 120, 60), radius=4)
        c.box(x - 8, 70, 2.6, 9, (46, 120, 60), radius=2.5)
        c.box(x + 8, 76, 2.6, 9, (46, 120, 60), radius=2.5)


def _space(c, rng):
    _gradient(c, (6, 6, 18), (14, 8, 34))
    for _ in range(40):
        r = rng.uniform(0.5, 1.4)
        c.ellipse(rng.uniform(0, 128), rng.uniform(0, 128), r, r, (255, 255, 255))
    c.ellipse(18, 26 + rng.uniform(-4, 4), 13, 13, (214, 120, 70))
    c.ellipse(110, 84 + rng.uniform(-6, 6), 17, 17, (90, 130, 220))
    c.ellipse(110, 84, 25, 4, None, outline=(230, 220, 180), width=1.6)


def _garage(c, rng):
    _gradient(c, (176, 96, 76), (160, 84, 66))
    for y in range(4, 128, 8):
        c.line([(0, y), (128, y)], (206, 150, 130), 0.8)
    shift = rng.uniform(-3, 3)
    c.box(64 + shift, 80, 54, 60, (235, 236, 238))
    for y in range(28, 128, 12):
        c.line([(10 + shift, y), (118 + shift, y)], (140, 146, 156), 1.6)


_SCENES = {
    "plain": _plain, "eiffel": _eiffel, "beach": _beach, "forest": _forest, "snow": _snow,
    "city": _city, "desert": _desert, "space": _space, "garage": _garage,
}  # fmt: skip
