"""Shapes around a face, and masks of them."""

from __future__ import annotations

from math import ceil, cos, radians, sin

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull

from .face import Face

REGIONS = ("face", "head", "oval")

# Proportions of an adult head, in heights of the face (hairline to chin).
HAIR_ABOVE = 0.4
HAIR_BESIDE = 0.28
BELOW_CHIN = 0.08
# Brows to hairline, in distances from the brows to the chin: the rule of thirds gives 1/2; less,
# because landmarks sit at the lower edge of the brows.
FOREHEAD = 0.45

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


def region_mask(
    face: Face, region: str, size: tuple[int, int], grow: float = 0, feather: float = 0
) -> np.ndarray:
    """The region as a mask (height, width), float32 in [0, 1].

    The outline is moved outwards by ``grow`` pixels (inwards if negative), and the mask falls from
    1 to 0 over ``feather`` pixels, half of them inside the outline and half outside.
    """
    height, width = size
    mask = np.zeros(size, np.float32)
    points = outline(face, region)
    reach = ceil(max(grow, 0) + feather / 2) + 2
    left, top = np.floor(points.min(0)).astype(int) - reach
    right, bottom = np.ceil(points.max(0)).astype(int) + reach
    # Only the surroundings of the face, but all of them: the distances need the whole outline.
    tile = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(tile).polygon([tuple(p) for p in points - (left, top)], fill=1)
    inside = np.asarray(tile, bool)
    if not inside.any():
        return mask
    distance = np.asarray(distance_transform_edt(inside))
    distance = distance - np.asarray(distance_transform_edt(~inside))
    distance -= np.sign(distance) / 2  # to the outline, not to the next pixel's centre
    soft = np.clip(0.5 + (distance + grow) / max(feather, 1), 0, 1)
    y0, y1, x0, x1 = max(top, 0), min(bottom, height), max(left, 0), min(right, width)
    if y0 < y1 and x0 < x1:
        mask[y0:y1, x0:x1] = soft[y0 - top : y1 - top, x0 - left : x1 - left]
    return mask


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
