"""Pictures of who has which part of a picture: colours over it, with names."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..images import float_tensor

_OVERLAY = 0.45
_GOLDEN = 0.618  # of the circle of hues; neighbours are far apart, however many there are


def region_picture(
    shares: torch.Tensor, picture: torch.Tensor | None, names: Sequence[str]
) -> torch.Tensor:
    """Shares (people, height, width) of a picture as colours (height, width, 3) with names.

    They are laid over ``picture`` (height, width, 3), if there is one, in grey. A name stands in
    the middle of its part.
    """
    colours = torch.tensor(
        [colorsys.hsv_to_rgb((0.08 + _GOLDEN * n) % 1, 0.85, 1.0) for n in range(len(shares))]
    )
    shares = shares.float().cpu()
    tint = torch.einsum("phw,pc->hwc", shares, colours)
    if picture is not None:
        grey = picture.float().cpu().mean(-1, keepdim=True)
        tint = torch.lerp(grey.expand_as(tint), tint, _OVERLAY)
    height, width = shares.shape[1:]
    drawn = Image.fromarray((255 * tint.clamp(0, 1)).round().byte().numpy())
    draw = ImageDraw.Draw(drawn)
    size = max(10, min(height, width) // 20)
    font = ImageFont.load_default(size)
    for share, name in zip(shares, names, strict=True):
        if not share.any():
            continue
        rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        y = float((share.sum(1) * rows).sum() / share.sum())
        x = float((share.sum(0) * columns).sum() / share.sum())
        room = draw.textlength(name, font) / 2
        x = min(max(x, room), max(width - room, room))  # long names stay in the picture
        draw.text(
            (x, y), name, font=font, anchor="mm", fill="white",
            stroke_width=max(1, size // 8), stroke_fill="black",
        )  # fmt: skip
    return float_tensor(drawn)
