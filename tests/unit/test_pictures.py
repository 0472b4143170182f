"""Photos of any size become square training pictures with the face in them."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.learning.photos import pair_photos, training_pictures


def photo_with_face(
    height: int, width: int, top: int, left: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE and MASK of a black photo with a white square face."""
    mask = torch.zeros(1, height, width)
    mask[:, top : top + size, left : left + size] = 1
    return mask[..., None].expand(-1, -1, -1, 3).clone(), mask


def made(images, masks=None, resolution=128):
    return training_pictures(pair_photos(images, masks), resolution)[:2]


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(300, 900, 40, 780), (900, 300, 820, 10), (400, 400, 0, 0), (130, 128, 50, 50)],
)
def test_the_face_is_in_the_picture_wherever_it_was(height, width, top, left):
    picture, mask = photo_with_face(height, width, top, left, 60)
    pictures, masks = made([picture], [mask])
    assert pictures.shape == (1, 128, 128, 3) and masks.shape == (1, 1, 128, 128)
    # Picture and mask are cut alike, and the face is whole: it keeps its square shape.
    torch.testing.assert_close(pictures[..., 0], masks[:, 0])
    rows, columns = (masks[0, 0].amax(axis) > 0.5 for axis in (1, 0))
    assert abs(int(rows.sum()) - int(columns.sum())) <= 1
    assert rows.sum() >= 128 * 60 / min(height, width) - 1


def test_faces_too_far_apart_for_a_square_are_refused():
    """Both would be outside of it, and nothing would be learned."""
    picture, mask = photo_with_face(500, 1500, 100, 0, 100)
    mask = torch.maximum(mask, mask.flip(2))
    with pytest.raises(SeFiError, match="masks: .* too far apart .* one face"):
        made([picture], [mask])


def test_without_a_mask_the_middle_is_used():
    picture = torch.zeros(1, 100, 300, 3)
    picture[:, :, 100:200] = 1
    pictures, masks = made([picture])
    assert masks is None
    assert pictures.min() > 0.99


def test_values_stay_in_range_and_alpha_is_unused():
    checker = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()
    image = torch.stack([checker, checker, checker, torch.zeros(64, 64)], dim=-1)[None]
    pictures, _ = made([image], resolution=192)
    assert pictures.shape == (1, 192, 192, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.max() > 0.9


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_pictures_become_coloured(channels):
    grey = torch.rand(1, 64, 64, channels)
    pictures, _ = made([grey], resolution=64)
    torch.testing.assert_close(pictures, grey[..., :1].expand(1, 64, 64, 3))


def test_batches_and_lists_of_different_sizes():
    images = [torch.rand(2, 90, 64, 3), torch.rand(1, 300, 500, 3)]
    assert made(images)[0].shape == (3, 128, 128, 3)
    assert [p.picture.shape[:2] for p in pair_photos(images, None)] == [(90, 64)] * 2 + [(300, 500)]


def test_every_picture_has_its_mask():
    first, second = photo_with_face(128, 128, 20, 10, 40), photo_with_face(128, 128, 60, 70, 50)
    pictures, masks = made([first[0], second[0]], [first[1], second[1]])
    assert len(pictures) == 2
    torch.testing.assert_close(pictures[..., 0], masks[:, 0])
    assert not torch.equal(masks[0], masks[1])


def test_the_inputs_are_left_alone_and_inference_tensors_are_fine():
    with torch.inference_mode():
        image, mask = torch.rand(1, 70, 64, 3) * 3 - 1, torch.rand(1, 70, 64)
    before = image.clone(), mask.clone()
    pictures, masks = made([image], [mask])
    assert not pictures.is_inference() and not masks.is_inference()
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])


def test_photos_are_not_copied():
    """A camera's take hundreds of megabytes, which training would hold."""
    batch, masks = torch.rand(1, 40, 30, 3), torch.ones(1, 40, 30)
    (photo,) = pair_photos([batch], [masks])
    assert photo.picture.data_ptr() == batch.data_ptr()
    assert photo.mask.data_ptr() == masks.data_ptr()


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 64, 64, 1)])
def test_a_mask_with_a_channel_is_a_mask(shape):
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:40, 10:50] = 1.0
    photo = torch.rand(1, 64, 64, 3)
    assert torch.equal(made([photo], [mask.view(shape)])[1], made([photo], [mask])[1])


