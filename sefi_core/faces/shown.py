"""Masks over their pictures, for looking at."""

from __future__ import annotations

import torch

from ..images import in_colour, resized

MOST = 16
"""Pictures that are shown of a batch."""

SIDE = 768
"""Pixels of the longer side at most: a node shows no more, and larger ones take long to write."""

FAINT = 0.3
"""Brightness of what is outside a mask, where 1 is the picture's own."""


def masks_over(pictures: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The pictures as they are inside their masks, faint and grey outside.

    ``pictures`` (pictures, height, width, channels) and ``masks`` (pictures, height, width) are in
    [0, 1]; the first :data:`MOST` of them come back as (n, h, w, 3), with a longer side of
    :data:`SIDE` pixels at most.
    """
    height, width = masks.shape[1:]
    smaller = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * smaller)), max(1, round(width * smaller)))
    shown = []
    for picture, mask in zip(pictures[:MOST], masks, strict=False):
        colours = in_colour(picture.detach().to("cpu", torch.float32)).movedim(-1, 0).clamp(0, 1)
        planes = torch.cat((colours, mask.cpu().float()[None]))
        if smaller < 1:
            planes = resized(planes, size)
        inside, mask = planes[:3], planes[3:]
        outside = inside.mean(0, keepdim=True) * FAINT
        shown.append((inside * mask + outside * (1 - mask)).movedim(0, -1))
    return torch.stack(shown)
