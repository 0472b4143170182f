"""How much pictures look like somebody, and how much they copy the photo that was learned.

**likeness** of a picture is the mean cosine of its face with the faces of the reference photos, on
a scale where 0 is a stranger and 1 another photo of the same person (:class:`recognition.Kind`).

**copying** says how much closer a picture is to the training photo t than to other photos r of the
person: ``(cos(p, t) - mean cos(p, r)) / (1 - mean cos(t, r))``. It is 1 for the training photo
itself and 0, give or take, for any other photo of the person. Reference photos that are the
training photo are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import SeFiError
from .faces.alignment import aligned
from .faces.face import Detector, Face, choose
from .faces.recognition import Kind
from .text.markdown import markdown_table

SAME_PHOTO = 0.97
"""Cosine from which two photos are taken for one and the same, saved or cut in two ways."""
LEAST = -1.0
"""A threshold that leaves nothing out."""


class Encoder(Protocol):
    """Gives embeddings of aligned faces; :class:`recognition.FaceEncoder` is one."""

    kind: Kind

    def embed(self, face: np.ndarray) -> np.ndarray:
        """The embedding (D,) of length 1 of an aligned RGB face (112, 112, 3), uint8."""
        ...


@dataclass(frozen=True)
class Judged:
    """What was found in one picture. Without a face ``face`` is None and ``likeness`` 0, since it
    is nobody's picture; ``copying`` is None where it was not asked for or cannot be told."""

    number: int
    """Of the picture in the batch, from 0."""
    face: Face | None = None
    likeness: float = 0.0
    copying: float | None = None


def judge(
    pictures: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    training: Sequence[np.ndarray],
    detector: Detector,
    encoder: Encoder,
    on_picture: Callable[[int], None] = lambda done: None,
) -> list[Judged]:
    """Likeness and copying of each of ``pictures``, in their order.

    All are RGB (height, width, 3), uint8. Of a reference or training photo the largest face counts
    (:func:`faces.face.choose`), of a picture the one that is most alike. ``training`` may be empty;
    of several photos the one that is copied most counts. ``on_picture`` is told how many of all are
    done. Raises :class:`SeFiError` for a reference or training photo without a face.
    """
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_picture(done)

    def known(photos: Sequence[np.ndarray], name: str) -> np.ndarray:
        found = []
        for number, photo in enumerate(photos, start=1):
            faces = _faces(photo, detector)
            if not faces:
                which = name if len(photos) == 1 else f"photo {number} of {name}"
                raise SeFiError(
                    f"no face was found in {which}: use a photo in which the face is sharp, "
                    "upright and seen from the front"
                )
            (largest,) = choose(faces, "largest", 0, photo.shape[:2], name)
            found.append(encoder.embed(aligned(photo, _points(largest))))
            step()
        return np.array(found)

    person = known(references, "reference")
    learned = known(training, "training_photo")
    judged = []
    for number, picture in enumerate(pictures):
        best = Judged(number)
        for face in _faces(picture, detector):
            embedding = encoder.embed(aligned(picture, _points(face)))
            likeness = encoder.kind.likeness(float((person @ embedding).mean()))
            if best.face is None or likeness > best.likeness:
                best = Judged(number, face, likeness, copying(embedding, learned, person))
        judged.append(best)
        step()
    return judged


def copying(embedding: np.ndarray, training: np.ndarray, person: np.ndarray) -> float | None:
    """How much a face (D,) copies one of the training photos (T, D), see above.

    ``person`` (M, D) are the reference photos. None without a training photo, or where every
    reference photo is one of them.
    """
    others = [one for one in person if not len(training) or (training @ one).max() < SAME_PHOTO]
    if not len(training) or not others:
        return None
    rest = np.array(others)
    near, usual = training @ embedding, float((rest @ embedding).mean())
    return float(((near - usual) / (1 - (rest @ training.T).mean(axis=0))).max())


def ranked(judged: Sequence[Judged], threshold: float = LEAST, keep: int = 0) -> list[Judged]:
    """The best first, those without a face last.

    What is below a ``threshold`` above :data:`LEAST` is left out, and so is all but the ``keep``
    best; 0 keeps all. The best of all stays, whatever the threshold.
    """
    order = sorted(judged, key=lambda one: (one.face is None, -one.likeness))
    if threshold > LEAST:
        passed = [one for one in order if one.face is not None and one.likeness >= threshold]
        order = passed or order[:1]
    return order[:keep] if keep else order


def words_of(one: Judged) -> str:
    """``0.83``, or ``no face``; with copying ``0.83, copying 0.12``."""
    if one.face is None:
        return "no face"
    copied = "" if one.copying is None else f", copying {one.copying:.2f}"
    return f"{one.likeness:.2f}{copied}"


def table(order: Sequence[Judged], kept: int) -> str:
    """One line for each picture, the best first, as a Markdown table; ``kept`` of them are kept."""
    with_copying = any(one.copying is not None for one in order)
    heads = ["rank", "picture", "likeness", *(["copying"] if with_copying else []), "kept"]
    lines = []
    for rank, one in enumerate(order, start=1):
        likeness = "no face" if one.face is None else f"{one.likeness:.3f}"
        copied = "" if one.copying is None else f"{one.copying:.3f}"
        kept_or_not = "yes" if rank <= kept else "no"
        lines.append(
            [str(rank), str(one.number), likeness, *([copied] if with_copying else []), kept_or_not]
        )
    return markdown_table(heads, lines)


def _faces(picture: np.ndarray, detector: Detector) -> list[Face]:
    return [face for face in detector.detect(picture) if _can_be_aligned(face)]


def _can_be_aligned(face: Face) -> bool:
    points = face.points
    return points is not None and bool(np.isfinite(points).all() and np.ptp(points, axis=0).any())


def _points(face: Face) -> np.ndarray:
    assert face.points is not None  # as _faces has seen
    return face.points