def test_a_mask_of_two_dimensions_is_one_mask():
    assert made([torch.rand(1, 64, 64, 3)], [torch.ones(64, 64)])[1].shape == (1, 1, 128, 128)


def ring(height, width, hole, value=1.0):
    """A mask that marks all but the ``hole`` (top, bottom, left, right)."""
    mask = torch.full((1, height, width), value)
    top, bottom, left, right = hole
    mask[:, top:bottom, left:right] = 0
    return mask


@pytest.mark.parametrize(
    "hole",
    [
        (40, 160, 40, 160),  # a cut-out in the middle
        (30, 200, 50, 150),  # a bust that stands on the lower border
        (60, 200, 20, 180),  # wide shoulders
        (10, 190, 60, 140),
    ],
)
@pytest.mark.parametrize("value", [1.0, 0.6])
def test_a_mask_of_the_background_is_told(hole, value):
    photo = torch.rand(1, 200, 200, 3)
    with pytest.raises(
        SeFiError, match="masks: mask 1 marks the background .*Invert Mask"
    ) as error:
        pair_photos([photo], [ring(200, 200, hole, value)])
    assert "\n" not in str(error.value)
    # Inverted it is fine.
    assert pair_photos([photo], [1 - ring(200, 200, hole)])[0].mask.mean() > 0


@pytest.mark.parametrize(
    "marked",
    [
        (0, 200, 0, 200),  # all of it
        (0, 150, 0, 200),  # a face that fills the picture, but for the collar
        (0, 100, 0, 100),  # a corner
        (0, 200, 0, 66),  # a strip at the border
        (0, 70, 0, 200),
        (90, 110, 90, 110),
    ],
)
def test_a_mask_that_reaches_the_borders_is_a_mask(marked):
    mask = torch.zeros(1, 200, 200)
    mask[:, marked[0] : marked[1], marked[2] : marked[3]] = 1
    assert len(pair_photos([torch.rand(1, 200, 200, 3)], [mask])) == 1


@pytest.mark.parametrize("value", [1e-6, 1 / 255, 0.04])
def test_a_mask_of_next_to_nothing_is_empty(value):
    """Load Image gives 1/255 everywhere for some files."""
    with pytest.raises(SeFiError, match="mask 1 is empty, 0.0"):
        pair_photos([IMAGE], [torch.full((1, 64, 64), value)])


NAN = torch.full((1, 64, 64, 3), 0.5)
NAN[0, 3, 3, 1] = float("nan")
IMAGE = torch.rand(1, 64, 64, 3)


@pytest.mark.parametrize(
    ("images", "masks", "said"),
    [
        ([NAN], None, "NaN"),
        ([IMAGE, torch.cat([IMAGE, NAN])], None, "^batch 2 of photos .*picture 2"),
        ([], None, "^photos is empty"),
        ([IMAGE[:0]], None, "^photos is empty"),
        ([IMAGE, IMAGE[:0]], None, "^batch 2 of photos is empty"),
        ([IMAGE], [torch.zeros(1, 64, 64)], "empty"),
        ([IMAGE], [torch.full((1, 64, 64), float("nan"))], "mask 1 .*NaN"),
        ([IMAGE], [torch.ones(1, 32, 48)], "48 x 32.*64 x 64.*SeFi Face Mask"),
        ([IMAGE, IMAGE], [torch.ones(3, 64, 64)], "3 masks for 2 photos"),
        ([IMAGE[0]], None, r"not a batch of pictures.*\(64, 64, 3\)"),
        ([IMAGE[None]], None, r"not a batch of pictures.*\(1, 1, 64, 64, 3\)"),
        ([IMAGE[:, :0]], None, r"\(1, 0, 64, 3\)"),
        (["anna.png"], None, "str"),
        ([IMAGE], [torch.ones(1, 64, 64, 3)], r"\(1, 64, 64, 3\)"),
        ([IMAGE], [torch.ones(5)], "shape"),
    ],
)
def test_bad_photos_and_masks_are_refused_in_one_sentence(images, masks, said):
    with pytest.raises(SeFiError, match=said) as error:
        pair_photos(images, masks)
    assert "\n" not in str(error.value)
