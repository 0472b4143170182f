"""Square crops around heads."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

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
    left, top, side = square_around(face, 1 + 2 * margin)
    return _shifted(left, side, size[1]), _shifted(top, side, size[0]), side


def square_around(face: Face, times: float) -> Square:
    """The square in the middle of a head, of ``times`` the longer side of the head's ellipse."""
    points = outline(face, "head")
    low, high = points.min(0), points.max(0)
    side = max(1, round(float((high - low).max()) * times))
    left, top = np.round((low + high - side) / 2).astype(int)
    return int(left), int(top), side


def middle_square(size: tuple[int, int]) -> Square:
    """The largest square in the middle of a picture of (height, width) ``size``."""
    height, width = size
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side


def crop(
    picture: torch.Tensor, square: Square, pixels: int, empty_outside: bool = False
) -> torch.Tensor:
    """The square of ``picture`` (height, width, channels), (pixels, pixels, channels) in [0, 1].

    Beyond the borders the picture's edge is repeated, or there is 0 with ``empty_outside``.
    Resampling is bicubic with antialiasing.
    """
    left, top, side = square
    rows, columns = torch.arange(top, top + side), torch.arange(left, left + side)
    # A square of a camera's photo is averaged first, line by line: it would be hundreds of MB.
    length = min(side, 2 * pixels)
    planes = averaged(picture, rows, columns, (length, length))
    if empty_outside:
        inside = [
            F.adaptive_avg_pool1d(((at >= 0) & (at < end)).float()[None], length)[0]
            for at, end in zip((rows, columns), picture.shape[:2], strict=True)
        ]
        planes = planes * inside[0][:, None] * inside[1]
    return resized(planes, (pixels, pixels)).movedim(0, -1)


def reduced(picture: torch.Tensor, longest: int) -> torch.Tensor:
    """A picture (height, width, channels) of at most ``longest`` pixels on its longer side."""
    height, width = picture.shape[:2]
    if max(height, width) <= longest:
        return picture
    scale = longest / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return averaged(picture, torch.arange(height), torch.arange(width), size).movedim(0, -1)


def averaged(
    picture: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """These rows and columns of ``picture`` (height, width, channels) as means, (channels, *size).

    Both are ranges; what is beyond the borders means the edge. Only one line is held at a time.
    """
    rows, columns = rows.clamp(0, picture.shape[0] - 1), columns.clamp(0, picture.shape[1] - 1)
    if size == (len(rows), len(columns)):
        return picture[rows][:, columns].movedim(-1, 0).float()
    lines = []
    for number in range(size[0]):
        first, last = number * len(rows) // size[0], -(-(number + 1) * len(rows) // size[0])
        here = slice(int(rows[first]), int(rows[last - 1]) + 1)
        line = picture[here].float().mean(0)[columns]
        lines.append(F.adaptive_avg_pool1d(line.T[None], size[1])[0])
    return torch.stack(lines, 1)


def _shifted(start: int, side: int, length: int) -> int:
    if side > length:
        return (length - side) // 2
    return min(max(start, 0), length - side)
