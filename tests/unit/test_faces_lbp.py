"""The cascade on photographs that come with scikit-image and insightface."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.cascade import CascadeMargin

data = pytest.importorskip("skimage.data")

from sefi_ide.sefi_core.faces.lbp import CASCADE_FILE, LbpDetector  # noqa: E402

# Face centres and heights, in pixels, read off the pictures; in the group photo the last is
# almost in profile.
ASTRONAUT = [(222, 117, 98)]
GROUP = [
    (117, 331, 130),
    (309, 210, 116),
    (515, 345, 137),
    (784, 415, 117),
    (1175, 337, 118),
    (940, 130, 140),
]


@pytest.fixture(scope="module")
def detector():
    return LbpDetector()


def group_photo() -> np.ndarray:
    images = pytest.importorskip("insightface.data")
    return np.ascontiguousarray(images.get_image("t1", to_rgb=True))


def found(detector, picture, faces) -> tuple[list[bool], int]:
    """Which of ``faces`` were found, and the number of false alarms."""
    detected = detector.detect(picture)
    hits = [
        [
            np.hypot(face.center[0] - x, face.center[1] - y) < 0.3 * height
            and abs(np.log(face.height / height)) < 0.4
            for x, y, height in faces
        ]
        for face in detected
    ]
    return [any(column) for column in zip(*hits, strict=True)], sum(not any(row) for row in hits)


def test_the_group_photo_gives_its_six_faces(detector):
    hits, false_alarms = found(detector, group_photo(), GROUP)
    assert hits == [True] * 6 and false_alarms == 0


def test_mirrored_the_group_photo_gives_its_frontal_faces_and_nothing_else(detector):
    picture = group_photo()[:, ::-1]
    mirrored = [(picture.shape[1] - x, y, height) for x, y, height in GROUP]
    hits, false_alarms = found(detector, np.ascontiguousarray(picture), mirrored)
    assert hits[:5] == [True] * 5 and false_alarms == 0


@pytest.mark.parametrize("change", ["as it is", "mirrored", "half size", "dark", "turned"])
def test_the_astronaut_gives_one_face(detector, change):
    picture = Image.fromarray(data.astronaut())
    (x, y, height), width = ASTRONAUT[0], picture.width
    if change == "mirrored":
        picture, x = ImageOps.mirror(picture), width - x
    elif change == "half size":
        picture, x, y, height = picture.reduce(2), x / 2, y / 2, height / 2
    elif change == "dark":
        picture = picture.point(lambda value: value // 2)
    elif change == "turned":
        picture = picture.rotate(-8, Image.Resampling.BICUBIC)  # clockwise
        x, y = (
            256 + 0.99 * (x - 256) - 0.139 * (y - 256),
            256 + 0.139 * (x - 256) + 0.99 * (y - 256),
        )
    hits, false_alarms = found(detector, np.asarray(picture), [(x, y, height)])
    assert hits == [True] and false_alarms == 0


def test_a_turned_head_has_a_roll(detector):
    picture = Image.fromarray(data.astronaut()[:256, 96:352])
    upright, clockwise = (
        detector.detect(np.asarray(picture.rotate(angle, Image.Resampling.BICUBIC)))[0].roll
        for angle in (0, -14)
    )
    assert clockwise - upright == pytest.approx(14, abs=7)


@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket", "camera", "coins", "gravel"])
def test_pictures_without_a_face(detector, name):
    picture = getattr(data, name)()
    if picture.ndim == 2:
        picture = np.stack([picture] * 3, axis=-1)
    assert detector.detect(np.ascontiguousarray(picture)) == []


def test_noise_and_flat_pictures(detector):
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    assert detector.detect(noise) == []
    assert detector.detect(np.full((300, 200, 3), 90, np.uint8)) == []


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 700, 3), (23, 23, 3), (4000, 30, 3)])
def test_odd_sizes(detector, shape):
    assert detector.detect(np.full(shape, 128, np.uint8)) == []


def test_a_face_of_a_small_picture_is_found_enlarged(detector):
    """112 pixels, the face fills it."""
    pytest.importorskip("insightface")
    from insightface.data import get_image

    (face,) = detector.detect(np.ascontiguousarray(get_image("Tom_Hanks_54745", to_rgb=True)))
    assert face.center == pytest.approx((57, 60), abs=8) and 60 < face.height < 110


def test_the_margin_agrees_with_the_cascade(detector):
    """What scikit-image's cascade accepts has passed every stage, so its margin is positive."""
    from skimage.feature import Cascade

    file = Path(data.__file__).with_name(CASCADE_FILE)
    margin, cascade = CascadeMargin(file), Cascade(str(file))
    accepted, passed = [], []
    for patch in data.lfw_subset():
        picture = np.pad(patch, 4, mode="edge")
        windows = cascade.detect_multi_scale(picture, 1.5, 1, (24, 24), (25, 25), 0, 2.0)
        values = margin(picture[None], 1, 1)[0]
        assert all(values[window["r"], window["c"]] > 0 for window in windows)
        accepted.append(len(windows))
        passed.append(values.max())
    assert sum(accepted[:100]) > 100 > 10 * sum(accepted[100:])
    # Nearly all of the faces are above nearly all of the rest.
    assert np.percentile(passed[:100], 5) > np.percentile(passed[100:], 95)


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(SeFiError, match="needs scikit-image.*pip install scikit-image"):
        LbpDetector()


def test_a_scikit_image_without_the_cascade_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SeFiError, match=CASCADE_FILE):
        LbpDetector()
