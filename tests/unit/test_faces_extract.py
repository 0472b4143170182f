import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.crop import crop, head_square, middle_square, reduced
from sefi_ide.sefi_core.faces.extract import MOST_PIXELS, Selection, extract_faces
from sefi_ide.sefi_core.faces.face import Face, choose
from sefi_ide.sefi_core.images import resized
from sefi_ide.tools.comfyui import REPOSITORY

SMALL_LEFT = Face((40.0, 60.0), 20.0, 30.0)
LARGE_RIGHT = Face((240.0, 60.0), 40.0, 50.0)
MIDDLE = Face((155.0, 90.0), 30.0, 35.0)
SIZE = (180, 300)


class Finds:
    """A detector whose faces are known; they depend on the picture's brightness only."""

    def __init__(self, *faces):
        self.faces = list(faces)

    def detect(self, picture):
        assert picture.dtype == np.uint8 and picture.shape[-1] == 3
        return self.faces if picture.mean() > 10 else []


def pictures(count=1, size=SIZE, channels=3):
    torch.manual_seed(0)
    return torch.rand(count, *size, channels) * 0.5 + 0.25


@pytest.mark.parametrize(
    "which, index, expected",
    [
        ("largest", 0, [LARGE_RIGHT]),
        ("most central", 0, [MIDDLE]),
        ("left to right", 0, [SMALL_LEFT]),
        ("left to right", 2, [LARGE_RIGHT]),
        ("all", 0, [SMALL_LEFT, MIDDLE, LARGE_RIGHT]),
    ],
)
def test_choice(which, index, expected):
    faces = [LARGE_RIGHT, SMALL_LEFT, MIDDLE]
    assert choose(faces, which, index, SIZE, "the picture") == expected


def test_a_head_turned_aside_is_not_smaller():
    aside, small = Face((40.0, 60.0), 30.0, 60.0), Face((200.0, 60.0), 45.0, 50.0)
    assert choose([small, aside], "largest", 0, SIZE, "the picture") == [aside]


def test_an_index_out_of_range_says_which_there_are():
    selection = Selection(which_face="left to right", face_index=3)
    with pytest.raises(SeFiError, match=r"face_index is 3, but the picture has 2 faces.*0.* to 1"):
        extract_faces(pictures(), Finds(SMALL_LEFT, MIDDLE), selection)
    with pytest.raises(SeFiError, match="picture 1 of the batch has 1 face: set face_index to 0"):
        extract_faces(pictures(2), Finds(MIDDLE), selection)


def test_a_batch_with_all_faces():
    found = extract_faces(
        pictures(2), Finds(LARGE_RIGHT, SMALL_LEFT), Selection(which_face="all", crop_size=64)
    )
    assert found.count == 4
    assert found.masks.shape == (2, *SIZE)
    assert found.crops.shape == (4, 64, 64, 3) and found.crop_masks.shape == (4, 64, 64)
    assert found.masks[0, 60, 40] == 1 and found.masks[0, 60, 240] == 1
    assert found.masks[0, 60, 140] == 0
    # The crops are in order from left to right, and each mask shows its own face.
    for number, face in enumerate((SMALL_LEFT, LARGE_RIGHT)):
        alone = extract_faces(pictures(), Finds(face), Selection(crop_size=64))
        torch.testing.assert_close(found.crops[number], alone.crops[0])
        torch.testing.assert_close(found.crop_masks[number], alone.crop_masks[0])


def test_count_is_of_the_faces_found_and_not_of_those_chosen():
    found = extract_faces(pictures(3), Finds(SMALL_LEFT, MIDDLE), Selection(crop_size=16))
    assert found.count == 6 and len(found.crops) == 3


