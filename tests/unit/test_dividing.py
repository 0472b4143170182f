"""Who gets which part of a picture, from where each one's words look."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from sefi_core.attention.region_pictures import region_picture
from sefi_core.dividing import divided, divided_pictures

SIZE = (16, 24)


def blob(x: float, y: float, radius: float = 3.0, size=SIZE) -> torch.Tensor:
    """A round spot about a place, in cells."""
    rows, columns = (torch.arange(n) + 0.5 for n in size)
    squares = (columns[None] - x) ** 2 + (rows[:, None] - y) ** 2
    return torch.exp(-squares / (2 * radius**2))


def maps_of(spots, preference: float, size=SIZE) -> torch.Tensor:
    """Each one's words look at all spots, at the own one ``preference`` more; a little anywhere."""
    everything = sum(spots) + 0.02
    return torch.stack([everything + preference * spot for spot in spots])


def owner(shares: torch.Tensor, spot: torch.Tensor) -> int:
    """Whose the brightest place of a spot is."""
    return int(shares.flatten(1)[:, spot.argmax()].argmax())


@pytest.mark.parametrize("people", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(16, 16), (5, 9), (64, 40)])
def test_shares_come_to_one(people, size):
    generator = torch.Generator().manual_seed(people)
    shares = divided(torch.rand(people, *size, generator=generator))
    assert shares.shape == (people, *size) and shares.dtype == torch.float32
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(size))
    assert (shares.flatten(1).amax(1) > 0.9).all()  # each has a part of their own


@pytest.mark.parametrize("preference", [1.0, 0.02])
@pytest.mark.parametrize("first", [(6, 8), (18, 8), (12, 3), (12, 13), (5, 12)])
def test_each_gets_where_their_words_look(preference, first):
    x, y = first
    spots = [blob(x, y, 2.0), blob(24 - x, 16 - y, 2.5)]
    shares = divided(maps_of(spots, preference))
    assert [owner(shares, spot) for spot in spots] == [0, 1]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_three_in_any_order(order):
    spots = [blob(4 + 8 * place, 8) for place in order]
    shares = divided(maps_of(spots, 0.1))
    assert [owner(shares, spot) for spot in spots] == [0, 1, 2]


def test_who_cannot_be_told_apart_stands_in_the_order_of_the_words():
    spots = [blob(18, 8), blob(6, 9)]
    shares = divided(maps_of(spots, 0.0))
    assert [owner(shares, spot) for spot in spots] == [1, 0]


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_maps_without_anything_make_parts_of_one_size(value):
    shares = divided(torch.full((2, 16, 16), value))
    assert shares[0, :, 0].min() == shares[1, :, -1].min() == 1
    torch.testing.assert_close(shares.mean((1, 2)), torch.tensor([0.5, 0.5]))


def test_how_much_a_word_is_looked_at_at_all_does_not_matter():
    maps = maps_of([blob(18, 8), blob(6, 8)], 0.1)
    torch.testing.assert_close(
        divided(maps * torch.tensor([7.0, 0.1])[:, None, None]), divided(maps)
    )


def test_seams_are_soft_and_the_rest_is_whole():
    shares = divided(maps_of([blob(4, 8), blob(20, 8)], 1.0))[0, 8]
    assert 0.2 < shares[11] < 0.8
    assert shares[:9].min() == 1 and shares[-9:].max() == 0
    assert (shares.diff() <= 0).all()


def test_pictures_are_divided_each_by_itself():
    """Layers of two sizes; all of the first person come first."""
    left, right = blob(6, 8), blob(18, 8)
    one, other = maps_of([left, right], 0.1), maps_of([right, left], 0.1)
    maps = torch.stack([one, other], dim=1).flatten(0, 1)
    small = torch.nn.functional.avg_pool2d(maps[:, None], 2)[:, 0]
    shares = divided_pictures([small, maps, small], 2, (32, 48))
    assert shares.shape == (4, 32, 48)
    assert shares[0, 16, 4] == shares[1, 16, -4] == shares[2, 16, -4] == shares[3, 16, 4] == 1
    torch.testing.assert_close(shares[0] + shares[2], torch.ones(32, 48))


def test_a_picture_shows_whose_part_is_where():
    shares = divided(maps_of([blob(20, 32, 6, (64, 96)), blob(76, 32, 6, (64, 96))], 0.1))
    grey = torch.full((64, 96, 3), 0.5)
    alone, over = region_picture(shares, None, ["<a>", "<b>"]), region_picture(shares, grey, "ab")
    assert alone.shape == over.shape == (64, 96, 3)
    left, right = alone[2, 2], alone[2, -3]
    assert (left - right).abs().max() > 0.5
    torch.testing.assert_close(over[2, 2], torch.lerp(grey[2, 2], left, 0.45), atol=0.01, rtol=0)
    named = region_picture(shares, grey, ["<a>", ""]) - region_picture(shares, grey, ["", ""])
    assert named[:, :48].abs().max() > 0.3 and not named[:, 60:].any()
