"""Square crops around heads."""

from __future__ import annotations

import numpy as np
import torch

from ..images import resized
from .face import Face
from .regions import outline

Square = tuple[int, int, int]
"""Left, top and side, in pixels; may reach over the picture's borders."""


def head_square(face: Face, margin: float, size: tuple[int, int]) -> Square:
    """The square around a head with ``margin`` of the head's longer side on every side of it.

    It is moved inside the picture of (height, width) ``size`` as far as it fits; where it is larger
    than the picture it is centred on it and reaches over both borders.
    """
    points = outline(face, "head")
    low, high = points.min(0), points.max(0)
    side = max(1, round(float((high - low).max()) * (1 + 2 * margin)))
    left, top = np.round((low + high - side) / 2).astype(int)
    return _shifted(int(left), side, size[1]), _shifted(int(top), side, size[0]), side


def middle_square(size: tuple[int, int]) -> Square:
    """The largest square in the middle of a picture of (height, width) ``size``."""
    height, width = size
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side


def crop(picture: torch.Tensor, square: Square, pixels: int) -> torch.Tensor:
    """The square of ``picture`` (height, width, channels), (pixels, pixels, channels) in [0, 1].

    Beyond the borders the picture's edge is repeated. Resampling is bicubic with antialiasing.
    """
    left, top, side = square
    height, width, _ = picture.shape
    rows = torch.arange(top, top + side).clamp(0, height - 1)
    columns = torch.arange(left, left + side).clamp(0, width - 1)
    planes = picture[rows][:, columns].movedim(-1, 0).float()
    return resized(planes, (pixels, pixels)).movedim(0, -1)


def _shifted(start: int, side: int, length: int) -> int:
    if side > length:
        return (length - side) // 2
    return min(max(start, 0), length - side)
