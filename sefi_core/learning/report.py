"""The report picture of a training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..attention.heat_maps import added_up, heat_picture
from ..images import float_tensor, resized
from .loop import Step, smoothed

PANEL = 384
LABEL = 44
CHART_HEIGHT = 300
_MARGIN = 24
_FONT = 26
"""Readable where the whole report is 400 pixels wide, about half its size."""
_INK, _FAINT, _GRID, _PAPER = (40, 40, 48), (110, 110, 122), (222, 222, 228), (255, 255, 255)
_LINES = {"noise": (38, 98, 190), "attention": (208, 92, 34), "leak": (40, 132, 84)}


def training_report(
    history: Sequence[Step],
    photo: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor],
    losses: tuple[float, float],
    sample: torch.Tensor,
    placeholder: str,
    caption: str = "",
    steps: int = 0,
) -> torch.Tensor:
    """Photo and sample, attention before and after, the loss curves; (H, W, 3) in [0, 1].

    ``photo`` and ``sample`` are (H, W, 3). ``maps`` are the placeholder's before and after, (h, w)
    in [0, 1], laid over the photo; ``losses`` the noise loss before and after, on the same noise.
    ``caption`` is what the photo was said to show, ``steps`` how many there were to be.
    """
    size = (PANEL, PANEL)
    photo, sample = (_scaled(picture) for picture in (photo, sample))
    before, after = added_up([torch.stack(maps).float()], size)
    rows = [
        [(photo, f"photo: {caption}" if caption else "photo"), (sample, f"{placeholder} drawn")],
        [
            (heat_picture(before, photo, "")[:PANEL], f"{placeholder} looks: before"),
            (heat_picture(after, photo, "")[:PANEL], "after"),
        ],
    ]
    panels = [
        torch.cat([torch.cat([picture, _label(text)]) for picture, text in row], dim=1)
        for row in rows
    ]
    return torch.cat([*panels, _chart(history, losses, max(steps, len(history)))])


def text_picture(text: str) -> torch.Tensor:
    """A text as a picture (256, 512, 3) in [0, 1]; what does not fit is cut off."""
    image = Image.new("RGB", (512, 256), _PAPER)
    lines = textwrap.wrap(text, width=36, max_lines=8)
    font = ImageFont.load_default(24)
    ImageDraw.Draw(image).multiline_text((16, 16), "\n".join(lines), fill=_INK, font=font)
    return float_tensor(image)


def _scaled(picture: torch.Tensor) -> torch.Tensor:
    return resized(picture.float().cpu().movedim(-1, 0), (PANEL, PANEL)).movedim(0, -1)


def _label(text: str) -> torch.Tensor:
    """A strip (LABEL, PANEL, 3) with a text, cut where it is too long."""
    image = Image.new("RGB", (PANEL, LABEL), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
    while len(text) > 1 and draw.textlength(text, font) > PANEL - 16:
        text = text.removesuffix("…")[:-1] + "…"
    draw.text((PANEL / 2, LABEL / 2), text, font=font, anchor="mm", fill=_INK)
    return float_tensor(image)


def _chart(history: Sequence[Step], losses: tuple[float, float], steps: int) -> torch.Tensor:
    """The loss on fixed noise, above running means of the steps' losses, each on its own scale."""
    width = 2 * PANEL
    image = Image.new("RGB", (width, CHART_HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
    left, right, top, bottom = _MARGIN, width - _MARGIN, 96, CHART_HEIGHT - 48
    draw.text((left, 8), _comparison(*losses), fill=_INK, font=font)
    for share in (0.0, 0.5, 1.0):
        y = bottom + (top - bottom) * share
        draw.line([(left, y), (right, y)], fill=_GRID)
    place = float(left)
    for name, colour in _LINES.items():
        values = [getattr(step, name) for step in history]
        if not any(values):  # a loss that is turned off
            continue
        draw.line(_curve(values, (left, right, top, bottom)), fill=colour, width=4, joint="curve")
        draw.text((place, 48), name, fill=colour, font=font)
        place += draw.textlength(name, font) + 28
    draw.text((right, 48), "loss of the steps", fill=_FAINT, font=font, anchor="ra")
    done = f"step {len(history)}" + (f" of {steps}: stopped" if len(history) < steps else "")
    draw.text((left, bottom + 8), "step 1", fill=_FAINT, font=font)
    draw.text((right, bottom + 8), done, fill=_FAINT, font=font, anchor="ra")
    return float_tensor(image)


def _comparison(before: float, after: float) -> str:
    change = f" ({100 * (after - before) / before:+.0f} %)" if before > 0 else ""
    return f"noise loss on the same noise: {before:.3g} to {after:.3g}{change}"


def _curve(
    values: Sequence[float], box: tuple[float, float, float, float]
) -> list[tuple[float, float]]:
    """Running means of the values as points of a line, from 0 at the bottom of the box."""
    left, right, top, bottom = box
    window = max(25, len(values) // 4)
    means = smoothed(smoothed(values, window), window // 2)
    # The first ones are means of a few values, which say nothing beside the others.
    begin = min(window // 2, max(0, len(values) - 2))
    low, high = min(0.0, *means[begin:]), max(means[begin:])
    points = [
        (
            left + (right - left) * place / max(1, len(means) - 1),
            bottom + (top - bottom) * (mean - low) / (high - low or 1.0),
        )
        for place, mean in enumerate(means)
    ][begin:]
    return points if len(points) > 1 else points * 2
