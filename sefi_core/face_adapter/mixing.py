"""Embeddings of several photos, of one person or of several, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_number, parse_numbers
from ..errors import SeFiError

MOST_WEIGHT = 100.0


def parse_weights(text: str, photos: int) -> tuple[float, ...]:
    """A weight for each of the photos, of a short list; an empty text gives none.

    Raises :class:`SeFiError` for anything else than a number from 0 for each photo, not all 0.
    """
    weights = parse_numbers("weights", text, photos + 1, "1, 0.5")
    if not weights:
        return ()
    for weight in weights:
        check_number("a number of weights", weight, 0.0, MOST_WEIGHT)
    if len(weights) != photos:
        count = f"more than {photos}" if len(weights) > photos else str(len(weights))
        raise SeFiError(
            f"weights has {count} entries for {photos} photos: write one number for each photo, or "
            "none"
        )
    if not any(weights):
        raise SeFiError("weights are all 0: give one photo at least a weight above 0")
    return weights


def mixed(rows: torch.Tensor, weights: Sequence[float], unit: bool = False) -> torch.Tensor:
    """The mean (1, ...) of rows (N, ...) by their weights, by default all alike.

    ``unit`` rows have length 1, and so has their mean.
    """
    share = torch.tensor(weights or [1.0] * len(rows), dtype=torch.float64)
    share = (share / share.sum()).to(rows)
    mean = (rows * share.view(-1, *[1] * (rows.ndim - 1))).sum(0, keepdim=True)
    if not unit:
        return mean
    length = mean.norm()
    if length < 1e-6:
        raise SeFiError("the photos' faces cancel each other out: use other photos or weights")
    return mean / length