def test_none_found():
    batch = torch.cat([pictures(), torch.zeros(1, *SIZE, 3)])
    with pytest.raises(SeFiError, match=r"no face was found in picture 2 of the batch.*none_found"):
        extract_faces(batch, Finds(MIDDLE), Selection())
    found = extract_faces(batch, Finds(MIDDLE), Selection(none_found="whole picture", crop_size=90))
    assert found.count == 1
    assert found.masks[1].min() == 1 and found.crop_masks[1].min() == 1
    assert 0 < found.masks[0].mean() < 0.2


def test_bad_pictures():
    for shape in [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 0), (8, 8, 3), (1, 1, 8, 8, 3)]:
        with pytest.raises(SeFiError, match="image is empty or not a batch") as error:
            extract_faces(torch.zeros(shape), Finds(), Selection())
        assert str(shape) in str(error.value)
    with pytest.raises(SeFiError, match="image is empty or not a batch .* it is a list"):
        extract_faces([], Finds(), Selection())
    for value in (math.nan, math.inf):
        batch = pictures(2)
        batch[1, 5, 5, 0] = value
        with pytest.raises(SeFiError, match="not numbers.* in picture 2"):
            extract_faces(batch, Finds(MIDDLE), Selection())


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha(channels):
    batch = pictures(channels=channels)
    found = extract_faces(batch, Finds(MIDDLE), Selection(crop_size=32))
    assert found.crops.shape == (1, 32, 32, 3)
    rgb = batch[..., :3] if channels == 4 else batch.expand(-1, -1, -1, 3)
    expected = extract_faces(rgb.contiguous(), Finds(MIDDLE), Selection(crop_size=32))
    torch.testing.assert_close(found.crops, expected.crops)


def test_one_pixel():
    found = extract_faces(
        torch.full((1, 1, 1, 3), 0.5), Finds(), Selection(none_found="whole picture", crop_size=16)
    )
    assert found.masks.shape == (1, 1, 1)
    torch.testing.assert_close(found.crops, torch.full((1, 16, 16, 3), 0.5))


def test_inference_tensors_are_left_alone():
    with torch.inference_mode():
        batch = pictures() * 3 - 1  # out of range on both sides
        before = batch.clone()
        found = extract_faces(batch, Finds(MIDDLE), Selection(crop_size=32, feather=4))
    assert torch.equal(batch, before)
    assert 0 <= found.crops.min() and found.crops.max() <= 1


def test_the_square_is_moved_inside_where_it_fits():
    left, top, side = head_square(SMALL_LEFT, 0.1, SIZE)
    assert left >= 0 and top >= 0 and left + side <= SIZE[1] and top + side <= SIZE[0]
    inner = head_square(MIDDLE, 0.1, SIZE)
    # The head is in the middle of the square: it sits higher than the face.
    assert inner[0] + inner[2] / 2 == pytest.approx(155, abs=1)
    assert inner[1] + inner[2] / 2 < 90


def test_a_head_larger_than_the_picture_repeats_its_edge():
    picture = pictures(size=(40, 60))[0]
    square = head_square(Face((30.0, 20.0), 50.0, 60.0), 0.2, (40, 60))
    left, top, side = square
    assert side > 60 and top < 0 and left < 0
    result = crop(picture, square, side)
    assert torch.equal(result[-top : -top + 40, -left : -left + 60], picture)
    assert torch.equal(result[0, -left : -left + 60], picture[0])
    assert torch.equal(result[-1, -left : -left + 60], picture[-1])


