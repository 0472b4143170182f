"""SeFi Face Mask in ComfyUI: its detectors, folders and errors."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import comfy.model_management
import execution
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import io
from PIL import Image
from sefi_ide.nodes.face_mask import SeFiFaceMask
from sefi_ide.sefi_core.comfyui import faces
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces import insight
from sefi_ide.tests.unit.face_models import red_squares, save_detector, save_landmarks

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty {models} folder."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


def execute(image, **changes):
    arguments = {
        "detector": "auto", "which_face": "largest", "face_index": 0, "region": "face", "grow": 0,
        "feather": 0, "none_found": "error", "crop_size": 64, "crop_margin": 0.2, "boxes": None,
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


def test_the_node_shows_the_mask_over_the_photo(astronaut, models):
    out = SeFiFaceMask.execute(
        astronaut, "auto", which_face="largest", face_index=0, region="head", grow=0, feather=0,
        none_found="error", crop_size=64,
    )  # fmt: skip
    (saved,) = out.ui.as_dict()["images"]
    file = Path(folder_paths.get_temp_directory(), saved["subfolder"], saved["filename"])
    shown = torch.from_numpy(np.asarray(Image.open(file)).astype(np.float32) / 255)
    mask = out.result[0][0].bool()
    torch.testing.assert_close(shown[mask], astronaut[0][mask], atol=0.01, rtol=0)
    assert shown[~mask].mean() < astronaut[0][~mask].mean() / 2


@pytest.mark.parametrize("detector", ["auto", "yunet", "lbp cascade"])
def test_the_astronaut(astronaut, models, detector):
    """The last is what workflows of former versions say."""
    assert SeFiFaceMask.validate_inputs(detector=detector) is True
    mask, crop, crop_mask, count = execute(astronaut, detector=detector, crop_size=128)
    assert mask.shape == (1, 512, 512) and crop.shape == (1, 128, 128, 3)
    assert crop_mask.shape == (1, 128, 128) and count == 1
    rows, columns = np.nonzero(mask[0].numpy() > 0.5)
    assert abs(columns.mean() - 222) < 15 and abs(rows.mean() - 117) < 20
    # The crop shows the head: its face is in the middle and covers a good part of it.
    rows, columns = np.nonzero(crop_mask[0].numpy() > 0.5)
    assert abs(columns.mean() - 64) < 16 and abs(rows.mean() - 70) < 20
    assert 0.08 < crop_mask.mean() < 0.5


def test_a_former_detector_is_taken_by_comfyui(models):
    """A prompt for the API that says so passes ComfyUI's own check of the options."""

    def checked(detector):
        prompt = {
            "1": {"class_type": "EmptyImage", "inputs": {
                "width": 64, "height": 64, "batch_size": 1, "color": 0,
            }},
            "2": {
                "class_type": "SeFiFaceMask",
                "inputs": {
                    "image": ["1", 0], "detector": detector, "which_face": "largest",
                    "face_index": 0, "region": "head", "grow": 0, "feather": 0,
                    "none_found": "error", "crop_size": 512,
                },
            },
        }  # fmt: skip
        with mock.patch.dict(nodes.NODE_CLASS_MAPPINGS, {"SeFiFaceMask": SeFiFaceMask}):
            return asyncio.run(execution.validate_inputs("prompt", prompt, "2", {}))

    for detector in ("lbp cascade", "auto", "yunet", "insightface", ["1", 0]):
        valid, errors, _ = checked(detector)
        assert valid or detector == ["1", 0], errors  # a picture is no name, so ComfyUI says
    valid, errors, _ = checked("haar")
    assert not valid and "choose one of auto, yunet, insightface" in str(errors)


def test_boxes_are_used_instead_of_the_detector(models):
    """As core's MediaPipeFaceLandmarker gives them: a list for each picture."""
    box = {"x": 30.0, "y": 20.0, "width": 20.0, "height": 26.0, "label": "face", "score": 0.9}
    grey = torch.full((1, 64, 96, 3), 0.5)
    mask, crop, crop_mask, count = execute(grey, boxes=[[box]], detector="insightface")
    assert count == 1 and mask[0, 33, 40] == 1 and mask[0, 33, 70] == 0
    with pytest.raises(SeFiError, match="SeFi Face Mask: boxes is 'str'"):
        execute(grey, boxes="here")


def test_boxes_are_a_socket_of_cores_type_without_a_widget():
    """A widget would move the values that saved workflows list by position."""
    kind, options = SeFiFaceMask.INPUT_TYPES()["optional"]["boxes"]
    assert kind == io.BoundingBox.io_type and options["forceInput"] and "default" not in options


