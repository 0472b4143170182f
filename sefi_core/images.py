"""Pictures as tensors: ComfyUI's IMAGE is (B, H, W, C) of floats in [0, 1]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .errors import SeFiError


def is_image(value: Any) -> bool:
    """Whether that is an IMAGE, a batch of pictures (B, H, W, C); the batch may be empty."""
    return torch.is_tensor(value) and value.ndim == 4 and 0 not in value.shape[1:]


def checked_pictures(pictures: torch.Tensor, name: str) -> torch.Tensor:
    """An IMAGE as RGB float32 on the CPU, (pictures, height, width, 3); not copied if it is that.

    Raises :class:`SeFiError` with the input's ``name`` for what is no batch of pictures, and for
    values that are not numbers.
    """
    if not is_image(pictures) or not len(pictures):
        what = (
            f"its shape is {tuple(pictures.shape)}"
            if torch.is_tensor(pictures)
            else f"it is a {type(pictures).__name__}"
        )
        raise SeFiError(
            f"{name} is empty or not a batch of pictures (batch, height, width, channels); {what}: "
            "connect an IMAGE, such as that of Load Image"
        )
    pictures = pictures.detach().to("cpu", torch.float32)
    for number, picture in enumerate(pictures, start=1):
        # The sum is quick, and takes no memory; only where it is not finite is it looked up why.
        if not torch.isfinite(picture.sum()) and not torch.isfinite(picture).all():
            raise SeFiError(
                f"{name} holds values that are not numbers (NaN or infinite) in picture {number}: "
                "check the node that made it, often a VAE decoding in half precision"
            )
    return in_colour(pictures)


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