@pytest.mark.parametrize("region", ["head", "oval"])
def test_a_crop_mask_is_nothing_outside_of_the_picture(region):
    """Even where the mask reaches the border: the streaks beyond it are no face."""
    selection = Selection(region=region, crop_size=100, crop_margin=1.0)
    found = extract_faces(pictures(size=(60, 80)), Finds(Face((40.0, 0.0), 40.0, 50.0)), selection)
    left, top, side = head_square(Face((40.0, 0.0), 40.0, 50.0), 1.0, (60, 80))
    assert top < 0 and found.masks[0, 0].max() == 1
    rows = torch.arange(100) * side / 100 + top
    columns = torch.arange(100) * side / 100 + left
    pixel = side / 100
    outside = (rows < -2 * pixel)[:, None] | (rows > 60 + pixel)[:, None]
    outside = outside | (columns < -2 * pixel) | (columns > 80 + pixel)
    assert outside.float().mean() > 0.3
    assert found.crop_masks[0][outside].max() < 1e-3
    # And inside it is the mask.
    inside = crop(found.masks[0][..., None], (left, top, side), 100)[..., 0]
    deep = (rows > 2 * pixel)[:, None] & (rows < 57)[:, None] & (columns > 2) & (columns < 77)
    torch.testing.assert_close(found.crop_masks[0][deep], inside[deep], atol=1e-3, rtol=0)


BOX = {"x": 220.0, "y": 35.0, "width": 40.0, "height": 50.0}


@pytest.mark.parametrize("boxes", [BOX, [BOX], [[BOX]], [[{**BOX, "label": "face", "score": 0.9}]]])
def test_boxes_instead_of_a_detector(boxes):
    found = extract_faces(pictures(), Finds(), Selection(region="oval"), boxes=boxes)
    expected = extract_faces(pictures(), Finds(LARGE_RIGHT), Selection(region="oval"))
    assert found.count == 1
    torch.testing.assert_close(found.masks, expected.masks)
    torch.testing.assert_close(found.crops, expected.crops)


def test_boxes_of_a_batch():
    other = {"x": 30, "y": 45, "width": 20, "height": 30}
    selection = Selection(region="oval", crop_size=16, which_face="all")
    every = extract_faces(pictures(2), Finds(), selection, boxes=[BOX, other])
    assert every.count == 4 and torch.equal(every.masks[0], every.masks[1])
    each = extract_faces(pictures(2), Finds(), selection, boxes=[[BOX], [other]])
    assert each.count == 2
    assert each.masks[0, 60, 240] == 1 and each.masks[0, 60, 40] == 0
    assert each.masks[1, 60, 40] == 1 and each.masks[1, 60, 240] == 0


@pytest.mark.parametrize(
    "boxes, said",
    [
        ("face", "boxes is 'str': connect a BOUNDING_BOX"),
        (3, "boxes is 'int'"),
        ([[BOX]] * 3, "boxes has 3 lists for 2 pictures"),
        ([[BOX], [{"x": 1}]], "no box with x, y, width and height"),
        ([[BOX], ["face"]], "no box with x, y, width and height"),
        ([[BOX], [{**BOX, "width": 0}]], "0 x 50 pixels"),
        ([[BOX], [{**BOX, "x": math.nan}]], "at nan"),
        ([[BOX], [{**BOX, "height": None}]], "no box"),
        ([[BOX], []], "boxes has none for picture 2 of the batch.*none_found"),
        ([], "boxes has none for picture 1 of the batch"),
    ],
)
def test_bad_boxes(boxes, said):
    with pytest.raises(SeFiError, match=said) as error:
        extract_faces(pictures(2), Finds(), Selection(), boxes=boxes)
    assert "\n" not in str(error.value)


def test_a_face_that_fills_the_picture_is_told_to_have_a_margin():
    with pytest.raises(SeFiError, match="fills the picture, add a margin"):
        extract_faces(pictures(), Finds(), Selection())


class FindsInHalf:
    """Finds a face in the middle of whatever it is given, and remembers its size."""

    def detect(self, picture):
        self.size = height, width = picture.shape[:2]
        points = np.array([[0.4, 0.4], [0.6, 0.4], [0.5, 0.5], [0.4, 0.6], [0.6, 0.6]])
        return [Face((width / 2, height / 2), width / 5, height / 4, 0, None, points * width)]


