"""Attention maps against two implementations that are not ours."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.attention.maps import attend, attention_probabilities

BATCH, HEADS, WIDTH, PIXELS, TOKENS = 2, 4, 8, 9, 7


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        2 * torch.randn(BATCH, length, HEADS * WIDTH, generator=generator)
        for length in (PIXELS, TOKENS, TOKENS)
    )


def test_the_maps_are_those_of_diffusers(qkv):
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")
    layer = attention_processor.Attention(HEADS * WIDTH, heads=HEADS, dim_head=WIDTH)
    q, k, _ = qkv
    expected = layer.get_attention_scores(layer.head_to_batch_dim(q), layer.head_to_batch_dim(k))
    maps = attention_probabilities(q, k, HEADS)
    torch.testing.assert_close(maps, expected.unflatten(0, (BATCH, HEADS)))


def test_the_output_is_that_of_pytorch(qkv):
    q, k, v = qkv
    heads = [tensor.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for tensor in qkv]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(attention_probabilities(q, k, HEADS), v), expected)


def test_half_precision_keeps_large_scores_apart(qkv):
    """Scores beyond fp16's range must neither overflow nor turn into NaN."""
    q, k, v = (40 * tensor for tensor in qkv)
    maps = attention_probabilities(q.half(), k.half(), HEADS)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(BATCH, HEADS, PIXELS))
    assert attend(maps, v.half()).dtype == torch.float16
