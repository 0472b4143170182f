"""Faces turned, scaled and moved to where recognition models expect them."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 112
"""Height and width in pixels of an aligned face."""

TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
"""Where ArcFace's models (arXiv 1801.07698), and those that follow them, want the five points, in
the order of :attr:`face.Face.points`: pixels of the aligned face, (5, 2)."""


def similarity(points: np.ndarray, template: np.ndarray = TEMPLATE) -> np.ndarray:
    """The turn, scale and shift, (2, 3), that brings points (n, 2) closest to a template (n, 2).

    Closest in the sum of squared distances, without mirroring. With points as complex numbers it is
    one complex factor and one shift. Raises ``ValueError`` when all points are in one place.
    """
    p, q = (np.asarray(one, dtype=float) @ [1, 1j] for one in (points, template))
    spread = p - p.mean()
    size = float((np.abs(spread) ** 2).sum())
    if not size > 0:
        raise ValueError("the points are all in one place")
    factor = (spread.conj() * (q - q.mean())).sum() / size
    shift = q.mean() - factor * p.mean()
    return np.array(
        [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    )


def aligned(picture: np.ndarray, points: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The face with these five points (5, 2) as an aligned picture (side, side, 3), uint8.

    ``picture`` is RGB (height, width, 3), uint8; what lies outside it is black. A face that is
    large in the picture is averaged, not sampled here and there. Raises ``ValueError`` for points
    that are all in one place.
    """
    forward = similarity(points, TEMPLATE * (side / SIDE))
    scale = float(np.hypot(*forward[:, 0]))
    back = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2]
    corners = np.array([[0, 0, 1], [side, 0, 1], [0, side, 1], [side, side, 1]]) @ back.T
    height, width = picture.shape[:2]
    left, top = (max(0, floor(low) - 2) for low in corners.min(0))
    right, bottom = (
        min(length, ceil(high) + 2)
        for length, high in zip((width, height), corners.max(0), strict=True)
    )
    if left >= right or top >= bottom:
        return np.zeros((side, side, 3), np.uint8)
    region = torch.from_numpy(picture[top:bottom, left:right].copy())
    planes = region.movedim(-1, 0)[None].float()
    if scale < 1:
        size = [max(1, round(length * scale)) for length in planes.shape[2:]]
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
    extent = right - left, bottom - top
    grid = torch.from_numpy(_grid(back, (left, top), extent, side)).float()
    found = F.grid_sample(planes, grid[None], mode="bilinear", align_corners=False)
    return found[0].movedim(0, -1).clamp(0, 255).round().to(torch.uint8).numpy()


def _grid(
    back: np.ndarray, corner: tuple[int, int], size: tuple[int, int], side: int
) -> np.ndarray:
    """Where each pixel of the aligned face lies in the region, as ``grid_sample`` counts: -1 is the
    region's left or upper edge, 1 the opposite one."""
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back.T
    return (places + 0.5 - corner) / size * 2 - 1
