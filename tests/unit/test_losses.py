"""The losses on maps small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.losses import MapPair, attention_loss, noise_loss

GRID = 32 * 32
TOKENS = 4


def uniform(size: tuple[int, int] = (2, 2), heads: int = 1) -> torch.Tensor:
    """Maps in which every pixel looks at every token alike."""
    return torch.full((1, heads, size[0] * size[1], TOKENS), 1 / TOKENS)


def left_half(side: int = 8) -> torch.Tensor:
    face = torch.zeros(1, 1, side, side)
    face[..., : side // 2] = 1
    return face


def test_noise_loss_is_the_mean_squared_error():
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(noise_loss(prediction, target), expected)
    face = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(noise_loss(prediction, target, face, 1.0), expected)


def test_the_background_counts_by_its_weight_and_the_scale_stays():
    target = torch.zeros(1, 1, 8, 8)
    face = left_half()
    on_the_face, behind = face.clone(), 1 - face
    assert noise_loss(on_the_face, target, face, 0.0) == 1
    assert noise_loss(behind, target, face, 0.0) == 0
    assert noise_loss(behind, target, face, 0.5) == pytest.approx(0.5 / 1.5)
    for weight in (0.0, 0.3, 1.0):  # an even error is the same loss at every weight
        assert noise_loss(torch.ones_like(target), target, face, weight) == pytest.approx(1)


def test_each_sample_is_weighed_against_its_own_face():
    """A big face in one sample must not take the weight of a small one in another."""
    target = torch.zeros(2, 1, 8, 8)
    face = torch.zeros(2, 1, 8, 8)
    face[0, 0, 0, 0] = 1
    face[1] = 1
    prediction = face.clone()
    assert noise_loss(prediction, target, face, 0.0) == pytest.approx(1)


def test_no_loss_where_the_maps_agree():
    assert attention_loss([MapPair(uniform(), uniform(), (2, 2))]) == 0


def test_the_loss_is_a_squared_frobenius_norm_on_the_common_grid():
    target, reference = uniform().softmax(-1), torch.rand(1, 1, 4, TOKENS)
    loss = attention_loss([MapPair(target, reference, (2, 2))])
    assert loss == pytest.approx((target - reference).square().sum().item() * GRID / 4)


def test_every_layer_and_head_counts_alike_whatever_its_size():
    small = MapPair(uniform((2, 2)), uniform((2, 2)) + 0.1, (2, 2))
    large = MapPair(uniform((8, 8), heads=3), uniform((8, 8), heads=3) + 0.1, (8, 8))
    alone = attention_loss([small])
    assert attention_loss([large]) == pytest.approx(alone.item())
    assert attention_loss([small, large]) == pytest.approx(alone.item())


def test_every_sample_of_a_batch_counts_alike():
    maps = torch.rand(2, 3, 4, TOKENS)
    together = attention_loss([MapPair(maps, maps.flip(-1), (2, 2))])
    alone = [
        attention_loss([MapPair(maps[i : i + 1], maps[i : i + 1].flip(-1), (2, 2))])
        for i in range(2)
    ]
    assert together == pytest.approx(sum(alone).item() / 2)


def test_the_reference_gets_no_gradient():
    trained, reference = (torch.rand(1, 1, 4, TOKENS, requires_grad=True) for _ in range(2))
    attention_loss([MapPair(trained, reference, (2, 2))]).backward()
    assert trained.grad.abs().sum() > 0
    assert reference.grad is None
