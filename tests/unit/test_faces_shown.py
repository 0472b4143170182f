"""Masks over their pictures."""

import pytest
import torch
from sefi_ide.sefi_core.faces.shown import FAINT, MOST, SIDE, masks_over


def test_inside_is_the_picture_and_outside_is_faint_and_grey():
    picture = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 40, 60)
    masks[0, 10:20, 5:30] = 1
    (shown,) = masks_over(picture, masks)
    inside = masks[0].bool()
    torch.testing.assert_close(shown[inside], picture[0][inside])
    grey = picture[0].mean(-1, keepdim=True).expand(-1, -1, 3) * FAINT
    torch.testing.assert_close(shown[~inside], grey[~inside])


def test_half_a_mask_is_half_way():
    (shown,) = masks_over(torch.ones(1, 4, 4, 3), torch.full((1, 4, 4), 0.5))
    torch.testing.assert_close(shown, torch.full((4, 4, 3), (1 + FAINT) / 2))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_ones_and_those_with_alpha_are_shown_in_colour(channels):
    assert masks_over(torch.zeros(2, 8, 8, channels), torch.ones(2, 8, 8)).shape == (2, 8, 8, 3)


def test_large_ones_are_made_smaller_and_long_batches_shorter():
    pictures = torch.full((MOST + 1, 10, 2 * SIDE, 3), 0.25)
    shown = masks_over(pictures, torch.ones(MOST + 1, 10, 2 * SIDE))
    assert shown.shape == (MOST, 5, SIDE, 3)
    torch.testing.assert_close(shown, torch.full_like(shown, 0.25))


def test_values_beyond_the_range_of_a_picture_do_not_wrap_around():
    shown = masks_over(torch.tensor([[[[-5.0, 0.5, 9.0]]]]), torch.ones(1, 1, 1))
    torch.testing.assert_close(shown, torch.tensor([[[[0.0, 0.5, 1.0]]]]))
