"""SeFi Face Mask in ComfyUI: its detectors, folders and errors."""

from __future__ import annotations

import logging
import sys

import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from sefi_ide.nodes.face_mask import SeFiFaceMask
from sefi_ide.sefi_core.comfyui import faces
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces import insight
from sefi_ide.tests.unit.face_models import red_squares, save_detector, save_landmarks

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty {models} folder."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


def execute(image, **changes):
    arguments = {
        "detector": "auto", "which_face": "largest", "face_index": 0, "region": "face", "grow": 0,
        "feather": 0, "none_found": "error", "crop_size": 64, "crop_margin": 0.2,
    }  # fmt: skip
    assert arguments.keys() >= changes.keys()
    return SeFiFaceMask.execute(image, **{**arguments, **changes}).result


def fingerprint(detector="auto"):
    return SeFiFaceMask.fingerprint_inputs(image=None, detector=detector, region="face")


def image(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture[None] / np.float32(255))


@pytest.fixture(scope="module")
def astronaut():
    return image(pytest.importorskip("skimage.data").astronaut())


def test_the_astronaut_with_the_cascade(astronaut, models):
    mask, crop, crop_mask, count = execute(astronaut, detector="lbp cascade", crop_size=128)
    assert mask.shape == (1, 512, 512) and crop.shape == (1, 128, 128, 3)
    assert crop_mask.shape == (1, 128, 128) and count == 1
    rows, columns = np.nonzero(mask[0].numpy() > 0.5)
    assert abs(columns.mean() - 222) < 15 and abs(rows.mean() - 117) < 20
    # The crop shows the head: its face is in the middle and covers a good part of it.
    rows, columns = np.nonzero(crop_mask[0].numpy() > 0.5)
    assert abs(columns.mean() - 64) < 16 and abs(rows.mean() - 70) < 20
    assert 0.08 < crop_mask.mean() < 0.5


def test_every_input_reaches_the_mask_and_the_crop(models):
    pytest.importorskip("insightface")
    save_detector(models / "insightface" / "buffalo_l" / "det_10g.onnx")
    picture = image(red_squares(640, 640, (160, 256), (448, 256)))
    mask, crop, crop_mask, count = execute(picture, which_face="left to right", face_index=1)
    assert count == 2 and mask[0, 256, 448] == 1 and mask[0, 256, 160] == 0
    for changes in (
        {"face_index": 0}, {"which_face": "all"}, {"grow": 10}, {"feather": 30},
        {"region": "head"}, {"region": "oval"},
    ):  # fmt: skip
        changed = execute(picture, **{"which_face": "left to right", "face_index": 1, **changes})
        assert not torch.equal(changed[0], mask), changes
    wide = execute(picture, which_face="left to right", face_index=1, crop_margin=1.0)
    assert torch.equal(wide[0], mask) and wide[2].mean() < 0.5 * crop_mask.mean()
    with pytest.raises(SeFiError, match="face_index is 2, but the picture has 2 faces"):
        execute(picture, which_face="left to right", face_index=2)


def test_no_face(models):
    grey = torch.full((2, 64, 96, 3), 0.5)
    with pytest.raises(SeFiError, match="SeFi Face Mask: no face was found in picture 1"):
        execute(grey)
    mask, crop, crop_mask, count = execute(grey, none_found="whole picture")
    assert count == 0 and mask.min() == 1 and crop_mask.min() == 1 and crop.shape == (2, 64, 64, 3)


def test_bad_pictures_are_named(models):
    with pytest.raises(SeFiError, match="SeFi Face Mask: image is empty"):
        execute(torch.zeros(0, 8, 8, 3))
    with pytest.raises(SeFiError, match="SeFi Face Mask: image holds values that are not numbers"):
        execute(torch.full((1, 8, 8, 3), torch.nan))


def test_missing_models_name_the_folder_and_the_file(models):
    with pytest.raises(SeFiError) as error:
        execute(torch.zeros(1, 8, 8, 3), detector="insightface")
    assert "SeFi Face Mask" in str(error.value) and "det_10g.onnx" in str(error.value)
    assert str(models / "insightface" / "models" / "buffalo_l") in str(error.value)


def test_without_insightface(models, monkeypatch, caplog):
    monkeypatch.setattr(insight, "is_installed", lambda: False)
    with pytest.raises(SeFiError, match="insightface is not installed: run 'pip install"):
        execute(torch.zeros(1, 8, 8, 3), detector="insightface")
    with caplog.at_level(logging.INFO, logger=faces.logger.name):
        execute(torch.zeros(1, 32, 32, 3), none_found="whole picture")
    assert "uses the LBP cascade, because insightface is not installed" in caplog.text


def test_auto_uses_models_as_soon_as_they_are_there(models):
    pytest.importorskip("insightface")
    picture = image(red_squares(640, 640, (320, 256)))
    with pytest.raises(SeFiError, match="no face was found"):
        execute(picture)
    prints = [fingerprint()]
    folder = models / "insightface" / "models" / "buffalo_l"
    save_detector(folder / "det_10g.onnx")
    prints.append(fingerprint())
    first = execute(picture)
    assert first[3] == 1 and first[0][0, 256, 320] == 1
    save_landmarks(folder / "2d106det.onnx")
    prints.append(fingerprint())
    second = execute(picture)
    assert not torch.equal(first[0], second[0])  # now it follows the landmarks
    assert len(set(prints)) == 3 and fingerprint() == prints[-1]  # else ComfyUI runs it once
    assert fingerprint("lbp cascade") == ""


def test_models_in_a_folder_of_extra_model_paths(models, tmp_path, monkeypatch):
    pytest.importorskip("insightface")
    elsewhere = tmp_path / "elsewhere"
    save_detector(elsewhere / "buffalo_l" / "det_10g.onnx")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "insightface", ([str(elsewhere)], {".onnx"})
    )
    assert execute(image(red_squares(640, 640, (320, 256))), detector="insightface")[3] == 1


def test_cancelling_stops_after_the_picture(models):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(torch.full((3, 32, 32, 3), 0.5), none_found="whole picture")


def test_the_node_is_there_without_any_detector(monkeypatch):
    """Its module imports neither scikit-image nor insightface nor onnxruntime."""
    for name in [name for name in sys.modules if "sefi_core.faces" in name]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("skimage", "insightface", "onnxruntime", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    from importlib import import_module

    module = import_module("sefi_ide.sefi_core.faces.lbp")
    import_module("sefi_ide.sefi_core.faces.insight")
    with pytest.raises(module.SeFiError, match="scikit-image"):
        module.LbpDetector()
