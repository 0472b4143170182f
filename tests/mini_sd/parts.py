"""The part of a picture that one of several people has, as a picture of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SIZE = 128
_MIDDLES = {2: {"left": 33, "right": 95}, 3: {"left": 22, "middle": 64, "right": 106}}
# Width and height of a part; parts reach down to the lower edge, where hands are.
_EXTENTS = {2: (66, 128), 3: (44, 100)}


def part_of(pictures: torch.Tensor, count: int, place: str) -> torch.Tensor:
    """What is at a place of pictures (B, 128, 128, 3) with so many actors, (B, 128, 128, 3).

    A part keeps its proportions, is as high as the picture and stands in the middle of grey. A
    picture with one actor is that actor's.
    """
    if count == 1:
        return pictures
    width, height = _EXTENTS[count]
    left = min(max(_MIDDLES[count][place] - width // 2, 0), SIZE - width)
    cut = pictures[:, SIZE - height :, left : left + width].movedim(-1, 1)
    shown = round(width * SIZE / height)
    part = F.interpolate(cut, (SIZE, shown), mode="bilinear", antialias=True).movedim(1, -1)
    out = torch.full_like(pictures, 0.5)
    start = (SIZE - shown) // 2
    out[:, :, start : start + shown] = part
    return out
