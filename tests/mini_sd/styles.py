"""Ways of drawing one and the same scene: none of them hides who is in it.

Each takes the scene at twice the size of the picture, where every line is still sharp, and draws
it again: with pencil lines and hatching on paper, with strokes of a brush, on the film of an old
camera, or cell by cell in a few colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import SCALE, SIZE

CELLS = 64
"""Cells of pixel art, across."""


def picture_in(
    style: str, scene: Image.Image, heads: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """The picture (128, 128, 3) uint8 of a scene in a style of ``world.STYLE_PHRASES``.

    ``heads`` are the actors' heads, (128, 128) in {0, 255}: a painter takes a finer brush there.
    """
    if style == "photo":
        return np.asarray(scene.reduce(SCALE))
    return _STYLES[style](scene, heads, rng)


def _grey(scene: Image.Image) -> np.ndarray:
    return np.asarray(scene.convert("L"), np.float32)


def _outlines(scene: Image.Image) -> np.ndarray:
    """How much of a line each pixel is, in [0, 1]: where colours meet."""
    colours = np.asarray(scene.filter(ImageFilter.BoxBlur(1)), np.float32)
    steps = sum(
        np.abs(np.roll(colours, 1, axis) - np.roll(colours, -1, axis)).max(axis=-1)
        for axis in (0, 1)
    )
    return np.clip((steps - 18) / 60, 0, 1)


def _pencil(scene, heads, rng) -> np.ndarray:
    """Dark lines where colours meet, hatching where it is dark, the rest is paper."""
    tone = _grey(scene)
    y, x = np.mgrid[: tone.shape[0], : tone.shape[1]]
    paper = 246 + rng.normal(0, 2.5, tone.shape)
    shade = np.clip((205 - tone) / 205, 0, 1) ** 1.4
    strokes = 0.45 + 0.55 * (((x + y) % 6) < 3)
    crossed = 0.45 + 0.55 * (((x - y) % 6) < 3)
    ink = 150 * shade * strokes + 80 * np.clip(shade - 0.5, 0, 1) * crossed
    drawn = np.clip(paper - ink, 0, 255) * (1 - 0.8 * _outlines(scene))
    small = Image.fromarray(drawn.astype(np.uint8)).reduce(SCALE)
    tinted = np.asarray(small, np.float32)[..., None] * (1.0, 0.985, 0.94)
    return tinted.astype(np.uint8)


def _mono(scene, heads, rng) -> np.ndarray:
    """The film of an old camera: grey, hard, grainy, darker in the corners."""
    tone = np.asarray(scene.convert("L").reduce(SCALE), np.float32) / 255
    tone = np.clip(0.56 + 1.15 * (tone - 0.5), 0, 1)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    tone *= 1 - 0.4 * np.clip(x**2 + y**2 - 0.7, 0, 1)
    tone += rng.normal(0, 0.02, tone.shape)
    return np.repeat((255 * np.clip(tone, 0, 1)).astype(np.uint8)[..., None], 3, axis=-1)


# Of each layer of an oil painting: strokes, their width and length, and what they may fall on.
_LAYERS = ((500, 9.0, 22.0, "all"), (900, 4.5, 12.0, "all"), (1500, 2.0, 5.0, "heads"))


def _oil(scene, heads, rng) -> np.ndarray:
    """Strokes of a brush along the shapes, broad ones first, fine ones on the faces."""
    colours = np.asarray(scene, np.float32)
    tone = np.asarray(scene.convert("L").filter(ImageFilter.BoxBlur(3)), np.float32)
    dy, dx = np.gradient(tone)
    canvas = scene.filter(ImageFilter.BoxBlur(6))
    brush = ImageDraw.Draw(canvas)
    side = SCALE * SIZE
    detail = np.zeros((SIZE, SIZE), bool)
    for head in heads:
        detail |= head > 0
    for count, width, length, where in _LAYERS:
        spots = rng.integers(0, side, (count, 2))
        if where == "heads":
            inside = np.argwhere(detail)
            spots = SCALE * inside[rng.integers(len(inside), size=count)]
            spots = np.clip(spots + rng.integers(0, SCALE, spots.shape), 0, side - 1)
        jitter = rng.normal(0, 9 if where == "all" else 4, (count, 1))
        mean = colours[spots[:, 0], spots[:, 1]]
        grey = mean.mean(axis=-1, keepdims=True)
        paint = np.clip(grey + 1.3 * (mean - grey) + jitter + (6, 0, -10), 0, 255).astype(int)
        angles = np.arctan2(dy[spots[:, 0], spots[:, 1]], dx[spots[:, 0], spots[:, 1]]) + np.pi / 2
        flat = np.hypot(dy, dx)[spots[:, 0], spots[:, 1]] < 0.5
        angles[flat] = rng.uniform(0.5, 0.9, int(flat.sum()))
        ends = 0.5 * length * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        for (row, column), (ex, ey), rgb in zip(spots, ends, paint, strict=True):
            brush.line(
                [(column - ex, row - ey), (column + ex, row + ey)],
                fill=tuple(rgb.tolist()),
                width=round(width),
            )
    faces = Image.fromarray((detail * 150).astype(np.uint8)).resize(canvas.size)
    vivid = np.clip((colours - 128) * 1.15 + (136, 128, 118), 0, 255).astype(np.uint8)
    canvas.paste(Image.fromarray(vivid), (0, 0), faces.filter(ImageFilter.BoxBlur(3)))
    return np.asarray(canvas.reduce(SCALE))


def _pixel(scene, heads, rng) -> np.ndarray:
    """Few colours in cells of two pixels, nothing softened, dark outlines around shapes."""
    step = SCALE * SIZE // CELLS
    colours = np.asarray(scene, np.float32)[step // 2 :: step, step // 2 :: step]
    checker = (np.indices((CELLS, CELLS)).sum(axis=0) % 2)[..., None] * 6 - 3
    few = np.round((colours + checker) / 42.5) * 42.5
    lines = np.asarray(Image.fromarray((255 * _outlines(scene)).astype(np.uint8)).reduce(step))
    few[(lines > 120) & (few.mean(axis=-1) < 110)] *= 0.3
    cells = np.clip(few, 0, 255).astype(np.uint8)
    return cells.repeat(SIZE // CELLS, axis=0).repeat(SIZE // CELLS, axis=1)


_STYLES = {"pencil": _pencil, "oil": _oil, "mono": _mono, "pixel": _pixel}