def test_every_input_reaches_the_mask_and_the_crop(models):
    pytest.importorskip("insightface")
    save_detector(models / "insightface" / "buffalo_l" / "det_10g.onnx")
    picture = image(red_squares(640, 640, (160, 256), (448, 256)))
    second = {"which_face": "left to right", "face_index": 1, "detector": "insightface"}
    mask, crop, crop_mask, count = execute(picture, **second)
    assert count == 2 and mask[0, 256, 448] == 1 and mask[0, 256, 160] == 0
    for changes in (
        {"face_index": 0}, {"which_face": "all"}, {"grow": 10}, {"feather": 30},
        {"region": "head"}, {"region": "oval"},
    ):  # fmt: skip
        changed = execute(picture, **{**second, **changes})
        assert not torch.equal(changed[0], mask), changes
    wide = execute(picture, **second, crop_margin=1.0)
    assert torch.equal(wide[0], mask) and wide[2].mean() < 0.5 * crop_mask.mean()
    with pytest.raises(SeFiError, match="face_index is 2, but the picture has 2 faces"):
        execute(picture, **{**second, "face_index": 2})


def test_no_face(models):
    grey = torch.full((2, 64, 96, 3), 0.5)
    with pytest.raises(SeFiError, match="SeFi Face Mask: no face was found in picture 1"):
        execute(grey)
    mask, crop, crop_mask, count = execute(grey, none_found="whole picture")
    assert count == 0 and mask.min() == 1 and crop_mask.min() == 1 and crop.shape == (2, 64, 64, 3)


def test_bad_pictures_are_named(models):
    with pytest.raises(SeFiError, match="SeFi Face Mask: image is empty"):
        execute(torch.zeros(0, 8, 8, 3))
    for shape in ((8, 8, 3), (1, 1, 8, 8, 3)):
        with pytest.raises(SeFiError, match="SeFi Face Mask: image is a tensor of the shape"):
            execute(torch.zeros(shape))
    with pytest.raises(SeFiError, match="SeFi Face Mask: image holds values that are not numbers"):
        execute(torch.full((1, 8, 8, 3), torch.nan))


def test_missing_models_name_the_folder_and_the_file(models):
    with pytest.raises(SeFiError) as error:
        execute(torch.zeros(1, 8, 8, 3), detector="insightface")
    assert "SeFi Face Mask" in str(error.value) and "det_10g.onnx" in str(error.value)
    assert str(models / "insightface" / "models" / "buffalo_l") in str(error.value)


def test_without_insightface(models, monkeypatch):
    monkeypatch.setattr(insight, "is_installed", lambda: False)
    with pytest.raises(SeFiError, match="insightface is not installed: run 'pip install"):
        execute(torch.zeros(1, 8, 8, 3), detector="insightface")


def test_auto_is_insightface_for_a_face_that_its_landmarks_outline(models):
    pytest.importorskip("insightface")
    picture = image(red_squares(640, 640, (320, 256)))

    def is_found(**changes):
        return execute(picture, none_found="whole picture", **changes)[3] == 1

    prints = [fingerprint()]
    assert not is_found()  # YuNet sees no face in a red square
    folder = models / "insightface" / "models" / "buffalo_l"
    save_detector(folder / "det_10g.onnx")
    prints.append(fingerprint())
    assert not is_found() and is_found(detector="insightface")
    save_landmarks(folder / "2d106det.onnx")
    prints.append(fingerprint())
    assert is_found() and not is_found(region="head") and not is_found(region="oval")
    assert len(set(prints)) == 3 and fingerprint() == prints[-1]  # else ComfyUI runs it once
    assert fingerprint("yunet") == fingerprint("lbp cascade") == ""


def test_auto_is_yunet_where_insightface_is_broken(models, monkeypatch, astronaut, caplog):
    folder = models / "insightface" / "models" / "buffalo_l"
    folder.mkdir(parents=True)
    for name in ("det_10g.onnx", "2d106det.onnx"):
        (folder / name).write_bytes(b"not a model")
    monkeypatch.setattr(insight, "is_installed", lambda: True)
    with caplog.at_level(logging.WARNING, logger=faces.logger.name):
        assert execute(astronaut)[3] == 1
    assert "uses YuNet, because" in caplog.text


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


def test_faces_are_found_without_any_optional_package(monkeypatch, astronaut):
    """Neither insightface nor onnxruntime nor what comes with them is imported."""
    for name in [name for name in sys.modules if "sefi_core.faces" in name]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("skimage", "insightface", "onnxruntime", "onnx", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    module = import_module("sefi_ide.sefi_core.faces.extract")
    import_module("sefi_ide.sefi_core.faces.insight")
    detector = import_module("sefi_ide.sefi_core.faces.yunet").YuNetDetector()
    assert module.extract_faces(astronaut, detector, module.Selection()).count == 1


def test_finding_faces_needs_no_network(models, monkeypatch, astronaut):
    def refuse(*arguments):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert execute(astronaut, region="head")[3] == 1
