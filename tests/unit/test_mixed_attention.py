"""The maths of mixed attention."""

from __future__ import annotations

import torch
from sefi_ide.sefi_core.attention import mixing


def test_a_mean_is_moved():
    own, text = torch.randn(2, 5, 3), torch.randn(2, 7, 3) + 2
    moved = mixing.adain_mean(own, text)
    assert torch.allclose(moved.mean(1), text.mean(1), atol=1e-5)
    assert torch.allclose(
        moved - moved.mean(1, keepdim=True), own - own.mean(1, keepdim=True), atol=1e-5
    )
    both = mixing.mixed(own, text, adain=True)
    assert torch.equal(both, torch.cat([moved, text], 1))


def test_where_a_person_is():
    small, large = torch.zeros(2, 2), torch.zeros(4, 4)
    small[0, 0], large[:2, :2], large[3, 3] = 2.0, 0.5, 0.1
    found = mixing.person_mask([small, large])
    assert found.shape == (4, 4) and found[0, 0] == 1 and found[3, 3] == 0
    assert float(found.min()) == 0 and float(found.max()) == 1
