"""Regions of many frames and of large masks: they stay small."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.regions import MOST_PLACES, acting_sets


def masks(count: int, side: int = 4) -> torch.Tensor:
    return torch.rand(count, side, side, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("counts", "frames"), [((1, 5), 5), ((2, 3), 6), ((4, 8), 8), ((15, 16), 16), ((7, 9, 8), 9)]
)
def test_batches_go_round_and_do_not_multiply(counts, frames):
    regions = [masks(count) for count in counts]
    sets = acting_sets(regions)
    total = sum(share for _, share in sets)
    torch.testing.assert_close(total, torch.ones(frames, 4, 4))
    for number, region in enumerate(regions):
        mine = sum(share for acting, share in sets if number in acting)
        expected = region[torch.arange(frames) % len(region)]
        torch.testing.assert_close(mine, expected, atol=0.01, rtol=0)


def test_a_large_mask_is_made_smaller():
    left = torch.zeros(1, 3 * MOST_PLACES, 2 * MOST_PLACES)
    left[..., :MOST_PLACES] = 1
    (_, nobody), (_, somebody) = acting_sets([left])
    assert somebody.shape == nobody.shape == (1, MOST_PLACES, MOST_PLACES)
    half = torch.zeros(1, MOST_PLACES, MOST_PLACES)
    half[..., : MOST_PLACES // 2] = 1
    assert torch.equal(somebody, half) and torch.equal(nobody, 1 - half)
