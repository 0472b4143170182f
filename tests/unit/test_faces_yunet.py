"""YuNet on a face that is drawn by formula; its figures on photos are those of ``tests/photos``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sefi_ide.sefi_core.faces import yunet
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.tests.unit.face_drawing import drawn, places

EXPECTED = Path(__file__).with_name("face_networks.safetensors")
# One line in so many cells of each stride is kept in the file of what onnxruntime answered.
KEPT = {8: 40, 16: 10, 32: 3}


@pytest.fixture(scope="module")
def detector():
    return YuNetDetector()


def only(faces):
    assert len(faces) == 1
    return faces[0]


def test_the_network_answers_as_the_onnx_file_does():
    """``face_networks.safetensors`` holds onnxruntime's answers for the same picture."""
    picture = torch.from_numpy(drawn(640)).movedim(-1, 0).flip(0)[None].float()
    with torch.no_grad():
        levels = yunet.network()(picture)
    expected = load_file(EXPECTED)
    for stride, level in zip(yunet.STRIDES, levels, strict=True):
        answer = level.reshape(-1, 16)[:: KEPT[stride]]
        torch.testing.assert_close(answer, expected[f"yunet_{stride}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [64, 200, 512, 1500])
@pytest.mark.parametrize("zoom", [0.3, 0.6, 1.0])
def test_a_face_and_its_points_in_pictures_of_any_size(detector, side, zoom):
    face = only(detector.detect(drawn(side, zoom)))
    width, height = 0.36 * zoom * side, 0.47 * zoom * side
    assert np.hypot(face.center[0] - side / 2, face.center[1] - side / 2) < 0.15 * height
    assert face.height == pytest.approx(height, rel=0.2)
    assert face.width == pytest.approx(width, rel=0.2)
    assert np.abs(face.points - places(side, zoom)).max() < 0.1 * height
    assert abs(face.roll) < 8


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_photo_that_lies_on_its_side(detector, quarters):
    """Its face is found with the points in place, not as some upright face of low score."""
    picture = drawn(512, 0.6)[:, 60:]  # wider than high, so that a mistaken axis shows
    height, width = picture.shape[:2]
    upright = only(detector.detect(picture))
    face = only(detector.detect(np.rot90(picture, quarters)))
    x, y = upright.points.T
    expected = {
        1: (y, width - x),
        2: (width - x, height - y),
        3: (height - y, x),
    }[quarters]
    np.testing.assert_allclose(face.points, np.stack(expected, 1), atol=1)
    turned = (face.roll - upright.roll + 90 * quarters) % 360
    assert min(turned, 360 - turned) < 2
    assert face.height == pytest.approx(upright.height, rel=0.05)


def test_a_face_that_fills_the_picture_is_found_with_a_margin(detector):
    picture = drawn(512, 1.6)
    assert not len(yunet._found(picture))
    face = only(detector.detect(picture))
    assert np.hypot(face.center[0] - 256, face.center[1] - 256) < 40
    assert np.abs(face.points - places(512, 1.6)).max() < 0.1 * face.height


def test_several_faces(detector):
    left, right = drawn(300, 0.6), drawn(300, 0.9)
    faces = sorted(detector.detect(np.concatenate([left, right], 1)), key=lambda one: one.center)
    assert [round(face.center[0] / 300, 1) for face in faces] == [0.5, 1.5]
    assert faces[0].height < faces[1].height
    # Left is left in the picture, whoever the eye belongs to.
    assert all(face.points[0, 0] < face.points[1, 0] for face in faces)
    assert all(face.points[3, 0] < face.points[4, 0] for face in faces)


POINTS = [20, 40, 40, 40, 30, 50, 22, 60, 38, 60]
WEAK, MIRRORED = [0.6, 10, 20, 50, 80, *POINTS], [0.55, 150, 20, 190, 80, *POINTS]
MARGIN = 67


def answers(monkeypatch, upright=None, mirrored=None, padded=None, turned=None):
    """What the detector makes of these findings in a picture of 200 x 100 pixels, marked left."""
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[:50, :50] = 255

    def found(given, long_side=640):
        row = None
        if given.shape[:2] == (100 + 2 * MARGIN, 200 + 2 * MARGIN):
            row = padded and [padded[0], *(value + MARGIN for value in padded[1:])]
        elif given.shape[:2] == (200, 100):
            row = turned if given[-1, 0, 0] else None  # by one quarter, not by three
        elif given[0, 0, 0]:
            row = upright
        elif given[0, -1, 0]:
            row = mirrored
        return np.array([row] if row else [], float).reshape(-1, 15)

    monkeypatch.setattr(yunet, "_found", found)
    return YuNetDetector().detect(picture)


def test_a_less_sure_face_counts_where_it_is_seen_mirrored_and_with_a_margin(monkeypatch):
    seen = answers(monkeypatch, WEAK, MIRRORED, [0.55, *WEAK[1:]])
    assert only(seen).center == (30, 50)
    assert only(seen).points[0].tolist() == [20, 40]


@pytest.mark.parametrize(
    "findings",
    [
        (WEAK, None, WEAK),
        (WEAK, MIRRORED, None),
        (WEAK, WEAK, WEAK),  # the mirror image has it on the same side: another thing
        (None, MIRRORED, WEAK),
        ([0.6, 10, 20, 24, 38, *POINTS], [0.6, 176, 20, 190, 38, *POINTS], WEAK),  # small
        (None, None, [0.75, 10, 20, 24, 38, *POINTS]),
        (None, None, None, [0.75, 10, 20, 24, 38, *POINTS]),
        (None, None, None, [0.65, 10, 20, 50, 80, *POINTS]),
    ],
)
def test_what_is_not_sure_enough_is_no_face(monkeypatch, findings):
    assert answers(monkeypatch, *findings) == []


def test_a_sure_face_counts_however_small_and_alone(monkeypatch):
    small = [0.95, 10, 20, 22, 36, *POINTS]
    assert only(answers(monkeypatch, small)).center == (16, 28)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (3000, 1), (3, 5), (640, 33), (31, 700)])
def test_odd_shapes_have_no_faces(detector, shape):
    assert detector.detect(np.full((*shape, 3), 127, np.uint8)) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_has_no_faces(detector, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (240, 320, 3), np.uint8)
    assert detector.detect(noise) == []


def test_the_weights_are_usable_outside_of_inference_mode():
    yunet.network.cache_clear()
    with torch.inference_mode():
        assert YuNetDetector().detect(drawn(200))
    assert not any(weight.is_inference() for weight in yunet.network().parameters())
