"""What a face encoder sees of a photo: a face aligned by its five points, or a head's square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..checks import check_choice, check_whole
from ..errors import SeFiError
from ..faces.alignment import aligned
from ..faces.crop import Square, crop, head_square, reduced
from ..faces.extract import MOST_PIXELS
from ..faces.face import Detector, Face, choose
from ..faces.heads import head_region
from ..faces.regions import region_of
from ..images import pixels_of
from ..learning.photos import Photo
from .networks import SIDE

WHICH = ("largest", "most central", "left to right")
"""Which face of a photo without a mask; one only, since a photo is of one person."""

LEAST_IN_MASK = 0.1
"""Share of a face below which it does not lie in a mask."""

AS_MUCH = 0.9
"""Of the share of the face that lies most in the mask: faces with more lie in it as well."""

ROOM = 0.5
"""Around the head in a thumbnail, on every side, in sides of the head."""


@dataclass(frozen=True)
class Choice:
    """Which face of a photo is meant; ``face_index`` counts from 0 at the left, for that choice."""

    which_face: str = "largest"
    face_index: int = 0

    def __post_init__(self) -> None:
        check_choice("which_face", self.which_face, WHICH)
        check_whole("face_index", self.face_index, 0, 999)


class Seen(NamedTuple):
    """``picture`` (112, 112, 3) in [0, 1], and the ``square`` of the head in the photo, pixels."""

    picture: torch.Tensor
    square: Square


def seen_in(photo: Photo, kind: str, detector: Detector, choice: Choice, name: str) -> Seen:
    """What an encoder with the crop ``kind``, one of :data:`files.CROPS`, sees of a photo.

    - "aligned": the face, turned and scaled so that its five points are where recognition models
      want them. With a mask it is the face that lies most in it, else what ``choice`` says.
    - "head": the square around the mask; without one around the head as SeFi Face Mask marks it.

    ``name`` is the photo's in errors, such as "photo 2". Raises :class:`SeFiError` where no face is
    found that is needed, and for a face index that does not exist.
    """
    if kind == "head" and photo.mask is not None:
        square = square_of_mask(photo.mask)
        return Seen(crop(photo.picture, square, SIDE), square)
    faces = found_in(photo.picture, detector)
    face = _chosen(photo, faces, choice, name, kind)
    if kind == "head":
        square = square_of_head(photo.picture, face, [one for one in faces if one is not face])
        return Seen(crop(photo.picture, square, SIDE), square)
    return Seen(aligned_face(photo.picture, face), head_square(face, 0, _size(photo.picture)))


def face_in(photo: Photo, detector: Detector, choice: Choice, name: str) -> Face:
    """The face that is meant in a photo, with its five points; see :func:`seen_in`."""
    return _chosen(photo, found_in(photo.picture, detector), choice, name, "aligned")


def found_in(picture: torch.Tensor, detector: Detector) -> list[Face]:
    """The faces of a picture (H, W, 3) in [0, 1] that have five points to align them by.

    A camera's picture is looked at in a smaller size.
    """
    small = reduced(picture, MOST_PIXELS)
    scale = (picture.shape[0] / small.shape[0] + picture.shape[1] / small.shape[1]) / 2
    faces = (face.scaled(scale) for face in detector.detect(pixels_of(small).numpy()))
    return [face for face in faces if _can_be_aligned(face)]


def aligned_face(picture: torch.Tensor, face: Face, side: int = SIDE) -> torch.Tensor:
    """The face of a picture (H, W, 3) in [0, 1], aligned, (side, side, 3) in [0, 1]."""
    assert face.points is not None  # as found_in has seen
    return torch.from_numpy(aligned(pixels_of(picture).numpy(), face.points, side)).float() / 255


def square_of_mask(mask: torch.Tensor) -> Square:
    """The smallest square with all that a mask (H, W) marks, inside the picture where it can be."""
    rows, columns = (torch.nonzero(mask.amax(axis) > 0.5 * mask.max()).flatten() for axis in (1, 0))
    return _square_around(
        (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1), _size(mask)
    )


def square_of_head(picture: torch.Tensor, face: Face, others: Sequence[Face]) -> Square:
    """The same of the head in a picture (H, W, 3), as :func:`faces.heads.head_region` marks it.

    ``others`` are the other faces of the picture.
    """
    inside, left, top, step = head_region(picture, face, others)
    spans = [np.flatnonzero(inside.any(axis)) for axis in (1, 0)]
    if not len(spans[0]):  # another face lies on it
        return head_square(face, 0, _size(picture))
    ends = [
        (max(0, start + int(span[0]) * step), min(length, start + (int(span[-1]) + 1) * step))
        for span, start, length in zip(spans, (top, left), picture.shape, strict=False)
    ]
    if any(last <= first for first, last in ends):  # only what is beyond the borders
        return head_square(face, 0, _size(picture))
    return _square_around(ends[0], ends[1], _size(picture))


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 112, 112, 3) in [0, 1] as encoders take them, (N, 3, 112, 112) in [-1, 1]."""
    return (pictures.float() * 2 - 1).movedim(-1, 1).contiguous()


