"""From a batch of pictures to the masks and crops of the faces in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import check_choice, check_number, check_whole
from ..errors import SeFiError
from ..images import checked_pictures, pixels_of
from .boxes import faces_in_boxes
from .crop import crop, head_square, middle_square, reduced
from .face import WHICH, Detector, Face, choose
from .heads import head_region
from .regions import REGIONS, paint, region_of

logger = logging.getLogger(__name__)

# Of the longer side, for a detector; YuNet looks at 640, insightface's landmarks at each face.
MOST_PIXELS = 1280

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
    boxes: Any = None,
) -> Extraction:
    """Find, choose, mask and crop the faces of ``pictures`` (pictures, height, width, channels).

    An alpha channel is left out; a single channel is taken as grey. ``on_picture`` is told the
    number of pictures that are done. ``boxes``, a BOUNDING_BOX of ComfyUI, say where the faces are
    instead of the detector. Raises :class:`SeFiError` for pictures and boxes that cannot be used,
    for a face index that does not exist, and, if ``selection.none_found`` says so, for a picture
    without a face.
    """
    pictures = checked_pictures(pictures, "image")
    count, height, width = pictures.shape[:3]
    given = None if boxes is None else faces_in_boxes(boxes, count)
    masks = torch.zeros(count, height, width)
    crops, crop_masks, total = [], [], 0
    for number, picture in enumerate(pictures):
        name = "the picture" if count == 1 else f"picture {number + 1} of the batch"
        found = _found(picture, detector) if given is None else given[number]
        total += len(found)
        if found:
            chosen = choose(
                found, selection.which_face, selection.face_index, (height, width), name
            )
            squares = [head_square(face, selection.crop_margin, (height, width)) for face in chosen]
        elif selection.none_found == "error":
            raise SeFiError(_none_found(name, width, height, given is not None))
        else:
            logger.warning("No face was found in %s: the whole picture is used.", name)
            chosen, squares = [None], [middle_square((height, width))]
        for face, square in zip(chosen, squares, strict=True):
            # A mask of its own only where it is needed: a camera's has 90 MB.
            mask = masks[number] if len(chosen) == 1 else torch.zeros(height, width)
            if face is None:
                mask.fill_(1)
            else:
                others = [other for other in found if other is not face]
                is_head = selection.region == "head"
                region = (
                    head_region(picture, face, others)
                    if is_head
                    else region_of(face, selection.region)
                )
                paint(region, mask, selection.grow, selection.feather)
            if mask is not masks[number]:
                torch.maximum(masks[number], mask, out=masks[number])
            crops.append(crop(picture, square, selection.crop_size))
            one = crop(mask[..., None], square, selection.crop_size, empty_outside=True)
            crop_masks.append(one[..., 0])
        on_picture(number + 1)
    return Extraction(masks, torch.stack(crops), torch.stack(crop_masks), total)


def _found(picture: torch.Tensor, detector: Detector) -> list[Face]:
    """The faces of a picture (height, width, 3); a camera's is looked at in a smaller size."""
    small = reduced(picture, MOST_PIXELS)
    scale = picture.shape[0] / small.shape[0], picture.shape[1] / small.shape[1]
    faces = detector.detect(pixels_of(small).numpy())
    return faces if scale == (1, 1) else [face.scaled(sum(scale) / 2) for face in faces]


def _none_found(name: str, width: int, height: int, has_boxes: bool) -> str:
    if has_boxes:
        return (
            f"boxes has none for {name}: leave boxes unconnected, or set none_found to "
            "'whole picture'"
        )
    return (
        f"no face was found in {name} ({width} x {height} px): use a picture in which the face is "
        "seen from the front and neither tiny nor cut off by the borders (where it fills the "
        "picture, add a margin with Pad Image for Outpainting), choose another detector, or set "
        "none_found to 'whole picture'"
    )
