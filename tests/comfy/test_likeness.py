"""SeFi Likeness in ComfyUI: its models, its outputs, its errors, and SFace itself."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from sefi_ide.nodes.likeness import SeFiLikeness
from sefi_ide.sefi_core.comfyui import likeness
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.alignment import TEMPLATE, aligned
from sefi_ide.sefi_core.faces.face import Face
from sefi_ide.sefi_core.faces.recognition import SFACE, FaceEncoder
from sefi_ide.tests.sface import sface_file
from sefi_ide.tests.unit.recognition_models import save_recogniser

pytestmark = pytest.mark.usefixtures("inference_mode")


class OneFace:
    """Takes every picture that is not black for a face that fills it."""

    def detect(self, picture):
        scale = picture.shape[0] / 112
        face = Face((56 * scale, 56 * scale), 70 * scale, 90 * scale, points=TEMPLATE * scale)
        return [face] if picture.any() else []


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty {models} folder, and a detector that needs no photos."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(likeness, "YuNetDetector", OneFace)
    return tmp_path


@pytest.fixture
def colours(models):
    """The recogniser whose embeddings are mean colours."""
    return save_recogniser(models / "face_recognition" / SFACE.files[0])


def flat(*colours):
    return torch.tensor(colours, dtype=torch.float32)[:, None, None].expand(-1, 112, 112, 3).clone()


RED, GREEN, ORANGE, BLACK = (0.8, 0, 0), (0, 0.8, 0), (0.8, 0.4, 0), (0, 0, 0)


def execute(reference, images, **settings):
    return SeFiLikeness.execute(reference, images, **settings).result


def test_the_best_come_first_and_the_numbers_stay_in_order(colours):
    images = flat(GREEN, BLACK, RED, ORANGE)
    kept, sheet, index, best, numbers, table = execute(flat(RED), images)
    assert torch.equal(kept, images[[2, 3, 0, 1]])
    assert index == 2 and best == pytest.approx(SFACE.likeness(1.0), abs=1e-3)
    wanted = [SFACE.likeness(0), 0, SFACE.likeness(1), SFACE.likeness(0.8 / np.hypot(0.8, 0.4))]
    assert numbers == pytest.approx(wanted, abs=5e-3)
    assert sheet.ndim == 4 and sheet.shape[-1] == 3 and 0 <= sheet.min() <= sheet.max() <= 1
    assert table.splitlines()[-1] == "| 4 | 1 | no face | yes |"


def test_threshold_and_keep(colours):
    images = flat(GREEN, BLACK, RED, ORANGE)
    assert torch.equal(execute(flat(RED), images, keep=2)[0], images[[2, 3]])
    assert torch.equal(execute(flat(RED), images, threshold=1.3)[0], images[[2]])
    assert torch.equal(execute(flat(GREEN), images, threshold=2.0)[0], images[[0]])


def test_no_picture_has_a_face(colours):
    kept, _, index, best, numbers, _ = execute(flat(RED), flat(BLACK, BLACK))
    assert len(kept) == 2 and (index, best, numbers) == (0, 0.0, (0.0, 0.0))


def test_copying_needs_other_photos_than_the_training_photo(colours):
    images, training = flat(RED, ORANGE), flat(RED)
    table = execute(flat(ORANGE), images, training_photo=training)[5]
    assert "copying" in table and "| 1.000 |" in table
    assert "copying" not in execute(flat(RED), images, training_photo=training)[5]


def test_alpha_and_grey_pictures_are_taken(colours):
    red = torch.cat([flat(RED), torch.zeros(1, 112, 112, 1)], -1)
    assert execute(red, red)[3] == pytest.approx(SFACE.likeness(1), abs=1e-3)
    assert execute(flat(RED)[..., :1], flat((0.8, 0.8, 0.8)))[3] == pytest.approx(
        SFACE.likeness(1), abs=1e-3
    )


@pytest.mark.parametrize("name", ["images", "reference", "training_photo"])
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (torch.zeros(0, 8, 8, 3), "is empty"),
        (torch.zeros(8, 8, 3), r"a tensor of the shape \(8, 8, 3\): connect an IMAGE"),
        (torch.full((1, 8, 8, 3), torch.nan), "not numbers"),
        ("text", "a str: connect an IMAGE"),
    ],
)
def test_what_is_no_picture_is_named(colours, name, wrong, why):
    inputs = {"images": flat(RED), "reference": flat(RED), name: wrong}
    with pytest.raises(SeFiError, match=f"SeFi Likeness: {name} .*{why}"):
        execute(**inputs)


def test_a_reference_without_a_face_is_named(colours):
    with pytest.raises(SeFiError, match="SeFi Likeness: no face was found in photo 2 of reference"):
        execute(flat(RED, BLACK), flat(RED))


@pytest.mark.parametrize(
    "wrong",
    [
        {"encoder": "dlib"},
        {"threshold": float("nan")},
        {"threshold": 3},
        {"keep": -1},
        {"keep": 1.5},
    ],
)
def test_settings_out_of_range_are_named(colours, wrong):
    with pytest.raises(SeFiError, match=f"SeFi Likeness: {next(iter(wrong))}"):
        execute(flat(RED), flat(RED), **wrong)


def test_unconnected_settings_are_the_defaults(colours):
    assert execute(flat(RED), flat(RED), encoder=None, threshold=None, keep=None)[2] == 0


def test_missing_models_name_the_file_and_the_folder(models):
    with pytest.raises(SeFiError, match="nothing is downloaded") as error:
        execute(flat(RED), flat(RED))
    assert SFACE.files[0] in str(error.value)
    assert str(models / "face_recognition") in str(error.value)
    with pytest.raises(SeFiError, match="w600k_r50.onnx") as error:
        execute(flat(RED), flat(RED), encoder="insightface")
    assert str(models / "insightface" / "models" / "buffalo_l") in str(error.value)


def test_auto_takes_sface_first_and_insightface_where_it_is_not(models):
    pack = models / "insightface" / "models" / "buffalo_l"
    prints = [SeFiLikeness.fingerprint_inputs()]
    save_recogniser(pack / "w600k_r50.onnx")
    prints.append(SeFiLikeness.fingerprint_inputs())
    assert likeness.open_encoder("auto").kind.id == "insightface"
    save_recogniser(models / "face_recognition" / SFACE.files[0])
    prints.append(SeFiLikeness.fingerprint_inputs())
    assert likeness.open_encoder("auto").kind.id == "sface"
    assert likeness.open_encoder("insightface").kind.id == "insightface"
    assert len(set(prints)) == 3 and SeFiLikeness.fingerprint_inputs() == prints[-1]


def test_a_folder_of_extra_model_paths(models, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    save_recogniser(elsewhere / SFACE.files[0])
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "face_recognition", ([str(elsewhere)], {".onnx"})
    )
    assert execute(flat(RED), flat(RED))[2] == 0


def test_cancelling_stops_after_the_picture(colours):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(flat(RED), flat(RED))


# From here on with the real model.


@pytest.fixture(scope="module")
def sface():
    return FaceEncoder(SFACE, sface_file(), use_gpu=False)


ASTRONAUT = np.array([[207, 108], [249, 104], [235, 133], [213, 154], [251, 150]])


def test_sface_knows_a_photo_again_however_it_is_saved_turned_and_lit(sface):
    photo = skimage.data.astronaut()
    first = sface.embed(aligned(photo, ASTRONAUT))
    small = np.asarray(Image.fromarray(photo).resize((384, 384)))
    turned = np.ascontiguousarray(np.rot90(photo, -1))
    rotated = np.stack([511 - ASTRONAUT[:, 1], ASTRONAUT[:, 0]], 1)
    darker = (photo * 0.6).astype(np.uint8)
    for other, points, least in (
        (small, ASTRONAUT * 0.75, 0.9), (turned, rotated, 0.95), (darker, ASTRONAUT, 0.9),
    ):  # fmt: skip
        assert first @ sface.embed(aligned(other, points)) > least
    upside_down = sface.embed(aligned(photo, ASTRONAUT[[4, 3, 2, 1, 0]]))
    assert first @ upside_down < 0.5
