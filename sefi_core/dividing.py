"""Dividing a picture among its people, from where each one's words look.

People with one class word have maps that are much alike: all of them look at every face. So the
places that they look at are first put together to as many groups as there are people, by where they
are, and only then it is asked which group is whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch

from .regions import resized

REGIONS = ("off", "automatic")
"""Whether an identity without a region shares the picture with others of a prompt."""

DEFAULT_REGIONS = "off"

SEAM = 0.05
"""Half of the width of the seam between two parts, of the picture's shorter side."""

LEAST_SHARE = 0.02
"""Of a place, below which a share is 0."""

MOST_TRIED = 6
"""More people than this get their parts by the order of the words alone."""

ROUNDS = 20


def divided(maps: torch.Tensor) -> torch.Tensor:
    """The shares (people, height, width) of a picture that is divided among people.

    ``maps`` (people, height, width) say how much each place looks at each one's words; the first
    person's word comes first in the prompt. Shares are nowhere below 0, come to 1 everywhere, and
    have soft seams. Values that are no numbers count as 0.
    """
    count, height, width = maps.shape
    maps = maps.double().nan_to_num(0.0, 0.0, 0.0).flatten(1)
    relative = maps / maps.mean(1, keepdim=True).clamp_min(1e-12)
    weights = _weights(relative)
    places = _places(height, width)
    middles = _middles(places, weights, count)
    nearest = torch.cdist(places, middles).argmin(1)
    order = _order(relative, weights, nearest)
    return _shares_about(middles[order], (height, width))


def divided_pictures(
    layers: Sequence[torch.Tensor], people: int, size: tuple[int, int]
) -> torch.Tensor:
    """The shares (people * pictures, height, width) of several pictures, in another ``size``.

    ``layers`` has of each layer the maps (people * pictures, height, width) at a size of its own;
    all of the first person come first.
    """
    grid = max(layer.shape[1] for layer in layers), max(layer.shape[2] for layer in layers)
    maps = torch.stack([resized(layer, grid) for layer in layers]).sum(0).cpu()
    of_pictures = maps.unflatten(0, (people, -1)).unbind(1)
    shares = torch.stack([divided(one) for one in of_pictures], dim=1)
    return resized(shares.flatten(0, 1), size)


def _weights(relative: torch.Tensor) -> torch.Tensor:
    """How much each place looks at anybody's words, more than the mean place does, (places,)."""
    weights = (relative.amax(0) - 1).clamp_min(0)
    return weights if weights.any() else torch.ones_like(weights)


def _shares_about(middles: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Each place belongs to the nearest of the middles (people, [x, y]), with soft seams."""
    distances = torch.cdist(_places(*size), middles)
    shares = torch.softmax(-distances / (SEAM * min(size)), dim=1).T
    shares = torch.where(shares < LEAST_SHARE, 0.0, shares)
    return (shares / shares.sum(0)).view(-1, *size).float()


def _places(height: int, width: int) -> torch.Tensor:
    """The middles of all places (height * width, [x, y]) in units of one."""
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    return torch.stack([columns, rows], -1).flatten(0, 1) + 0.5


def _middles(places: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """The middles (count, 2) of as many groups of places, from left to right.

    Lloyd's rounds, begun with as heavy groups along each of a few directions; the closest groups.
    """
    best, least = places[:0], float("inf")
    for direction in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -1.0)):
        along = (places @ torch.tensor(direction, dtype=places.dtype)).argsort(stable=True)
        before = weights[along].cumsum(0) - weights[along] / 2
        group = torch.empty(len(places), dtype=torch.long)
        group[along] = (before / weights.sum() * count).long().clamp(max=count - 1)
        for _ in range(ROUNDS):
            middles = torch.stack([_mean(places, weights * (group == n)) for n in range(count)])
            group = torch.cdist(places, middles).argmin(1)
        spread = float((weights * (places - middles[group]).square().sum(1)).sum())
        if spread < 0.95 * least:  # sideways where there is not much in it
            best, least = middles, spread
    return best[best[:, 0].argsort(stable=True)]


def _mean(places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (places * weights[:, None]).sum(0) / weights.sum().clamp_min(1e-12)


def _order(relative: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor) -> list[int]:
    """Which group of places (places,) is each one's, by how much their words are looked at there.

    The groups are numbered from left to right; where it makes no difference, so are the people.
    """
    count = len(relative)
    if count > MOST_TRIED:
        return list(range(count))
    members = torch.nn.functional.one_hot(groups, count).double() * weights[:, None]
    looks = relative @ members / members.sum(0).clamp_min(1e-12)
    people = range(count)
    return list(
        max(
            permutations(people),
            key=lambda order: round(sum(float(looks[n, order[n]]) for n in people), 9),
        )
    )
