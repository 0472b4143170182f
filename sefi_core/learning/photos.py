"""Training pictures from photos of any size: square, cropped around the face."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..errors import SeFiError
from ..images import checked_pictures, resized

ROOM = 3.0
"""Side of the training picture over that of the face, where the photo has so much room."""

FAINT = 0.05
"""A mask that is nowhere more marks nothing; Load Image gives 0.004 everywhere for some files."""
BACKGROUND_ON_BORDER = 0.6
"""A mask that marks more of the photo's border, and little of its middle, marks the background."""


class Photo(NamedTuple):
    """``picture`` (H, W, 3) in [0, 1]; ``mask`` (H, W) in [0, 1], 1 on the face, or None."""

    picture: torch.Tensor
    mask: torch.Tensor | None


def pair_photos(
    images: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None
) -> list[Photo]:
    """Photos from ComfyUI's IMAGE batches (B, H, W, C) and MASK batches (B, H, W).

    There is one mask for every photo, or one for all of them. Raises :class:`SeFiError` for what
    is no batch of pictures, for pictures with values that are not numbers, and for masks that are
    empty, too few, or of another size than their photo.
    """
    pictures = [
        picture
        for number, batch in enumerate(images, 1)
        for picture in checked_pictures(
            batch, "photos" if len(images) == 1 else f"batch {number} of photos"
        )
    ]
    if not pictures:
        raise SeFiError("photos is empty: connect at least one photo")
    if not masks:
        return [Photo(picture, None) for picture in pictures]
    planes = [mask.float() for batch in masks for mask in _planes(batch)]
    if len(planes) == 1:
        planes *= len(pictures)
    if len(planes) != len(pictures):
        raise SeFiError(
            f"masks: there are {len(planes)} masks for {len(pictures)} photos: connect the mask "
            "that SeFi Face Mask makes of the same photos"
        )
    photos = []
    for number, (picture, mask) in enumerate(zip(pictures, planes, strict=True), 1):
        if mask.shape != picture.shape[:2]:
            raise SeFiError(
                f"masks: mask {number} is {mask.shape[1]} x {mask.shape[0]} pixels and its photo "
                f"{picture.shape[1]} x {picture.shape[0]}: connect the mask that SeFi Face Mask "
                "makes of the same photos, or paint one on the photo (right-click it, Open in Mask "
                "Editor)"
            )
        _check_marked(mask, number)
        photos.append(Photo(picture, mask))
    return photos


class TrainingPictures(NamedTuple):
    """Square ``pictures`` (N, side, side, 3) and their ``masks`` (N, 1, side, side), or None.

    ``sides`` (N) are those of the squares in the photos, in pixels, before they were resized.
    """

    pictures: torch.Tensor
    masks: torch.Tensor | None
    sides: list[int]


def training_pictures(photos: Iterable[Photo], resolution: int) -> TrainingPictures:
    """Square pictures of one size, cut from photos.

    The side is ``resolution`` in pixels, rounded down to a multiple of 64 as the U-Net's levels
    ask. Raises :class:`SeFiError` if a square cannot hold what is marked in a photo.
    """
    side = max(64, resolution // 64 * 64)
    pictures, masks, sides = [], [], []
    for square in map(_square, photos):
        sides.append(len(square.picture))
        pictures.append(resized(square.picture.movedim(-1, 0), (side, side)).movedim(0, -1))
        if square.mask is not None:
            masks.append(resized(square.mask[None], (side, side)))
    return TrainingPictures(torch.stack(pictures), torch.stack(masks) if masks else None, sides)


def _planes(batch: torch.Tensor) -> torch.Tensor:
    """A MASK as (B, H, W); some nodes give a single (H, W), or one with a channel."""
    if batch.ndim == 4 and batch.shape[1] == 1:
        return batch[:, 0]
    if batch.ndim == 4 and batch.shape[-1] == 1:
        return batch[..., 0]
    if batch.ndim not in (2, 3):
        raise SeFiError(
            f"masks: a mask has the shape {tuple(batch.shape)}, where (batch, height, width) is "
            "needed: connect a MASK, such as that of SeFi Face Mask"
        )
    return batch[None] if batch.ndim == 2 else batch


def _check_marked(mask: torch.Tensor, number: int) -> None:
    """Raises :class:`SeFiError` for a mask (H, W) that marks nothing, or all but the middle."""
    if not torch.isfinite(mask).all():
        raise SeFiError(
            f"masks: mask {number} has values that are not numbers (NaN): check the node that made "
            "it"
        )
    if mask.max() < FAINT:
        most = float(mask.max())
        raise SeFiError(
            f"masks: mask {number} is empty{f', {most:.3f} at most' if most > 0 else ''}: mark the "
            "face in it, or disconnect masks to train without"
        )
    marked = (mask > 0.5 * mask.max()).float()
    border = torch.cat([marked[0], marked[-1], marked[:, 0], marked[:, -1]])
    third = [slice(length // 3, max(length // 3 + 1, 2 * length // 3)) for length in mask.shape]
    if border.mean() > BACKGROUND_ON_BORDER and marked[third[0], third[1]].mean() < 0.5:
        raise SeFiError(
            f"masks: mask {number} marks the background instead of the face, as that of Load Image "
            "does for a picture with transparency: put Invert Mask in between"
        )


def _square(photo: Photo) -> Photo:
    """The square of a photo with the face as much in its middle as the borders allow, in [0, 1]."""
    height, width = photo.picture.shape[:2]
    side = min(height, width)
    centre = (height / 2, width / 2)
    if photo.mask is not None:
        rows, columns = (photo.mask.amax(axis) > 0.5 * photo.mask.max() for axis in (1, 0))
        spans = [torch.nonzero(span).flatten() for span in (rows, columns)]
        centre = tuple((float(span[0]) + float(span[-1]) + 1) / 2 for span in spans)
        face = max(float(span[-1] - span[0]) + 1 for span in spans)
        side = min(side, max(8, round(ROOM * face)))
    top, left = (
        int(min(max(round(middle - side / 2), 0), limit - side))
        for middle, limit in zip(centre, (height, width), strict=True)
    )
    rows, columns = slice(top, top + side), slice(left, left + side)
    picture = photo.picture[rows, columns].clamp(0, 1)
    if photo.mask is None:
        return Photo(picture, None)
    mask = photo.mask[rows, columns]
    if mask.max() <= 0.5 * photo.mask.max():
        raise SeFiError(
            "masks: what is marked in a photo is too far apart for a square around it: mark one "
            "face only, or crop the photo"
        )
    return Photo(picture, mask.clamp(0, 1))
