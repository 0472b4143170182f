"""Pictures as tensors: ComfyUI's IMAGE is (B, H, W, C) of floats in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image


def in_colour(pictures: torch.Tensor) -> torch.Tensor:
    """(..., H, W, 3) of pictures (..., H, W, C) with alpha, or of grey ones."""
    if pictures.shape[-1] < 3:
        return pictures[..., :1].expand(*pictures.shape[:-1], 3)
    return pictures[..., :3]


def pixels_of(picture: torch.Tensor) -> torch.Tensor:
    """A picture of floats in [0, 1], any shape, as uint8 on the CPU; values outside are clamped."""
    return (picture.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def rgb_tensor(picture: Image.Image) -> torch.Tensor:
    """(H, W, 3) uint8 of an RGB picture."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(picture.height, picture.width, 3)


def float_tensor(picture: Image.Image) -> torch.Tensor:
    """(H, W, 3) in [0, 1] of an RGB picture."""
    return rgb_tensor(picture).float() / 255


def resized(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Planes (C, H, W) in [0, 1] at (C, *size), bicubic, clamped to [0, 1]."""
    return F.interpolate(
        planes[None], size=size, mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 1)
