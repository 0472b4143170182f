"""Pictures of attention maps: colours, blended over a picture, with a label."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..images import float_tensor

# Dark to bright with even steps in lightness, so that it also reads without colours.
_COLOURS = torch.tensor(
    [
        [0.00, 0.00, 0.02],
        [0.23, 0.06, 0.44],
        [0.55, 0.16, 0.51],
        [0.87, 0.29, 0.41],
        [0.99, 0.58, 0.35],
        [0.99, 0.99, 0.75],
    ]
)
_OVERLAY = 0.65


def heat_picture(heat: torch.Tensor, picture: torch.Tensor | None, label: str) -> torch.Tensor:
    """A map (height, width) in [0, 1] as a picture (height + label, width, 3).

    It is laid over ``picture`` (height, width, 3), if there is one, in grey. The label stands in a
    strip of its own below, so that it hides nothing; the strip's height depends on the size only.
    """
    place = heat.float().cpu().clamp(0, 1) * (len(_COLOURS) - 1)
    lower = place.floor().long().clamp(max=len(_COLOURS) - 2)
    colours = torch.lerp(_COLOURS[lower], _COLOURS[lower + 1], (place - lower)[..., None])
    if picture is not None:
        grey = picture.float().cpu().mean(-1, keepdim=True)
        colours = torch.lerp(grey.expand_as(colours), colours, _OVERLAY)
    return torch.cat([colours, _strip(label, *heat.shape)])


def added_up(layers: Iterable[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Maps (n, height, width) at ``size``, each with a highest value of 1: the layers' sum.

    ``layers`` has the same n maps of each layer, at a size of its own.
    """
    resized = (
        F.interpolate(layer[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
        for layer in layers
    )
    maps = reduce(torch.add, resized)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)


def _strip(label: str, height: int, width: int) -> torch.Tensor:
    text_height = max(10, min(height, width) // 24)
    strip = Image.new("RGB", (width, text_height * 2))
    font = ImageFont.load_default(text_height)
    draw = ImageDraw.Draw(strip)
    while label and draw.textlength(label, font) > width - text_height and len(label) > 1:
        label = label.removesuffix("…")[:-1] + "…" if len(label) > 2 else label[:1]
    draw.text((width / 2, text_height), label, font=font, anchor="mm", fill="white")
    return float_tensor(strip)
