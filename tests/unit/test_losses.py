"""The losses on maps small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.learning.losses import MapPair, attention_loss, leak, noise_loss

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


def test_a_words_map_is_the_sum_of_its_tokens_and_the_mean_of_the_heads():
    target = torch.rand(2, 3, 6, TOKENS)
    tokens = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 1]])
    maps = MapPair(target, target, (2, 3)).target_of(tokens)
    torch.testing.assert_close(maps[0], target[0, :, :, 1].mean(0).view(2, 3))
    torch.testing.assert_close(maps[1], target[1, :, :, 2:].sum(-1).mean(0).view(2, 3))


def test_the_leak_is_the_share_on_cells_that_show_nothing_of_the_face():
    """Whatever the size of the map: one cell shows the face and one does not, three to one."""
    face = torch.zeros(1, 1, 128, 128)
    face[..., 40:60, 40:60] = 1.0
    layers = [torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)]
    for layer, cell in zip(layers, (2, 1), strict=True):
        layer[:, cell, cell], layer[:, -1, -1] = 3.0, 1.0
    torch.testing.assert_close(leak(layers, face), torch.tensor([0.25]))
    for layer in layers:
        layer[:, -1, -1] = 0.0
        assert leak([layer], face) == 0.0


def test_every_picture_leaks_by_its_own_face():
    face = torch.cat([left_half(), 1 - left_half()])
    left = torch.zeros(2, 4, 4)
    left[..., :2] = 0.1
    assert leak([left], face).tolist() == pytest.approx([0.0, 1.0])
    assert leak([torch.zeros(2, 4, 4)], face).tolist() == [0.0, 0.0]


def test_the_leak_pulls_at_what_is_outside_only():
    maps = torch.full((1, 4, 4), 0.1, requires_grad=True)
    leak([maps], left_half())[0].backward()
    assert (maps.grad[..., :2] == 0).all() and (maps.grad[..., 2:] > 0).all()


def test_a_soft_mask_counts_by_its_value():
    assert leak([torch.ones(1, 2, 2)], torch.full((1, 1, 8, 8), 0.25)).item() == 0.75
