"""What a detector says about a face, and the choice among several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan2, cos, degrees, hypot, radians, sin, sqrt
from typing import Protocol

import numpy as np

from ..errors import SeFiError

# Width through height of a face seen from the front.
ASPECT = 0.76

WHICH = ("largest", "most central", "left to right", "all")


@dataclass(frozen=True)
class Face:
    """A face in a picture, in pixels; y grows downwards.

    ``center``, ``width`` (cheek to cheek) and ``height`` (hairline to chin) describe an upright
    ellipse that is then turned clockwise by ``roll`` degrees. ``landmarks`` are the 106 points of
    an outline and its features, (106, 2), or None. ``points`` are the five that recognition
    models align a face by, (5, 2), or None; as seen in the picture, with the face upright: left
    eye, right eye, tip of the nose, left and right corner of the mouth.
    """

    center: tuple[float, float]
    width: float
    height: float
    roll: float = 0.0
    landmarks: np.ndarray | None = None
    points: np.ndarray | None = None

    def scaled(self, factor: float) -> Face:
        """The same face in the picture at ``factor`` times its size."""
        return Face(
            (self.center[0] * factor, self.center[1] * factor),
            self.width * factor,
            self.height * factor,
            self.roll,
            *(None if one is None else one * factor for one in (self.landmarks, self.points)),
        )


class Detector(Protocol):
    """Finds the faces of one picture."""

    def detect(self, picture: np.ndarray) -> list[Face]:
        """The faces of an RGB picture (height, width, 3), uint8, in any order."""
        ...


def choose(
    faces: Sequence[Face], which: str, index: int, size: tuple[int, int], picture: str
) -> list[Face]:
    """The faces that ``which`` (one of :data:`WHICH`) means.

    ``index`` counts from 0 at the left and is used by "left to right" only; ``size`` is the
    picture's (height, width) and ``picture`` its name in the error that an index out of range
    raises.
    """
    by_place = sorted(faces, key=lambda face: face.center)
    if which == "all" or not faces:
        return by_place
    if which == "largest":
        # By height: who turns the head aside is narrower, and not smaller.
        return [max(by_place, key=lambda face: face.height)]
    if which == "most central":
        middle_x, middle_y = size[1] / 2, size[0] / 2
        return [
            min(
                by_place,
                key=lambda face: hypot(face.center[0] - middle_x, face.center[1] - middle_y),
            )
        ]
    if not 0 <= index < len(by_place):
        last = len(by_place) - 1
        raise SeFiError(
            f"face_index is {index}, but {picture} has {len(by_place)} "
            f"face{'' if last == 0 else 's'}: set face_index to "
            f"{'0' if last == 0 else f'a number from 0 (leftmost) to {last}'}"
        )
    return [by_place[index]]


def face_in_box(
    box: np.ndarray, five: np.ndarray | None, landmarks: np.ndarray | None = None
) -> Face:
    """A face from a detector's box (left, top, right, bottom) and its five points, in pixels."""
    left, top, right, bottom = (float(v) for v in box)
    width, height, roll = right - left, bottom - top, 0.0
    if five is not None:
        eyes, mouth = five[:2].mean(0), five[3:].mean(0)
        # From the line between eyes and mouth: it keeps its direction when the head turns aside.
        roll = degrees(atan2(eyes[0] - mouth[0], mouth[1] - eyes[1]))
        width, height = _upright(width, height, roll)
    return Face(((left + right) / 2, (top + bottom) / 2), width, height, roll, landmarks, five)


def _upright(width: float, height: float, roll: float) -> tuple[float, float]:
    """Width and height of the ellipse that, turned by ``roll`` degrees, has this bounding box."""
    c, s = cos(radians(roll)) ** 2, sin(radians(roll)) ** 2
    if c - s > 0.5:
        squared = (
            (c * width**2 - s * height**2) / (c - s),
            (c * height**2 - s * width**2) / (c - s),
        )
        if squared[0] > 0.25 * squared[1] > 0.05 * squared[0]:
            return sqrt(squared[0]), sqrt(squared[1])
    # Near 45 degrees the box says only how large the face is.
    upright = sqrt((width**2 + height**2) / (1 + ASPECT**2))
    return ASPECT * upright, upright
