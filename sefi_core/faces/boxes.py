"""Faces from boxes that another detector has found."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np

from ..errors import SeFiError, quoted
from .face import Face, face_in_box


def faces_in_boxes(boxes: Any, pictures: int) -> list[list[Face]]:
    """The faces of each of ``pictures`` pictures from ComfyUI's BOUNDING_BOX.

    That is a mapping of x and y (left and top), width and height in pixels, a list of such for all
    pictures alike, or a list of such lists, one for each picture. Raises :class:`SeFiError` for
    anything else, and for lists that are fewer or more than the pictures.
    """
    if isinstance(boxes, Mapping):
        boxes = [boxes]
    if not isinstance(boxes, (list, tuple)):
        raise SeFiError(f"boxes is {quoted(type(boxes).__name__)}: connect a BOUNDING_BOX")
    if not boxes or isinstance(boxes[0], Mapping):
        boxes = [boxes] * pictures
    if len(boxes) != pictures:
        raise SeFiError(
            f"boxes has {len(boxes)} lists for {pictures} picture{'' if pictures == 1 else 's'}: "
            "connect the boxes of a node that was given the same image"
        )
    return [[_face(box) for box in one or ()] for one in boxes]


def _face(box: Any) -> Face:
    try:
        left, top, width, height = (float(box[name]) for name in ("x", "y", "width", "height"))
    except (TypeError, KeyError, ValueError) as error:
        raise SeFiError(
            f"boxes has {quoted(box)}, which is no box with x, y, width and height: connect a "
            "BOUNDING_BOX"
        ) from error
    if not all(map(isfinite, (left, top, width, height))) or width < 1 or height < 1:
        raise SeFiError(
            f"boxes has a box of {width:g} x {height:g} pixels at {left:g}, {top:g}: connect boxes "
            "of at least one pixel"
        )
    return face_in_box(np.array([left, top, left + width, top + height]), None)
