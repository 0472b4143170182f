"""From a batch of pictures to the masks and crops of the faces in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..checks import check_choice, check_number, check_whole
from ..errors import SeFiError
from ..images import in_colour, pixels_of
from .crop import crop, head_square, middle_square
from .face import WHICH, Detector, choose
from .regions import REGIONS, region_mask

logger = logging.getLogger(__name__)

NONE_FOUND = ("error", "whole picture")


@dataclass(frozen=True)
class Selection:
    """What to make of the faces; the inputs of SeFi Face Mask, and their defaults.

    ``grow`` and ``feather`` are in pixels of the picture, ``crop_size`` in pixels of the crop, and
    ``crop_margin`` is a share of the head's longer side.
    """

    which_face: str = "largest"
    face_index: int = 0
    region: str = "head"
    grow: int = 0
    feather: int = 0
    crop_size: int = 512
    crop_margin: float = 0.2
    none_found: str = "error"

    def __post_init__(self) -> None:
        check_choice("which_face", self.which_face, WHICH)
        check_choice("region", self.region, REGIONS)
        check_choice("none_found", self.none_found, NONE_FOUND)
        check_whole("face_index", self.face_index, 0, 999)
        check_whole("grow", self.grow, -4096, 4096)
        check_whole("feather", self.feather, 0, 4096)
        check_whole("crop_size", self.crop_size, 16, 4096)
        check_number("crop_margin", self.crop_margin, 0.0, 10.0)


@dataclass(frozen=True)
class Extraction:
    """``masks`` (pictures, height, width): the chosen faces of each picture together.
    ``crops`` (n, size, size, 3) and ``crop_masks`` (n, size, size): one per chosen face, in the
    order of the pictures and from left to right. ``count``: all faces found, chosen or not."""

    masks: torch.Tensor
    crops: torch.Tensor
    crop_masks: torch.Tensor
    count: int


def extract_faces(
    pictures: torch.Tensor,
    detector: Detector,
    selection: Selection,
    on_picture: Callable[[int], None] = lambda done: None,
) -> Extraction:
    """Find, choose, mask and crop the faces of ``pictures`` (pictures, height, width, channels).

    An alpha channel is left out; a single channel is taken as grey. ``on_picture`` is told the
    number of pictures that are done. Raises :class:`SeFiError` for pictures that cannot be used,
    for a face index that does not exist, and, if ``selection.none_found`` says so, for a picture
    without a face.
    """
    pictures = checked_pictures(pictures)
    height, width = size = pictures.shape[1], pictures.shape[2]
    masks, crops, crop_masks, count = [], [], [], 0
    for number, picture in enumerate(pictures, start=1):
        name = "the picture" if len(pictures) == 1 else f"picture {number} of the batch"
        pixels = pixels_of(picture).numpy()
        found = detector.detect(pixels)
        count += len(found)
        if found:
            chosen = choose(found, selection.which_face, selection.face_index, size, name)
            shapes = [
                (
                    region_mask(face, selection.region, size, selection.grow, selection.feather),
                    head_square(face, selection.crop_margin, size),
                )
                for face in chosen
            ]
        elif selection.none_found == "error":
            raise SeFiError(
                f"no face was found in {name} ({width} x {height} px): use a picture in which the "
                "face is larger, upright and seen from the front, choose another detector, or set "
                "none_found to 'whole picture'"
            )
        else:
            logger.warning("No face was found in %s: the whole picture is used.", name)
            shapes = [(np.ones(size, np.float32), middle_square(size))]
        masks.append(torch.from_numpy(np.max([mask for mask, _ in shapes], axis=0)))
        for mask, square in shapes:
            crops.append(crop(picture, square, selection.crop_size))
            one = crop(torch.from_numpy(mask)[..., None], square, selection.crop_size)
            crop_masks.append(one[..., 0])
        on_picture(number)
    return Extraction(torch.stack(masks), torch.stack(crops), torch.stack(crop_masks), count)


def checked_pictures(pictures: torch.Tensor) -> torch.Tensor:
    """``pictures`` as RGB float32 on the CPU, (pictures, height, width, 3), or a clear error."""
    if pictures.ndim != 4 or 0 in pictures.shape:
        raise SeFiError(
            f"image is empty or not a batch of pictures (its shape is {tuple(pictures.shape)}): "
            "connect a node that gives at least one picture"
        )
    pictures = pictures.detach().to("cpu", torch.float32)
    broken = [
        number for number, one in enumerate(pictures, start=1) if not torch.isfinite(one).all()
    ]
    if broken:
        raise SeFiError(
            f"image holds values that are not numbers (NaN or infinite) in picture {broken[0]}: "
            "check the node that made it, often a VAE decoding in half precision"
        )
    return in_colour(pictures)
