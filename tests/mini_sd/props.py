"""The things actors hold, and the hand that holds them."""

from __future__ import annotations


def draw(c, mask, name: str, x: float, y: float, s: float, hand) -> None:
    """Draw an object of ``world.OBJECTS`` around (x, y) at scale s, and its mask."""
    _PROPS[name](c, mask, x, y, s)
    c.ellipse(x, y + 15 * s, 5.5 * s, 4.5 * s, hand)


def _basketball(c, m, x, y, s):
    c.ellipse(x, y, 15 * s, 15 * s, (232, 118, 40), outline=(50, 24, 10), width=1.2)
    c.line([(x - 15 * s, y), (x + 15 * s, y)], (50, 24, 10), 1.3)
    c.line([(x, y - 15 * s), (x, y + 15 * s)], (50, 24, 10), 1.3)
    c.arc(x - 15 * s, y, 9 * s, 12 * s, 290, 70, (50, 24, 10), 1.2)
    c.arc(x + 15 * s, y, 9 * s, 12 * s, 110, 250, (50, 24, 10), 1.2)
    m.ellipse(x, y, 15 * s, 15 * s, 255)


def _book(c, m, x, y, s):
    c.box(x, y, 15 * s, 12 * s, (150, 30, 40), radius=1)
    for side in (-1, 1):
        c.box(x + side * 7 * s, y - 1, 6.4 * s, 10.5 * s, (250, 246, 232))
        for k in (-6, -2, 2, 6):
            c.line(
                [(x + side * 7 * s - 4.5 * s, y + k * s), (x + side * 7 * s + 4.5 * s, y + k * s)],
                (120, 116, 110),
                0.8,
            )
    m.box(x, y, 15 * s, 12 * s, 255)


def _cup(c, m, x, y, s):
    c.ellipse(x + 11 * s, y, 6 * s, 7 * s, None, outline=(245, 245, 250), width=2.4 * s)
    c.box(x, y, 10 * s, 12 * s, (245, 245, 250), radius=3 * s, outline=(120, 124, 140), width=1)
    c.ellipse(x, y - 10 * s, 9 * s, 3 * s, (92, 52, 26))
    m.box(x + 3 * s, y, 14 * s, 13 * s, 255)


def _balloon(c, m, x, y, s):
    y = y - 10 * s
    c.line([(x, y + 14 * s), (x + 2, y + 26 * s)], (70, 70, 70), 1.0)
    c.ellipse(x, y, 13 * s, 16 * s, (226, 36, 60))
    c.ellipse(x - 4 * s, y - 6 * s, 3 * s, 4.5 * s, (255, 170, 180))
    m.ellipse(x, y, 13 * s, 16 * s, 255)


def _flower(c, m, x, y, s):
    c.line([(x, y - 4 * s), (x, y + 16 * s)], (40, 140, 50), 2.2 * s)
    for dx, dy in ((0, -8), (7.6, -2.5), (4.7, 6.5), (-4.7, 6.5), (-7.6, -2.5)):
        c.ellipse(x + dx * s, y + (dy - 5) * s, 5.4 * s, 5.4 * s, (250, 120, 210))
    c.ellipse(x, y - 5 * s, 4.4 * s, 4.4 * s, (255, 220, 60))
    m.ellipse(x, y - 4 * s, 13.5 * s, 13.5 * s, 255)


def _guitar(c, m, x, y, s):
    c.line([(x + 6 * s, y - 4 * s), (x + 18 * s, y - 26 * s)], (90, 56, 30), 3.6 * s)
    c.ellipse(x, y + 5 * s, 12 * s, 10 * s, (206, 138, 56))
    c.ellipse(x + 4 * s, y - 4 * s, 8 * s, 7 * s, (206, 138, 56))
    c.ellipse(x + 2 * s, y + 1 * s, 3.6 * s, 3.6 * s, (40, 24, 12))
    m.ellipse(x, y + 5 * s, 12 * s, 10 * s, 255)
    m.ellipse(x + 4 * s, y - 4 * s, 8 * s, 7 * s, 255)
    m.line([(x + 6 * s, y - 4 * s), (x + 18 * s, y - 26 * s)], 255, 4 * s)


_PROPS = {
    "basketball": _basketball, "book": _book, "cup": _cup, "balloon": _balloon,
    "flower": _flower, "guitar": _guitar,
}  # fmt: skip
