"""Which photo of a person tells who is in another one."""

from __future__ import annotations

import logging

import torch

from ...errors import SeFiError
from ...face2diffusion.training.data import Faces

logger = logging.getLogger(__name__)


def with_partners(faces: Faces) -> Faces:
    """The photos of people who have at least two.

    Raises :class:`SeFiError` where nobody has.
    """
    people = faces.people
    counts = torch.bincount(people, minlength=len(faces.names))
    kept = torch.nonzero(counts[people] > 1).flatten().tolist()
    if not kept:
        raise SeFiError(
            "nobody has two photos or more: give a folder with a subfolder of photos for each "
            "person, since a face is learned from another photo than the one to draw"
        )
    if left_out := len(faces) - len(kept):
        logger.warning("%d photos are left out, whose person has no other.", left_out)
    return faces.of(kept)


def partners(people: torch.Tensor) -> list[list[int]]:
    """For each photo the other ones of the same person; ``people`` (N,) says who is in each."""
    of_person: dict[int, list[int]] = {}
    for row, person in enumerate(people.tolist()):
        of_person.setdefault(person, []).append(row)
    return [
        [other for other in of_person[person] if other != row]
        for row, person in enumerate(people.tolist())
    ]