def test_a_large_picture_is_looked_at_in_a_smaller_size():
    detector = FindsInHalf()
    picture = torch.full((1, 1500, 3000, 3), 0.5)
    found = extract_faces(picture, detector, Selection(region="oval", crop_size=16))
    assert max(detector.size) == MOST_PIXELS
    rows, columns = np.nonzero(found.masks[0].numpy() > 0.5)
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == pytest.approx((750, 1500), abs=2)
    assert np.ptp(columns) == pytest.approx(600, abs=4) and np.ptp(rows) == pytest.approx(
        375, abs=4
    )


@pytest.mark.parametrize("height, width", [(700, 1100), (1024, 64), (901, 333)])
def test_a_reduced_picture_shows_the_same(height, width):
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    picture = torch.stack([rows.expand(height, width), columns.expand(height, width)], -1)
    small = reduced(picture, 200)
    assert max(small.shape[:2]) == 200
    expected = resized(picture.movedim(-1, 0), tuple(small.shape[:2])).movedim(0, -1)
    torch.testing.assert_close(small, expected, atol=0.03, rtol=0)


def test_a_large_crop_is_that_of_the_smaller_picture():
    """The lines of a large square are averaged first, so it must not matter."""
    small = resized(torch.rand(3, 12, 16), (300, 400)).movedim(0, -1)
    large = resized(small.movedim(-1, 0), (1200, 1600)).movedim(0, -1)
    for left, top, side in ((50, 20, 250), (-60, -30, 420)):
        expected = crop(small, (left, top, side), 64)
        found = crop(large, (4 * left, 4 * top, 4 * side), 64)
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.slow
def test_a_photo_of_a_camera_costs_little():
    """5760 x 3840 pixels: 60 times those of a picture of 600 x 600, at most 8 times its time."""
    lines = subprocess.run(
        [sys.executable, "-c", CAMERA],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    for case, figures in json.loads(lines.stdout).items():
        assert figures["count"] == 1, case
        assert figures["ratio"] < 8, (case, figures)
        assert figures["megabytes"] < 200, (case, figures)


CAMERA = f"""
import json, sys, time, types
package = types.ModuleType("sefi_ide")
package.__path__ = [{str(REPOSITORY)!r}]
sys.modules["sefi_ide"] = package
import numpy as np, torch
from sefi_ide.sefi_core.faces.extract import MOST_PIXELS, Selection, extract_faces
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.tests.unit.face_drawing import drawn

torch.set_num_threads(1)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

def seconds(picture, selection):
    begin = time.process_time()
    found = extract_faces(picture, YuNetDetector(), selection)
    return time.process_time() - begin, found.count

figures = {{}}
small = torch.from_numpy(drawn(600, 1.0))[None].float() / 255
camera = torch.empty(1, 3840, 5760, 3)
for region, feather, zoom in (("head", 0, 1.0), ("head", 200, 1.0), ("oval", 0, 0.4)):
    source = torch.from_numpy(drawn(960, zoom))[:, :].float() / 255
    columns = torch.arange(5760) * 960 // 5760
    for row in range(3840):
        camera[0, row] = source[row * 960 // 3840, columns]
    selection = Selection(region=region, feather=feather)
    usual = min(seconds(small, selection)[0] for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    spent, count = seconds(camera, selection)
    figures[f"{{region}} {{feather}} {{zoom}}"] = {{
        "count": count, "ratio": spent / usual, "megabytes": status("VmHWM") - before,
    }}
print(json.dumps(figures))
"""


def test_a_crop_of_its_own_size_is_exact_and_shrinking_is_antialiased():
    picture = pictures()[0]
    assert torch.equal(crop(picture, (30, 20, 64), 64), picture[20:84, 30:94])
    stripes = torch.zeros(128, 128, 3)
    stripes[:, ::2] = 1
    small = crop(stripes, (0, 0, 128), 32)
    torch.testing.assert_close(small[4:-4, 4:-4], torch.full((24, 24, 3), 0.5), atol=0.02, rtol=0)


def test_middle_square():
    assert middle_square((100, 300)) == (100, 0, 100)
    assert middle_square((300, 100)) == (0, 100, 100)