def around_head(picture: torch.Tensor, square: Square, longest: int) -> torch.Tensor:
    """The head with some room around it, at most ``longest`` pixels a side, for a thumbnail."""
    left, top, side = square
    room = round(side * ROOM)
    wide = min(side + 2 * room, *picture.shape[:2])
    middles = top + side / 2, left + side / 2
    rows, columns = (
        min(max(round(middle - wide / 2), 0), length - wide)
        for middle, length in zip(middles, picture.shape, strict=False)
    )
    return crop(picture, (columns, rows, wide), min(wide, longest))


def _chosen(photo: Photo, faces: Sequence[Face], choice: Choice, name: str, kind: str) -> Face:
    if not faces:
        masks = ", connect a mask of the head" if kind == "head" else ""
        raise SeFiError(
            f"no face was found in {name}: use a photo in which the face is sharp, upright, seen "
            "from the front and neither tiny nor cut off by the borders (where it fills the photo, "
            f"add a margin with Pad Image for Outpainting){masks}, or choose another detector"
        )
    if photo.mask is None:
        size = _size(photo.picture)
        return choose(faces, choice.which_face, choice.face_index, size, name)[0]
    shares = [share_in_mask(face, photo.mask) for face in faces]
    most = max(shares)
    if most < LEAST_IN_MASK:
        raise SeFiError(
            f"no face was found in the mask of {name}, only outside of it: mark a face that is "
            "sharp and seen from the front, or disconnect masks"
        )
    near = [face for face, share in zip(faces, shares, strict=True) if share >= AS_MUCH * most]
    return choose(near, "largest", 0, _size(photo.picture), name)[0]


def share_in_mask(face: Face, mask: torch.Tensor) -> float:
    """How much of a face's oval lies in a mask (H, W), from 0 to 1."""
    inside, left, top, step = region_of(face, "oval")
    rows, columns = np.nonzero(inside)
    total = len(rows)
    rows, columns = rows * step + step // 2 + top, columns * step + step // 2 + left
    there = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    marked = mask[torch.from_numpy(rows[there]), torch.from_numpy(columns[there])]
    return float(marked.sum() / mask.max()) / max(1, total)


def _square_around(
    rows: tuple[int, int], columns: tuple[int, int], size: tuple[int, int]
) -> Square:
    """The square in the middle of these rows and columns, moved inside as far as it fits."""
    side = max(rows[1] - rows[0], columns[1] - columns[0])
    top, left = (
        (length - side) // 2
        if side > length
        else min(max((first + last - side) // 2, 0), length - side)
        for (first, last), length in zip((rows, columns), size, strict=True)
    )
    return left, top, side


def _can_be_aligned(face: Face) -> bool:
    points = face.points
    return points is not None and bool(np.isfinite(points).all() and np.ptp(points, axis=0).any())


def _size(picture: torch.Tensor) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]
