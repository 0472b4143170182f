"""The parts of ``make demo`` that need no server."""

import pytest
import skimage.data
from PIL import Image
from sefi_ide.sefi_core.faces.recognition import SFACE
from sefi_ide.tests.unit.recognition_models import save_recogniser
from sefi_ide.tools.demo import likeness, upright

ORIENTATION = 0x0112


def test_a_photo_taken_sideways_is_turned(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # its top is at the right
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (20, 0, 40, 20))
    picture.save(tmp_path / "photo.png", exif=exif)
    turned = upright(tmp_path / "photo.png")
    assert turned.size == (20, 40) and turned.mode == "RGB"
    assert turned.getpixel((10, 5)) == (0, 0, 255) and turned.getpixel((10, 35)) == (255, 0, 0)


def test_likeness_where_there_is_a_model(tmp_path, capsys):
    """The model of the test embeds mean colours, so that the same face is as alike as can be."""
    photo = Image.fromarray(skimage.data.astronaut())
    empty = Image.new("RGB", (64, 64))
    assert likeness([photo], photo, tmp_path) is None
    assert f"put {SFACE.files[0]} into {tmp_path / 'face_recognition'}" in capsys.readouterr().out
    save_recogniser(tmp_path / "face_recognition" / SFACE.files[0])
    found = likeness([photo, empty], photo, tmp_path)
    assert found == pytest.approx(SFACE.likeness(1) / 2, abs=2e-3)
    assert "no face" in capsys.readouterr().out
    assert likeness([photo], empty, tmp_path) is None
    assert "no face was found in reference" in capsys.readouterr().out
