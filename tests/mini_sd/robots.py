"""Draw robots. Coordinates are pixels of the 128 pixel frame."""

from __future__ import annotations

from . import marks
from .canvas import Canvas, shade
from .world import Actor

ROBOT_RGB = {
    "steel": (150, 162, 176), "gold": (212, 170, 60), "teal": (40, 150, 150),
    "pink": (226, 120, 160), "lime": (140, 196, 60),
}  # fmt: skip


def draw(c: Canvas, masks, actor: Actor, x, y, s, rng) -> None:
    """Draw a robot whose head is around (x, y), ``s`` times as large as usual, and its masks."""
    look = actor.look
    metal = shade(ROBOT_RGB[look.choice("colour")], 1.0 + 0.22 * look.measure("shade"))
    edge = shade(metal, 0.55)
    w, h = s * (21.0 + 3.0 * look.measure("head_width")), s * 22.0
    body = shade(metal, 0.8)
    c.box(x, y + 2.6 * h, 28 * s, 1.3 * h, body, radius=6 * s, outline=edge, width=1.5)
    masks["body"].box(x, y + 2.6 * h, 28 * s, 1.3 * h, 255, radius=6 * s)
    c.box(x, y + 1.15 * h, 0.3 * w, 0.25 * h, edge)
    masks["head"].box(x, y - 0.1 * h, 1.1 * w, 1.2 * h, 255, radius=4)
    antenna = look.choice("antenna")
    spots = {"none": (), "one": (0.0,), "two": (-0.6, 0.6), "ears": ()}[antenna]
    for k in spots:
        tip = x + 1.2 * k * w, y - 1.45 * h, 0.13 * w, 0.13 * w
        c.line([(x + k * w, y - h), (x + 1.2 * k * w, y - 1.42 * h)], edge, 1.6)
        c.ellipse(*tip, (220, 50, 40))
        masks["head"].ellipse(*tip, 255)
    if antenna == "ears":
        for side in (-1, 1):
            ear = x + side * 1.08 * w, y, 0.16 * w, 0.35 * h
            c.box(*ear, edge, radius=2)
            masks["head"].box(*ear, 255, radius=2)
    radius = {"box": 2.5, "dome": 0.95 * w, "barrel": 0.45 * w}[look.choice("head")]
    c.box(x, y, w, h, metal, radius=radius, outline=edge, width=1.6)
    gap, eye = (
        w * (0.42 + 0.08 * look.measure("eye_gap")),
        w * (0.2 + 0.05 * look.measure("eye_size")),
    )
    eye_y, glow = y - 0.22 * h, (250, 240, 150)
    shape = look.choice("eyes")
    if shape == "visor":
        c.box(x, eye_y, 0.78 * w, 1.1 * eye, (26, 28, 36), radius=3)
    for side in (-1, 1):
        ex = x + side * gap
        if actor.eyes_closed:
            c.line(
                [(ex - eye, eye_y), (ex + eye, eye_y)],
                glow if shape == "visor" else (20, 20, 26),
                0.45 * eye,
            )
        elif shape == "squares":
            c.box(ex, eye_y, eye, eye, glow, outline=(20, 20, 26), width=0.3 * eye)
        else:
            c.ellipse(ex, eye_y, eye, eye, glow, outline=(20, 20, 26), width=0.3 * eye)
    marks.draw_on_robot(c, look, x, y, w, h)
    if actor.expression == "surprised":
        for side in (-1, 1):
            c.line(
                [
                    (x + side * (gap - eye), eye_y - 2.1 * eye),
                    (x + side * (gap + eye), eye_y - 2.1 * eye),
                ],
                edge,
                0.4 * eye,
            )
    mouth_w, mouth_y = w * (0.48 + 0.12 * look.measure("mouth_width")), y + 0.5 * h
    dark = (30, 32, 40)
    if actor.expression == "smiling":
        c.arc(x, mouth_y - 0.2 * h, mouth_w, 0.36 * h, 15, 165, dark, 0.13 * w)
    elif actor.expression == "sad":
        c.arc(x, mouth_y + 0.28 * h, mouth_w, 0.36 * h, 195, 345, dark, 0.13 * w)
    elif actor.expression == "surprised":
        c.ellipse(x, mouth_y, 0.4 * mouth_w, 0.22 * h, dark)
    else:
        c.box(x, mouth_y, mouth_w, 0.1 * h, dark)
