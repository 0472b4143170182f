"""The small picture in an identity: a JPEG or PNG file's bytes, kept as they are.

The bytes and not the pixels, since a JPEG that is decoded and written again is another one.
"""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageOps

from ..errors import SeFiError
from ..images import pixels_of, rgb_tensor

THUMBNAIL_SIDE = 256
"""Pixels of a thumbnail's longer side, at most; any file's."""

MAX_THUMBNAIL_BYTES = 2**18
"""Several times what a JPEG of that size needs; the file's header holds it twice."""

JPEG_QUALITY = 90

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def thumbnail_of(image: torch.Tensor) -> bytes:
    """A JPEG, at most :data:`THUMBNAIL_SIDE` pixels a side, of a picture.

    ``image`` is (height, width, channels >= 3) with values 0 to 1, as one picture of a ComfyUI
    IMAGE; the aspect ratio is kept, and a smaller picture is not made larger.
    """
    picture = Image.fromarray(pixels_of(image[..., :3].detach()).numpy())
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue()


def picture_in(thumbnail: bytes) -> torch.Tensor:
    """The picture of a thumbnail, (height, width, 3) uint8.

    Raises :class:`SeFiError` unless it is a small JPEG or PNG file.
    """
    size = len(thumbnail)
    if size > MAX_THUMBNAIL_BYTES:
        raise SeFiError(
            f"its thumbnail has {size // 2**10} KiB where at most {MAX_THUMBNAIL_BYTES // 2**10} "
            "are possible"
        )
    try:
        with Image.open(io.BytesIO(thumbnail), formats=["JPEG", "PNG"]) as picture:
            if max(picture.size) > THUMBNAIL_SIDE:
                raise ValueError(f"{picture.size} pixels")
            return rgb_tensor(picture.convert("RGB"))
    except Exception as error:  # Pillow raises a dozen kinds for files that lie
        raise SeFiError("its thumbnail is no small JPEG or PNG picture") from error


def media_type(thumbnail: bytes) -> str:
    """``"image/png"`` or ``"image/jpeg"``."""
    return "image/png" if thumbnail.startswith(_PNG_SIGNATURE) else "image/jpeg"


def side_by_side(left: bytes, right: bytes) -> bytes:
    """A JPEG with the middle squares of two thumbnails beside each other."""
    half = THUMBNAIL_SIDE // 2
    both = Image.new("RGB", (2 * half, half))
    for number, thumbnail in enumerate((left, right)):
        picture = Image.fromarray(picture_in(thumbnail).numpy())
        both.paste(
            ImageOps.fit(picture, (half, half), Image.Resampling.LANCZOS), (number * half, 0)
        )
    content = io.BytesIO()
    both.save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue()
