import logging
import socket

import numpy as np
import pytest

pytest.importorskip("insightface")
pytest.importorskip("onnx")

from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces import insight
from sefi_ide.sefi_core.faces.insight import InsightDetector, ModelFiles, find_models
from sefi_ide.sefi_core.faces.regions import outline, region_mask
from sefi_ide.tests.unit.face_models import (
    FIVE,
    landmarks_106,
    red_squares,
    save_detector,
    save_landmarks,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("insightface") / "buffalo_l"
    return ModelFiles(
        save_detector(folder / "det_10g.onnx"), save_landmarks(folder / "2d106det.onnx")
    )


@pytest.fixture(scope="module")
def detector(models):
    return InsightDetector(models, use_gpu=False)


@pytest.fixture(scope="module")
def without_landmarks(models):
    return InsightDetector(ModelFiles(models.detector, None), use_gpu=False)


def test_box_at_the_size_of_the_network(without_landmarks):
    (face,) = without_landmarks.detect(red_squares(640, 640, (320, 256)))
    assert face.center == pytest.approx((320, 256), abs=0.01)
    assert (face.width, face.height) == pytest.approx((96, 128), abs=0.01)
    assert face.roll == pytest.approx(0, abs=1e-4)
    assert face.landmarks is None
    np.testing.assert_allclose(face.points, np.array(FIVE) * 32 + (320, 256), atol=0.01)


def test_box_in_a_wide_picture_that_is_scaled(without_landmarks):
    """320 x 160 pixels: the network sees them twice as large, and grey below."""
    (face,) = without_landmarks.detect(red_squares(160, 320, (160, 80), side=16))
    assert face.center == pytest.approx((160, 80), abs=0.01)
    assert (face.width, face.height) == pytest.approx((48, 64), abs=0.01)


def test_red_is_not_blue(without_landmarks):
    """The models want BGR turned into RGB; a picture handed over in the wrong order finds none."""
    assert without_landmarks.detect(red_squares(640, 640, (320, 256))[..., ::-1]) == []


def test_several_faces_and_none(without_landmarks):
    faces = without_landmarks.detect(red_squares(640, 640, (448, 320), (128, 128)))
    assert sorted(face.center for face in faces) == [
        pytest.approx((128, 128), abs=0.01),
        pytest.approx((448, 320), abs=0.01),
    ]
    assert without_landmarks.detect(red_squares(640, 640)) == []


def test_a_face_that_only_the_small_input_sees(without_landmarks):
    """Red dots that are too thin for the large input, and all that the small one samples."""
    picture = red_squares(640, 640)
    picture[162:320:5, 162:320:5] = 255, 0, 0
    (face,) = without_landmarks.detect(picture)
    assert face.center == pytest.approx((160, 160), abs=0.1)
    assert face.height == pytest.approx(4 * 32 * 640 / 128, abs=0.1)


@pytest.mark.parametrize("degrees", [-35, -10, 0, 25, 50])
def test_roll_comes_from_the_five_points(tmp_path, degrees):
    t = np.radians(degrees)
    turn = np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])
    upright = np.array([(-0.6, -0.5), (0.6, -0.5), (0.0, 0.2), (-0.5, 1.0), (0.5, 1.0)])
    # The box around an upright ellipse of half axes 1.5 and 2, turned.
    half_width = np.hypot(1.5 * np.cos(t), 2 * np.sin(t))
    half_height = np.hypot(1.5 * np.sin(t), 2 * np.cos(t))
    path = save_detector(
        tmp_path / "det_10g.onnx",
        (half_width, half_height, half_width, half_height),
        upright @ turn,
    )
    detector = InsightDetector(ModelFiles(path, None), use_gpu=False)
    (face,) = detector.detect(red_squares(640, 640, (320, 256)))
    assert face.roll == pytest.approx(degrees, abs=0.01)
    assert (face.width, face.height) == pytest.approx((96, 128), rel=0.03)


def test_landmarks_are_where_the_model_says(detector):
    (face,) = detector.detect(red_squares(640, 640, (320, 256)))
    # The landmark model sees a square of 1.5 times the box's longer side, from -1 to 1.
    expected = landmarks_106() * 1.5 * 128 / 2 + (320, 256)
    np.testing.assert_allclose(face.landmarks, expected, atol=0.5)


def test_the_mask_follows_the_landmarks(detector, without_landmarks):
    picture = red_squares(640, 640, (320, 256))
    (face,) = detector.detect(picture)
    mask = region_mask(face, "face", (640, 640))
    rows, columns = np.nonzero(mask > 0.5)
    jaw = landmarks_106()[:33] * 96 + (320, 256)
    assert columns.min() == pytest.approx(jaw[:, 0].min(), abs=1.5)
    assert columns.max() == pytest.approx(jaw[:, 0].max(), abs=1.5)
    assert rows.max() == pytest.approx(jaw[:, 1].max(), abs=1.5)
    # Without landmarks it is an egg in the box, which is another shape.
    (boxed,) = without_landmarks.detect(picture)
    assert (mask > 0.5).sum() < 0.9 * (region_mask(boxed, "face", (640, 640)) > 0.5).sum()
    # There is a forehead above the topmost landmark.
    assert outline(face, "face")[:, 1].min() < face.landmarks[:, 1].min() - 10


@pytest.mark.parametrize(
    "layout", ["models/buffalo_l", "buffalo_l", "models/antelopev2/antelopev2"]
)
def test_models_are_found_in_every_layout(tmp_path, layout):
    file = tmp_path / layout / "det_10g.onnx"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_models([tmp_path / "elsewhere", tmp_path]) == ModelFiles(file, None)
    (file.parent / "2d106det.onnx").touch()
    assert find_models([tmp_path]).landmarks == file.parent / "2d106det.onnx"


def test_no_models(tmp_path):
    assert find_models([tmp_path, tmp_path / "missing"]) is None


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "det_10g.onnx"
    file.write_bytes(b"not a model")
    with pytest.raises(SeFiError, match=r"det_10g\.onnx cannot be read"):
        InsightDetector(ModelFiles(file, None))


def test_another_model_under_that_name(tmp_path, models):
    with pytest.raises(SeFiError, match="not the model that its name promises"):
        InsightDetector(ModelFiles(models.landmarks, None))


def test_the_log_names_the_execution_provider(models, caplog):
    with caplog.at_level(logging.INFO, logger=insight.logger.name):
        InsightDetector(models, use_gpu=False)
    assert "det_10g.onnx runs on onnxruntime's CPUExecutionProvider" in caplog.text
    assert "2d106det.onnx" in caplog.text


def test_opening_models_needs_no_network(models, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert InsightDetector(models, use_gpu=False).detect(red_squares(640, 640, (320, 256)))


def test_pictures_of_one_pixel_and_one_line(detector):
    assert detector.detect(np.zeros((1, 1, 3), np.uint8)) == []
    assert detector.detect(np.zeros((1, 2000, 3), np.uint8)) == []
