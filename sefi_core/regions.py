"""Where in a picture identities act: masks, their shares of each place, and their sizes.

A mask says how much of an identity there is at each place. What is drawn at a place is a mixture of
*acting sets*, in each of which every identity either acts or is its class word; a set's *share* is
how much of the mixture it is. Shares are nowhere below 0, come to 1 everywhere, and those of the
sets with an identity come to its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import torch
import torch.nn.functional as F

from .errors import SeFiError

MOST_PLACES = 512
"""Of a mask's side: as many as a picture of 4096 pixels has latent cells."""

LEAST_SHARE = 1 / 512
"""A set whose share is nowhere more is left out: an 8-bit mask cannot say as little."""


def region_of(mask: torch.Tensor | None, name: str = "region") -> torch.Tensor | None:
    """A MASK as (masks, height, width) in float32 on the CPU, from 0 to 1; None stays None.

    Raises :class:`SeFiError`, with the input's ``name``, where values of it are not numbers.
    """
    if mask is None:
        return None
    planes = mask.detach().to("cpu", torch.float32).reshape(-1, *mask.shape[-2:])
    if len(planes) == 0:
        raise SeFiError(f"{name} is a batch of no masks: connect a MASK, or disconnect it")
    if not torch.isfinite(planes).all():
        raise SeFiError(
            f"{name} holds values that are not numbers (NaN): check the node that made the mask"
        )
    return planes.clamp(0, 1)


def resized(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``planes`` (count, height, width) in another ``size``, stretched to it.

    A side that grows is interpolated bilinearly, then a side that shrinks is averaged by area. So
    shares come to 1 in any size, and places where one is 0 stay without it when they shrink.
    """
    grown = max(planes.shape[-2], size[0]), max(planes.shape[-1], size[1])
    planes = planes[:, None]
    if grown != planes.shape[-2:]:
        planes = F.interpolate(planes, grown, mode="bilinear", align_corners=False)
    if grown != size:
        planes = F.adaptive_avg_pool2d(planes, size)
    return planes[:, 0]


def acting_sets(regions: Sequence[torch.Tensor]) -> list[tuple[frozenset[int], torch.Tensor]]:
    """The sets of regions that act together somewhere, by their indices, with their shares.

    ``regions`` are (masks, height, width), of any sizes; a share is of the largest, of at most
    :data:`MOST_PLACES` on a side, and has a mask for each of the batch in which all of theirs have
    gone round, or where that takes more than two rounds of the longest, for each of the longest.
    Masks that come to 1 or less at a place do not meet there: each region's set has its mask, and
    the empty set what is left. Where they come to more, as few act together as it takes: the masks
    are laid end to end on a circle of length 1, and a set's share is how much of it it covers.
    """
    if not regions:
        return [(frozenset(), torch.ones(1, 1, 1))]
    height, width = (min(MOST_PLACES, max(one.shape[side] for one in regions)) for side in (1, 2))
    count, longest = lcm(*map(len, regions)), max(map(len, regions))
    if count > 2 * longest:
        count = longest
    masks = torch.stack(
        [resized(one, (height, width))[torch.arange(count) % len(one)].double() for one in regions]
    )
    ends = masks.cumsum(0)
    starts = ends - masks
    cuts = torch.cat([torch.zeros_like(masks[:1]), ends % 1]).sort(0).values
    cuts = torch.cat([cuts, torch.ones_like(masks[:1])])
    codes = 2 ** torch.arange(len(masks)).view(-1, 1, 1, 1)
    shares: dict[int, torch.Tensor] = {}
    for begin, end in zip(cuts, cuts[1:], strict=False):
        acting = ((begin + end) / 2 - starts) % 1 < masks
        code = (acting * codes).sum(0)
        for number in code[end > begin].unique().tolist():
            share = (end - begin) * (code == number)
            shares[number] = shares[number] + share if number in shares else share
    shares = {number: share for number, share in shares.items() if share.max() > LEAST_SHARE}
    total = torch.stack(list(shares.values())).sum(0)
    return [
        (frozenset(i for i in range(len(masks)) if number >> i & 1), (share / total).float())
        for number, share in sorted(shares.items())
    ]
