"""Where a person is in a square of a picture, by MediaPipe's selfie segmentation.

The network was made for a person before a camera: a MobileNetV3 (Howard et al., Searching for
MobileNetV3, ICCV 2019) with its pooled head and a decoder that weighs what it takes from each
level.
The weights: ``selfie.safetensors``, made by ``tools/face_weights.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("selfie.safetensors")

SIDE = 256
"""Pixels of the network's square input, and of the mask that comes out."""


class SelfieNet(nn.Module):
    """Pictures (n, 3, 256, 256) in, RGB in [0, 1]; logits (n, 1, 256, 256) out, of a person."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 16, 3, 2)
        self.quarter = _Block(16, 16, 16, 3, 2, F.relu, squeeze=8)
        self.eighth = nn.ModuleList(
            [_Block(16, 72, 24, 3, 2, F.relu), _Block(24, 88, 24, 3, 1, F.relu)]
        )
        self.sixteenth = nn.ModuleList(
            [
                _Block(24, 96, 32, 5, 2, F.hardswish, squeeze=24),
                _Block(32, 128, 32, 5, 1, F.hardswish, squeeze=32),
                _Block(32, 128, 32, 5, 1, F.hardswish, squeeze=32),
                _Block(32, 96, 32, 5, 1, F.hardswish, squeeze=24),
                _Block(32, 96, 32, 5, 1, F.hardswish, squeeze=24),
            ]
        )
        self.what = nn.Conv2d(32, 128, 1)
        self.whether = nn.Conv2d(32, 128, 1)
        self.decoder = nn.ModuleList([_Level(128, 24), _Level(24, 16), _Level(16, 16)])
        self.segment = nn.ConvTranspose2d(16, 1, 2, 2)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        half = F.hardswish(self.stem(picture))
        quarter = self.quarter(half)
        eighth = quarter
        for block in self.eighth:
            eighth = block(eighth)
        x = eighth
        for block in self.sixteenth:
            x = block(x)
        x = F.relu(self.what(x)) * self.whether(_mean(x)).sigmoid()
        for level, skip in zip(self.decoder, (eighth, quarter, half), strict=True):
            x = level(x, skip)
        return self.segment(x)


class _Convolution(nn.Conv2d):
    """As large as its input over the stride; what is beyond an odd margin is below and right."""

    def __init__(self, before: int, after: int, size: int, stride: int, groups: int = 1) -> None:
        super().__init__(before, after, size, stride, groups=groups)
        margin = size - stride
        low = margin // 2
        self.margins = (low, margin - low, low, margin - low)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, self.margins))


class _Weighing(nn.Module):
    """A factor in [0, 1] for every channel, from the means of all."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(F.relu(self.squeeze(_mean(x)))).sigmoid()


class _Block(nn.Module):
    """Wider, a filter in each channel, weighed if there is a ``squeeze``, narrower."""

    def __init__(
        self,
        before: int,
        width: int,
        after: int,
        size: int,
        stride: int,
        bend: Callable[[torch.Tensor], torch.Tensor],
        squeeze: int = 0,
    ) -> None:
        super().__init__()
        self.bend = bend
        self.widen = nn.Conv2d(before, width, 1)
        self.filter = _Convolution(width, width, size, stride, groups=width)
        self.weighing = _Weighing(width, squeeze) if squeeze else None
        self.narrow = nn.Conv2d(width, after, 1)
        self.adds = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bend(self.filter(self.bend(self.widen(x))))
        if self.weighing is not None:
            y = y * self.weighing(y)
        y = self.narrow(y)
        return x + y if self.adds else y


class _Level(nn.Module):
    """Twice as large, with what the ``skip`` of that size adds to it."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(before, width, 1)
        self.weighing = _Weighing(width, width)
        self.mix = nn.Conv2d(width, width, 1)
        self.filter = _Convolution(width, width, 3, 1, groups=width)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.narrow(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        x = F.relu(self.mix(x + skip * self.weighing(x + skip)))
        return x + F.relu(self.filter(x))


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True)


@lru_cache(maxsize=1)
def network() -> SelfieNet:
    """The network with its weights, float32 on the CPU."""
    with torch.inference_mode(False):
        model = SelfieNet().eval().requires_grad_(False)
        weights = {name: values.float() for name, values in load_file(WEIGHTS).items()}
        model.load_state_dict(weights)
    return model


def person_in(square: torch.Tensor) -> torch.Tensor:
    """How surely every pixel of a square (256, 256, 3), RGB in [0, 1], is a person: (256, 256)."""
    with torch.no_grad():
        return network()(square.movedim(-1, 0)[None]).sigmoid()[0, 0]
