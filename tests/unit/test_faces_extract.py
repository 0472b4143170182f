import math

import numpy as np
import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.crop import crop, head_square, middle_square
from sefi_ide.sefi_core.faces.extract import Selection, extract_faces
from sefi_ide.sefi_core.faces.face import Face, choose

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
    for shape in [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 0), (8, 8, 3)]:
        with pytest.raises(SeFiError, match="image is empty or not a batch"):
            extract_faces(torch.zeros(shape), Finds(), Selection())
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
