"""The small things by which one knows somebody: freckles, scars, earrings; a robot's badge."""

from __future__ import annotations

from .canvas import Canvas, blend
from .world import Look

# Dots of each patch of freckles, in widths and heights of the face from its middle.
_PATCHES = {
    "nose": ((-0.2, 0.02), (0.2, 0.04), (-0.24, 0.2), (0.26, 0.19), (0.0, -0.04)),
    "left": ((-0.74, 0.14), (-0.5, 0.13), (-0.62, 0.26), (-0.4, 0.27), (-0.8, 0.3), (-0.52, 0.38)),
}
_PATCHES["right"] = tuple((-x, y) for x, y in _PATCHES["left"])
_PATCHES_OF = {
    "none": (), "nose": ("nose",), "cheeks": ("left", "right"), "left": ("left",),
    "right": ("right",),
}  # fmt: skip


def raised(look: Look, side: int) -> float:
    """How much higher than usual a brow is, in heights of the face; ``side`` is -1 or 1."""
    brows = look.mark("brows")
    if brows == "even":
        return 0.0
    return 0.07 if (brows == "left") == (side < 0) else -0.075


def draw_on_face(c: Canvas, look: Look, x, y, w, h, skin) -> None:
    """Freckles and scar of a person whose face is ``w`` by ``h`` around (x, y)."""
    dot = blend(skin, (96, 36, 14) if sum(skin) > 330 else (24, 10, 6), 0.72)
    for patch in _PATCHES_OF[look.mark("freckles")]:
        for px, py in _PATCHES[patch]:
            c.ellipse(x + px * w, y + py * h, 0.065 * w, 0.065 * w, dot)
    scar = look.mark("scar")
    if scar == "none":
        return
    flesh = (255, 214, 214) if sum(skin) < 400 else (176, 26, 52)
    if scar == "nose":
        ends = (x - 0.34 * w, y + 0.09 * h), (x + 0.34 * w, y + 0.09 * h)
        across = (0.0, 0.08 * h)
    else:
        side = -1 if scar == "left" else 1
        ends = (x + side * 0.86 * w, y + 0.08 * h), (x + side * 0.34 * w, y + 0.44 * h)
        across = (0.1 * w, side * 0.08 * h)
    c.line(ends, flesh, 0.1 * w)
    for k in (0.25, 0.5, 0.75):
        px = ends[0][0] + k * (ends[1][0] - ends[0][0])
        py = ends[0][1] + k * (ends[1][1] - ends[0][1])
        c.line(
            [(px - across[0], py - across[1]), (px + across[0], py + across[1])], flesh, 0.06 * w
        )


def draw_earrings(c: Canvas, look: Look, x, y, w, h) -> None:
    """Earrings under the ears, in front of all hair."""
    kind = look.mark("earrings")
    for side in (-1, 1):
        ex, ey = x + side * 1.06 * w, y + 0.3 * h
        if kind == "rings":
            c.ellipse(
                ex, ey + 0.14 * h, 0.2 * w, 0.2 * w, None, outline=(255, 206, 40), width=0.09 * w
            )
        elif kind == "studs":
            c.ellipse(ex, ey, 0.15 * w, 0.15 * w, (245, 250, 255), outline=(40, 60, 90), width=0.6)
        elif kind == "drops":
            c.polygon(
                [
                    (ex, ey - 0.06 * h),
                    (ex - 0.17 * w, ey + 0.32 * h),
                    (ex + 0.17 * w, ey + 0.32 * h),
                ],
                (0, 190, 120),
            )


def draw_on_robot(c: Canvas, look: Look, x, y, w, h) -> None:
    """Badge on a robot's cheek and bolts at the side of its head, ``w`` by ``h`` around (x, y)."""
    badge, ink = look.mark("badge"), (200, 30, 40)
    bx, by, r = x + 0.62 * w, y + 0.2 * h, 0.2 * w
    if badge == "cross":
        c.line([(bx - r, by), (bx + r, by)], ink, 0.12 * w)
        c.line([(bx, by - r), (bx, by + r)], ink, 0.12 * w)
    elif badge == "stripe":
        c.box(x - 0.62 * w, y + 0.1 * h, 0.12 * w, 0.34 * h, ink)
    elif badge == "ring":
        c.ellipse(bx, by, r, r, None, outline=ink, width=0.09 * w)
    bolts = look.mark("bolts")
    if bolts != "none":
        side = -1 if bolts == "left" else 1
        for py in (-0.55, 0.0, 0.55):
            c.ellipse(x + side * 0.86 * w, y + py * h, 0.1 * w, 0.1 * w, (30, 32, 40))
