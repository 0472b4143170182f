"""How the queries of a batch are dealt to the contexts of the parts of a picture."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.comfyui.unet import blending


@pytest.mark.parametrize(
    "counts", [[32, 32, 64], [1], [5, 4096], [1000, 1100, 2100, 4096], [3, 3, 3, 4096 - 9, 4096]]
)
def test_little_is_attended_to_twice(counts):
    """The rows of equal length have few places that nobody needs."""
    length = blending._length_of_rows(counts)
    rows = sum(-(-count // length) for count in counts)
    assert rows * (length + blending.GATHERING) <= 1.25 * (
        sum(counts) + blending.GATHERING * len(counts)
    )


def test_queries_are_dealt_and_come_back():
    """Any shares: each query gets the answers of its parts, by their shares."""
    generator = torch.Generator().manual_seed(3)
    shares = torch.rand(3, 4, 30, generator=generator)
    shares = shares * (torch.rand(3, 4, 30, generator=generator) < 0.5)
    shares[0] += (shares.sum(0) == 0).float()
    indices = torch.randint(0, 5, (3, 4), generator=generator)
    deal = blending.dealt(shares, indices)
    of_context = torch.randn(5, 4 * 30, generator=generator)  # what a query gets from each
    answers = of_context[deal.pieces[:, None], deal.queries].flatten()[deal.answers]
    expected = torch.zeros(4, 30)
    for part in range(3):
        for row in range(4):
            got = of_context[indices[part, row]].view(4, 30)[row]
            expected[row] += shares[part, row] * got
    torch.testing.assert_close((answers * deal.weights[..., 0]).sum(0), expected)
