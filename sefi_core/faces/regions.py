"""Shapes around a face, and masks of them."""

from __future__ import annotations

from math import ceil, cos, radians, sin
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull

from .face import Face

REGIONS = ("face", "head", "oval")

# Proportions of a head, in heights of the face as detectors box it: those that overlap best with
# the heads drawn by hand in tests/photos/heads.json (0.79; what anatomy says, 0.67).
HAIR_ABOVE = 0.35
HAIR_BESIDE = 0.12
BELOW_CHIN = 0.03
# Brows to hairline, in distances from the brows to the chin: the rule of thirds gives 1/2; less,
# because landmarks sit at the lower edge of the brows.
FOREHEAD = 0.45

MOST_CELLS = 1024
ROWS_AT_ONCE = 64

_TURN = np.linspace(0, 2 * np.pi, 96, endpoint=False)


def outline(face: Face, region: str) -> np.ndarray:
    """The polygon (points, 2) of a region of :data:`REGIONS` around ``face``, in pixels.

    - ``oval``: the ellipse of the face, from hairline to chin.
    - ``face``: with landmarks their hull, and a forehead above it; without, an egg that narrows
      towards the chin.
    - ``head``: an ellipse with the hair of an ordinary hair style, ears and chin.
    """
    x, y = np.cos(_TURN), np.sin(_TURN)
    if region == "head":
        top, bottom = -0.5 - HAIR_ABOVE, 0.5 + BELOW_CHIN
        x = x * (face.width / 2 + HAIR_BESIDE * face.height)
        y = (y * (bottom - top) / 2 + (top + bottom) / 2) * face.height
        return _turned(np.stack([x, y], 1), face)
    if region == "face" and face.landmarks is not None:
        return _hull_with_forehead(face, face.landmarks)
    narrowing = 1 - 0.15 * y if region == "face" else 1
    return _turned(np.stack([x * narrowing * face.width / 2, y * face.height / 2], 1), face)


class Region(NamedTuple):
    """A shape on a grid of its own: ``inside`` (rows, columns) says which cells are in it.

    The grid's corner is ``left`` and ``top`` pixels from the picture's, and a cell is ``step``
    pixels wide and high. Large shapes have large cells, so that none costs more than a small one.
    """

    inside: np.ndarray
    left: int
    top: int
    step: int


def region_of(face: Face, region: str) -> Region:
    """A region of :data:`REGIONS` as :func:`outline` draws it."""
    points = outline(face, region)
    left, top = (int(v) for v in np.floor(points.min(0)))
    size = np.ceil(points.max(0)).astype(int) - (left, top) + 1
    step = cell_size(int(size.max()))
    tile = Image.new("L", (-(-int(size[0]) // step), -(-int(size[1]) // step)))
    ImageDraw.Draw(tile).polygon([tuple(p) for p in (points - (left, top)) / step], fill=1)
    return Region(np.asarray(tile, bool), left, top, step)


def cell_size(side: int) -> int:
    """Pixels of a cell in the grid of a shape that is ``side`` pixels wide or high."""
    return max(1, -(-side // MOST_CELLS))


def paint(region: Region, mask: torch.Tensor, grow: float = 0, feather: float = 0) -> None:
    """Put a region into a mask (height, width) of floats, where it is more than what is there.

    The outline is moved outwards by ``grow`` pixels (inwards if negative), and the mask falls from
    1 to 0 over ``feather`` pixels, half of them inside the outline and half outside.
    """
    if not region.inside.any():
        return
    step = region.step
    reach = ceil((max(grow, 0) + feather / 2) / step) + 2
    # All of the shape and of its surroundings: the distances need the whole outline.
    inside = np.pad(region.inside, reach)
    distance = np.asarray(distance_transform_edt(inside), np.float32)
    distance -= np.asarray(distance_transform_edt(~inside), np.float32)
    distance -= np.sign(distance) / 2  # to the outline, not to the next cell's centre
    soft = torch.from_numpy(np.clip(0.5 + (distance * step + grow) / max(feather, 1), 0, 1))
    left, top = region.left - reach * step, region.top - reach * step
    for row in range(0, len(soft), ROWS_AT_ONCE):
        above = min(row, 1)
        cells = soft[row - above : row + ROWS_AT_ONCE + 1]
        if step > 1:
            cells = F.interpolate(cells[None, None], scale_factor=step, mode="bilinear")[0, 0]
        _put(cells[above * step : (above + ROWS_AT_ONCE) * step], mask, left, top + row * step)


def region_mask(
    face: Face, region: str, size: tuple[int, int], grow: float = 0, feather: float = 0
) -> np.ndarray:
    """A drawn region as a mask (height, width), float32 in [0, 1]; see :func:`paint`."""
    mask = torch.zeros(size)
    paint(region_of(face, region), mask, grow, feather)
    return mask.numpy()


def _put(cells: torch.Tensor, mask: torch.Tensor, left: int, top: int) -> None:
    """Put a rectangle into a mask, where it is more; outside of the mask there is nothing."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + cells.shape[0], mask.shape[0]), min(left + cells.shape[1], mask.shape[1])
    if y0 < y1 and x0 < x1:
        there = mask[y0:y1, x0:x1]
        torch.maximum(there, cells[y0 - top : y1 - top, x0 - left : x1 - left], out=there)


def _turned(points: np.ndarray, face: Face) -> np.ndarray:
    """Points of the upright face, relative to its centre, as points of the picture."""
    c, s = cos(radians(face.roll)), sin(radians(face.roll))
    return points @ np.array([[c, s], [-s, c]]) + face.center


def _hull_with_forehead(face: Face, landmarks: np.ndarray) -> np.ndarray:
    c, s = cos(radians(face.roll)), sin(radians(face.roll))
    upright = (landmarks - face.center) @ np.array([[c, -s], [s, c]])
    (left, brows), (right, chin) = upright.min(0), upright.max(0)
    arc = _TURN[len(_TURN) // 2 :]  # the upper half, as y grows downwards
    forehead = np.stack(
        [
            (left + right) / 2 + np.cos(arc) * (right - left) / 2,
            brows + np.sin(arc) * FOREHEAD * (chin - brows),
        ],
        1,
    )
    points = np.concatenate([upright, forehead])
    return _turned(points[ConvexHull(points).vertices], face)
