"""The region of a head: what is a person there, down to the chin.

A person is everything that :mod:`.person` takes for one: hair and headgear, but also neck,
shoulders, arms and whoever else is near. So only what is above the chin counts and what hangs
together with the face, nearer to it than to another face; and where others or arms are near, only
an ellipse of it.
The figures were chosen on eighteen heads drawn by hand (``tests/photos/heads.json``).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, hypot, radians, sin

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from .crop import Square, crop, square_around
from .face import Face
from .person import SIDE, person_in
from .regions import BELOW_CHIN, HAIR_ABOVE, HAIR_BESIDE, Region, cell_size

# Side of the square that is looked at, over the longer side of the head's ellipse.
AROUND = 1.5
PERSON = 0.5
# In heights of the face from its centre: where the chin ends, and how much higher the mask ends for
# every square of such a height to the side, as a jaw does; so that shoulders stay out.
CHIN, JAW = 0.5, 0.5
# In sizes of the head's ellipse: how far hair and hats reach, what is hardly of the head, and how
# much is taken when others are near.
FARTHEST, BEYOND, GROWN = 2.2, 1.7, 1.2
# In shares of the ellipse: more of a person beyond means arms or others.
MOST_BEYOND = 0.15
# In heights, the mean of both faces: another face so near is in the way.
NEAR = 2.5
# Less of the ellipse is a person: this is a drawing, or dark, and there is the ellipse only.
LEAST_PERSON = 0.5


def head_region(picture: torch.Tensor, face: Face, others: Sequence[Face]) -> Region:
    """The head of ``face`` in ``picture`` (height, width, 3), RGB in [0, 1].

    ``others`` are the other faces of the picture; none of them is in the region.
    """
    left, top, side = square_around(face, AROUND)
    step = cell_size(side)
    cells = -(-side // step)
    x, y = np.meshgrid(np.arange(cells, dtype=np.float32), np.arange(cells, dtype=np.float32))
    x, y = (x + 0.5) * step + left, (y + 0.5) * step + top
    beside, below = _upright(face, x, y)
    place = _in_head(face, beside, below)
    mine = np.ones_like(place, bool)
    for other in others:
        mine &= place < _in_head(other, *_upright(other, x, y))
    person = _person(picture, (left, top, side), cells * step, face.roll) > PERSON
    head = place < 1
    is_seen = person[head].sum() >= LEAST_PERSON * head.sum()
    if not is_seen:
        return Region(head & mine, left, top, step)
    above = below < CHIN - JAW * beside**2
    inside = _around_the_face(person & above & mine & (place < FARTHEST), head & mine & above)
    if _is_near(face, others) or (inside & (place > BEYOND)).sum() > MOST_BEYOND * head.sum():
        inside &= place < GROWN
    return Region(ndimage.binary_fill_holes(inside) & mine, left, top, step)


def _upright(face: Face, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the face's frame: to the right and down from its centre, in its heights."""
    c, s = cos(radians(face.roll)) / face.height, sin(radians(face.roll)) / face.height
    x, y = x - face.center[0], y - face.center[1]
    return x * c + y * s, y * c - x * s


def _in_head(face: Face, beside: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 in the middle of the ellipse of the head, 1 on its outline."""
    half_width = face.width / face.height / 2 + HAIR_BESIDE
    middle, half_height = (BELOW_CHIN - HAIR_ABOVE) / 2, (1 + HAIR_ABOVE + BELOW_CHIN) / 2
    return np.hypot(beside / half_width, (below - middle) / half_height)


def _person(picture: torch.Tensor, square: Square, covered: int, roll: float) -> np.ndarray:
    """How surely each cell is a person, for the cells of a grid that covers ``covered`` pixels."""
    left, top, side = square
    quarters = round(roll / 90)  # the network knows people who sit or stand
    seen = torch.rot90(crop(picture, (left, top, covered), SIDE), quarters)
    sure = torch.rot90(person_in(seen), -quarters).numpy()
    cells = -(-side // cell_size(side))
    return np.asarray(Image.fromarray(sure).resize((cells, cells), Image.Resampling.BILINEAR))


def _around_the_face(inside: np.ndarray, face: np.ndarray) -> np.ndarray:
    """The part of ``inside`` that has most of ``face``, of all that hangs together."""
    parts = np.zeros(inside.shape, np.int32)
    ndimage.label(inside, output=parts)
    sizes = np.bincount(parts[face & inside], minlength=1)
    return parts == sizes.argmax() if sizes.any() else inside


def _is_near(face: Face, others: Sequence[Face]) -> bool:
    return any(
        hypot(face.center[0] - other.center[0], face.center[1] - other.center[1])
        < NEAR * (face.height + other.height) / 2
        for other in others
    )
