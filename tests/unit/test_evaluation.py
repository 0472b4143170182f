"""The measures, against values that were worked out by hand."""

import math

import pytest
import torch
from sefi_ide.sefi_core import evaluation


def test_somebody_is_the_middle_of_their_pictures_whatever_their_lengths():
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(evaluation.prototype(embeddings), torch.tensor([half, half]))


def test_id_is_the_cosine_with_the_middle_of_the_references():
    references = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pictures = torch.tensor([[3.0, 3.0], [1.0, 0.0], [-1.0, -1.0], [3.0, -3.0]])
    found = evaluation.identity_similarity(pictures, references)
    torch.testing.assert_close(found, torch.tensor([1.0, math.sqrt(0.5), -1.0, 0.0]))


def test_prompt_is_the_share_of_all_attributes_not_of_pictures():
    assert evaluation.prompt_share([[True], [True, False, False]]) == 0.5
    with pytest.raises(ZeroDivisionError):
        evaluation.prompt_share([])


def test_id_p_is_0_for_a_picture_that_misses_something():
    similarity = torch.tensor([0.8, 0.6, -0.2])
    found = [[True, True], [True, False], [True]]
    assert evaluation.quality(similarity, found) == pytest.approx(
        {"id": 1.2 / 3, "prompt": 4 / 5, "id_p": (0.8 + 0 - 0.2) / 3}
    )


def test_as_many_similarities_as_pictures():
    with pytest.raises(ValueError, match="2 similarities for 1 pictures"):
        evaluation.quality(torch.zeros(2), [[True]])


@pytest.mark.parametrize(("value", "r"), [(0.2, 0.0), (0.6, 1.0), (0.5, 0.75), (0.1, -0.25)])
def test_r_is_0_at_the_floor_and_1_at_the_ceiling(value, r):
    assert evaluation.relative(value, floor=0.2, ceiling=0.6) == pytest.approx(r)


def test_the_interval_of_two_values_is_that_of_the_coin():
    """Both the same way happens with a quarter each, so both ends of the middle 95 % are there."""
    assert evaluation.interval([0.0, 1.0]) == [0.5, 0.0, 1.0]


def test_the_interval_of_many_values_is_that_of_the_normal_distribution():
    """1.96 standard errors on each side: 0.5 / sqrt(400) * 1.96 = 0.049."""
    mean, low, high = evaluation.interval([0.0, 1.0] * 200)
    assert mean == 0.5
    assert (mean - low, high - mean) == pytest.approx((0.049, 0.049), abs=0.003)


def test_values_that_do_not_scatter_have_no_width_and_the_same_seed_the_same_ends():
    assert evaluation.interval([0.3, 0.3]) == pytest.approx([0.3, 0.3, 0.3])
    values = [0.1, 0.4, 0.7, 0.2]
    assert evaluation.interval(values, seed=1) == evaluation.interval(values, seed=1)


def test_an_interval_in_a_table():
    assert evaluation.interval_text([0.7351, 0.6741, 0.7829]) == "0.735 [0.674, 0.783]"
