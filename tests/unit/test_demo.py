"""The parts of ``make demo`` that need no server."""

from PIL import Image
from sefi_ide.tools.demo import upright

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
