"""How good pictures of a learned person are: ID, Prompt, ID(P), r, and their intervals.

Nothing here looks at a picture. Whoever measures brings embeddings of an identity judge and says
which prompted attributes were found; the same figures then mean the same in every program.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

RESAMPLES = 10_000
"""How many bootstrap samples an interval is made from."""
QUANTILES = (0.025, 0.975)
"""Of their means, the ends of an interval."""


def prototype(embeddings: torch.Tensor) -> torch.Tensor:
    """The direction (D,) that stands for somebody: the mean of embeddings (N, D), of length 1."""
    return F.normalize(F.normalize(embeddings, dim=-1).mean(dim=0), dim=-1)


def identity_similarity(embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """**ID** of each picture: how much it looks like somebody, from -1 to 1, as (N,).

    It is the cosine of its embedding, of (N, D), with the :func:`prototype` of the embeddings
    (M, D) of pictures that are known to show that person.
    """
    return F.normalize(embeddings, dim=-1) @ prototype(references)


def prompt_share(found: Sequence[Sequence[bool]]) -> float:
    """**Prompt**: the share of all prompted attributes that were found, from 0 to 1.

    ``found`` has for each picture whether each of its prompted attributes is seen in it. Raises
    ``ZeroDivisionError`` when nothing was prompted.
    """
    hits = [hit for row in found for hit in row]
    return sum(hits) / len(hits)


def quality(similarity: torch.Tensor, found: Sequence[Sequence[bool]]) -> dict[str, float]:
    """``id``, ``prompt`` and ``id_p`` of N pictures.

    ``similarity`` (N,) is the :func:`identity_similarity` of each, ``found`` as for
    :func:`prompt_share`. ``id`` is the mean ID, and **ID(P)** the mean of ID with 0 in the place
    of every picture that misses something prompted: an unmet prompt counts as nobody's picture.
    Raises ``ValueError`` when the two are not of equally many pictures.
    """
    if len(similarity) != len(found):
        raise ValueError(f"{len(similarity)} similarities for {len(found)} pictures")
    complete = torch.tensor([all(hits) for hits in found], device=similarity.device)
    return {
        "id": similarity.mean().item(),
        "prompt": prompt_share(found),
        "id_p": (similarity * complete).mean().item(),
    }


def relative(value: float, floor: float, ceiling: float) -> float:
    """**r**: how far a figure is on the way from ``floor``, where it is 0, to ``ceiling``, 1.

    The floor is what the class word has, the ceiling what the best that can be asked for has. May
    be below 0 and above 1. Raises ``ZeroDivisionError`` when the two are the same.
    """
    return (value - floor) / (ceiling - floor)


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """Mean of figures and the ends of its 95 % bootstrap interval: [mean, low, high].

    The figures, one for each identity, are drawn :data:`RESAMPLES` times with replacement; the
    ends are quantiles of the means. With few identities that is too narrow: of six it holds the
    true mean 87 times in a hundred, of sixteen 92 times. The same seed gives the same ends.
    """
    figures = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(figures), size=(RESAMPLES, len(figures)))
    low, high = np.quantile(figures[drawn].mean(axis=1), QUANTILES)
    return [float(figures.mean()), float(low), float(high)]


def interval_text(mean_low_high: Sequence[float]) -> str:
    """What :func:`interval` gives, as tables show it: ``0.735 [0.674, 0.783]``."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_low_high)
