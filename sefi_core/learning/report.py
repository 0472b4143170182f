"""The report picture of a training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..attention.heat_maps import added_up, heat_picture
from ..images import float_tensor, resized
from .loop import Step, smoothed

PANEL = 256
CHART_HEIGHT = 220
_MARGIN = 44
_INK, _GRID, _PAPER = (40, 40, 48), (222, 222, 228), (255, 255, 255)
_LINES = {"noise": (38, 98, 190), "attention": (208, 92, 34), "leak": (40, 132, 84)}


def training_report(
    history: Sequence[Step],
    photo: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    sample: torch.Tensor,
    placeholder: str,
    caption: str = "",
) -> torch.Tensor:
    """Photo, attention before and after, and a sample above the loss curves; (H, W, 3) in [0, 1].

    ``photo`` and ``sample`` are (H, W, 3); ``before`` and ``after`` are the placeholder's maps
    (h, w) in [0, 1], laid over the photo. ``caption`` is what the photo was said to show.
    """
    size = (PANEL, PANEL)
    photo, sample = (_scaled(picture) for picture in (photo, sample))
    maps = added_up([torch.stack([before, after]).float()], size)
    nothing = torch.zeros(size)
    label = f"photo: {caption}" if caption else "photo"
    panels = [
        torch.cat([photo, heat_picture(nothing, None, label)[PANEL:]]),
        heat_picture(maps[0], photo, f"{placeholder} before"),
        heat_picture(maps[1], photo, f"{placeholder} after"),
        torch.cat([sample, heat_picture(nothing, None, "sample")[PANEL:]]),
    ]
    top = torch.cat(panels, dim=1)
    return torch.cat([top, _chart(history, top.shape[1])])


def text_picture(text: str) -> torch.Tensor:
    """A text as a picture (PANEL, 2 * PANEL, 3) in [0, 1]; what does not fit is cut off."""
    image = Image.new("RGB", (2 * PANEL, PANEL), _PAPER)
    lines = textwrap.wrap(text, width=62, max_lines=12)
    font = ImageFont.load_default(14)
    ImageDraw.Draw(image).multiline_text((16, 16), "\n".join(lines), fill=_INK, font=font)
    return float_tensor(image)


def _scaled(picture: torch.Tensor) -> torch.Tensor:
    return resized(picture.float().cpu().movedim(-1, 0), (PANEL, PANEL)).movedim(0, -1)


def _chart(history: Sequence[Step], width: int) -> torch.Tensor:
    """Running means of the losses, each on its own scale, as a picture."""
    image = Image.new("RGB", (width, CHART_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    left, right, top, bottom = _MARGIN, width - _MARGIN, 30, CHART_HEIGHT - 28
    for share in (0.0, 0.5, 1.0):
        y = bottom + (top - bottom) * share
        draw.line([(left, y), (right, y)], fill=_GRID)
    for place, (name, colour) in enumerate(_LINES.items()):
        values = smoothed([getattr(step, name) for step in history])
        low, high = min(values), max(values)
        span = high - low or 1.0
        points = [
            (
                left + (right - left) * i / max(1, len(values) - 1),
                bottom + (top - bottom) * (value - low) / span,
            )
            for i, value in enumerate(values)
        ]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=2)
        label = f"{name} loss  {values[0]:.4g} to {values[-1]:.4g}"
        draw.text((left + place * (right - left) / len(_LINES), 8), label, fill=colour, font=font)
    draw.text((left, bottom + 8), "step 1", fill=_INK, font=font)
    draw.text((right, bottom + 8), f"{len(history)}", fill=_INK, font=font, anchor="ra")
    return float_tensor(image)
