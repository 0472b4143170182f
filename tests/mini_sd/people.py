"""Draw people. Coordinates are pixels of the 128 pixel frame."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from . import marks
from .canvas import SCALE, Canvas, blend, shade
from .world import Actor

HAIR_RGB = {
    "black": (28, 24, 26), "brown": (104, 66, 36), "blond": (226, 190, 98),
    "red": (178, 70, 28), "grey": (168, 170, 176), "blue": (52, 86, 190),
}  # fmt: skip
IRIS_RGB = {"brown": (84, 50, 22), "blue": (50, 110, 200), "green": (44, 140, 70)}
SKIN_DARK, SKIN_MID, SKIN_LIGHT = (98, 62, 44), (190, 134, 96), (246, 212, 186)


def skin_rgb(tone: float):
    """Skin colour of a tone in [-1, 1], dark to light."""
    return blend(SKIN_MID, SKIN_LIGHT, tone) if tone > 0 else blend(SKIN_MID, SKIN_DARK, -tone)


def draw(c: Canvas, masks, actor: Actor, x, y, s, rng) -> None:
    """Draw a person whose face is around (x, y), ``s`` times as large as usual, and their masks."""
    look = actor.look
    skin = skin_rgb(look.measure("skin"))
    hair = HAIR_RGB[look.choice("hair_colour")]
    style = look.choice("hair")
    w = s * (20.5 + 3.0 * look.measure("face_width"))
    h = s * 26.0
    jaw = 0.62 + 0.2 * look.measure("jaw")  # width of the chin, of the face's
    clothes = tuple(int(v) for v in rng.integers(30, 220, 3))

    # Hair behind the head, body, neck.
    if style == "long":
        c.box(x, y + 0.35 * h, 1.22 * w, 1.18 * h, hair, radius=0.9 * w)
    elif style == "bob":
        c.box(x, y, 1.25 * w, 0.95 * h, hair, radius=0.9 * w)
    elif style == "curly":
        for angle in np.linspace(-0.15 * np.pi, 1.15 * np.pi, 11):
            c.ellipse(
                x + 1.05 * w * np.cos(angle),
                y - 0.12 * h - 0.92 * h * np.sin(angle),
                0.4 * w,
                0.4 * w,
                hair,
            )
    elif style == "bun":
        c.ellipse(x, y - 1.22 * h, 0.5 * w, 0.42 * w, hair)
    elif style == "spiky":
        for k in np.linspace(-0.95, 0.95, 7):
            base = x + k * 0.9 * w
            top = y - h * (1.42 - 0.35 * abs(k))
            c.polygon(
                [
                    (base - 0.3 * w, y - 0.6 * h),
                    (base + 0.3 * w, y - 0.6 * h),
                    (base + 0.18 * w * np.sign(k), top),
                ],
                hair,
            )
    shoulders = [
        (x - 33 * s, 130),
        (x - 29 * s, y + 1.45 * h),
        (x - 9 * s, y + 1.2 * h),
        (x + 9 * s, y + 1.2 * h),
        (x + 29 * s, y + 1.45 * h),
        (x + 33 * s, 130),
    ]
    c.polygon(shoulders, clothes)
    c.box(x, y + 1.05 * h, 0.36 * w, 0.32 * h, shade(skin, 0.8), radius=2)
    masks["body"].polygon(shoulders, 255)
    masks["head"].ellipse(x, y - 0.05 * h, 1.15 * w, 1.12 * h, 255)

    # Ears, skull, jaw.
    for side in (-1, 1):
        c.ellipse(x + side * 0.98 * w, y + 0.08 * h, 0.16 * w, 0.2 * h, shade(skin, 0.86))
    c.ellipse(x, y - 0.18 * h, w, 0.82 * h, skin)
    jaw_line = [
        (x - w, y - 0.18 * h), (x - 0.97 * w, y + 0.28 * h), (x - jaw * w, y + 0.8 * h),
        (x - 0.45 * jaw * w, y + h), (x + 0.45 * jaw * w, y + h), (x + jaw * w, y + 0.8 * h),
        (x + 0.97 * w, y + 0.28 * h), (x + w, y - 0.18 * h),
    ]  # fmt: skip
    c.polygon(jaw_line, skin)
    beard = look.choice("beard")
    beard_rgb = shade(hair, 0.9) if style != "bald" else shade(hair, 0.85)
    if beard == "full":
        c.polygon(
            [
                (x - 0.98 * w, y + 0.22 * h),
                *jaw_line[2:6],
                (x + 0.98 * w, y + 0.22 * h),
                (x + 0.55 * w, y + 0.4 * h),
                (x, y + 0.36 * h),
                (x - 0.55 * w, y + 0.4 * h),
            ],
            beard_rgb,
        )
    _shade_face(c, x, y, w, h, skin, jaw_line)
    if beard == "moustache":
        c.ellipse(x - 0.2 * w, y + 0.44 * h, 0.26 * w, 0.085 * h, beard_rgb)
        c.ellipse(x + 0.2 * w, y + 0.44 * h, 0.26 * w, 0.085 * h, beard_rgb)
    _draw_features(c, actor, x, y, w, h, skin, hair)

    # Hair in front.
    if style != "bald":
        _draw_fringe(c, style, x, y, w, h, hair)
    marks.draw_earrings(c, look, x, y, w, h)


def _draw_fringe(c: Canvas, style: str, x, y, w, h, hair) -> None:
    fringe = {"short": 0.62, "long": 0.6, "bob": 0.36, "curly": 0.6, "bun": 0.66, "spiky": 0.6}[
        style
    ]
    points = [
        (x + 1.08 * w * np.cos(a), y - 0.2 * h - 0.86 * h * np.sin(a))
        for a in np.linspace(0, np.pi, 17)
    ]
    line_y = y - fringe * h
    dip = [
        (x - 0.9 * w, line_y + 0.14 * h),
        (x - 0.35 * w, line_y),
        (x + 0.35 * w, line_y - 0.04 * h),
        (x + 0.9 * w, line_y + 0.14 * h),
    ]
    c.polygon([*points, (x - 1.06 * w, y - 0.05 * h), *dip, (x + 1.06 * w, y - 0.05 * h)], hair)
    c.arc(x, y - 0.2 * h, 0.8 * w, 0.66 * h, 200, 290, shade(hair, 1.25), 0.06 * w)


def _shade_face(c: Canvas, x, y, w, h, skin, jaw_line) -> None:
    """Soft light: eye sockets, sides and under the nose darker, as in a photograph."""
    left, top = int(SCALE * (x - 1.1 * w)), int(SCALE * (y - h))
    size = (int(SCALE * 2.2 * w), int(SCALE * 2.05 * h))
    shadow = Image.new("L", size)
    d = ImageDraw.Draw(shadow)

    def spot(px, py, rx, ry, strength):
        cx, cy = SCALE * (px - x) + size[0] / 2, SCALE * (py - y + h)
        d.ellipse(
            [cx - SCALE * rx, cy - SCALE * ry, cx + SCALE * rx, cy + SCALE * ry], fill=strength
        )

    for side in (-1, 1):
        spot(x + side * 0.44 * w, y - 0.08 * h, 0.42 * w, 0.2 * h, 190)
        spot(x + side * 0.98 * w, y + 0.2 * h, 0.16 * w, 0.7 * h, 90)
    spot(x, y + 0.34 * h, 0.2 * w, 0.06 * h, 120)
    spot(x, y + 0.72 * h, 0.3 * w, 0.05 * h, 90)
    face = Image.new("L", c.image.size)
    outline = Canvas(face)
    outline.ellipse(x, y - 0.18 * h, w, 0.82 * h, 255)
    outline.polygon(jaw_line, 255)
    face = face.crop((left, top, left + size[0], top + size[1]))
    shadow = ImageChops.multiply(shadow.filter(ImageFilter.BoxBlur(SCALE * 1.6)), face)
    c.image.paste(shade(skin, 0.55), (left, top), shadow)


def _draw_features(c: Canvas, actor: Actor, x, y, w, h, skin, hair) -> None:
    look = actor.look
    gap = w * (0.43 + 0.06 * look.measure("eye_gap"))
    eye = w * (0.2 + 0.045 * look.measure("eye_size"))
    eye_y = y - 0.06 * h
    iris = IRIS_RGB[look.choice("eye_colour")]
    dark = (30, 22, 22)
    surprised, sad = actor.expression == "surprised", actor.expression == "sad"
    for side in (-1, 1):
        ex = x + side * gap
        if actor.eyes_closed:
            c.ellipse(ex, eye_y, 1.15 * eye, 0.62 * eye, shade(skin, 0.78))
            c.arc(ex, eye_y - 0.15 * eye, 1.1 * eye, 0.62 * eye, 10, 170, dark, 0.3 * eye)
        else:
            tall = 0.95 if surprised else 0.7
            c.ellipse(
                ex, eye_y, 1.15 * eye, tall * eye, (222, 220, 214), outline=dark, width=0.2 * eye
            )
            c.ellipse(ex, eye_y, 0.62 * eye, 0.64 * eye, iris)
            c.ellipse(ex, eye_y, 0.3 * eye, 0.32 * eye, (8, 8, 10))
        # Brows: own tilt, lifted by surprise, inner ends up when sad.
        lift = 0.11 * h if surprised else 0.03 * h
        tilt = 0.045 * h * look.measure("brow_tilt") + (0.09 * h if sad else 0.0)
        weight = h * (0.058 + 0.026 * look.measure("brow_weight"))
        brow_y = eye_y - 0.23 * h - lift - h * marks.raised(look, side)
        brow = shade(hair, 0.75) if look.choice("hair_colour") != "blond" else shade(hair, 0.62)
        c.line(
            [
                (ex - side * 1.15 * eye, brow_y - tilt),
                (ex, brow_y - 0.03 * h),
                (ex + side * 1.25 * eye, brow_y + tilt),
            ],
            brow,
            weight,
        )

    nose = h * (0.3 + 0.07 * look.measure("nose_length"))
    c.line(
        [(x + 0.02 * w, eye_y + 0.1 * h), (x + 0.1 * w, eye_y + nose), (x - 0.1 * w, eye_y + nose)],
        shade(skin, 0.62),
        0.07 * w,
    )

    mouth_w = w * (0.38 + 0.09 * look.measure("mouth_width"))
    mouth_y = y + 0.6 * h
    lip = blend(shade(skin, 0.6), (196, 40, 60), 0.5 + 0.5 * look.measure("lip_red"))
    if actor.expression == "smiling":
        c.draw.chord(
            [
                SCALE * (x - 1.25 * mouth_w),
                SCALE * (mouth_y - 0.24 * h),
                SCALE * (x + 1.25 * mouth_w),
                SCALE * (mouth_y + 0.17 * h),
            ],
            12,
            168,
            fill=(250, 250, 246),
        )
        c.arc(x, mouth_y - 0.035 * h, 1.25 * mouth_w, 0.205 * h, 10, 170, lip, 0.1 * w)
    elif sad:
        c.arc(x, mouth_y + 0.2 * h, 1.1 * mouth_w, 0.22 * h, 200, 340, lip, 0.12 * w)
    elif surprised:
        c.ellipse(
            x,
            mouth_y + 0.03 * h,
            0.62 * mouth_w,
            0.15 * h,
            (60, 16, 20),
            outline=lip,
            width=0.09 * w,
        )
    else:
        c.ellipse(x, mouth_y, mouth_w, 0.052 * h, lip)
        c.line([(x - mouth_w, mouth_y), (x + mouth_w, mouth_y)], shade(lip, 0.5), 0.04 * w)

    mole = look.choice("mole")
    if mole != "none":
        c.ellipse(
            x + (-0.6 if mole == "left" else 0.6) * w,
            y + 0.36 * h,
            0.085 * w,
            0.085 * w,
            (40, 20, 16),
        )
    marks.draw_on_face(c, look, x, y, w, h, skin)
    glasses = look.choice("glasses")
    if glasses != "none":
        frame = (40, 36, 40)
        for side in (-1, 1):
            if glasses == "round":
                c.ellipse(
                    x + side * gap, eye_y, 0.4 * w, 0.4 * w, None, outline=frame, width=0.06 * w
                )
            else:
                c.box(
                    x + side * gap, eye_y, 0.42 * w, 0.31 * w, None, outline=frame, width=0.065 * w
                )
        c.line([(x - gap + 0.38 * w, eye_y - 1), (x + gap - 0.38 * w, eye_y - 1)], frame, 0.075 * w)
