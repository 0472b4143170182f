"""What a detector says about a face, and the choice among several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Protocol

import numpy as np

from ..errors import SeFiError

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

    @property
    def area(self) -> float:
        return self.width * self.height


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
        return [max(by_place, key=lambda face: face.area)]
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
