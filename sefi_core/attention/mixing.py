"""Mixed attention: a picture's self-attention also looks at the picture of the plain text.

Infinite-ID (arXiv 2403.11781) gives the layers' self-attention the keys and values of both,
``[K_id; K_t]``. Projections are linear, so that tokens are put together before them; so is moving a
mean (AdaIN-mean), not scaling by a deviation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..regions import resized

FACE_LEAST = 0.35
"""Attention to the class word below this share of the highest is background."""

FACE_MOST = 0.65
"""From this share on it is all person."""


def adain_mean(tokens: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """``tokens`` (rows, tokens, width) moved so that their mean is that of ``style``."""
    return tokens - tokens.mean(1, keepdim=True) + style.mean(1, keepdim=True)


def hide(text: torch.Tensor, own: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The text's tokens, where ``mask`` (rows, tokens, 1) is 1 the identity's own in their place.

    The text draws another person; nothing of that one's face is looked at then.
    """
    return torch.lerp(text, own, mask.to(text))


def mixed(own: torch.Tensor, text: torch.Tensor, adain: bool) -> torch.Tensor:
    """What an identity's rows attend to: both pictures' tokens (rows, 2 * tokens, width)."""
    return torch.cat([adain_mean(own, text) if adain else own, text], dim=1)


def person_mask(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where a picture shows what a word means, (height, width) from 0 to 1.

    ``layers`` are maps (height, width) of the attention to the word, each at its layer's size. The
    highest of each is 1, their mean is taken at the largest size, and made steeper.
    """
    size = max((layer.shape[0], layer.shape[1]) for layer in layers)
    planes = torch.cat([resized(layer[None].float(), size) for layer in layers])
    planes = planes / planes.amax((1, 2), keepdim=True).clamp_min(1e-12)
    together = planes.mean(0)
    together = together / together.max().clamp_min(1e-12)
    return ((together - FACE_LEAST) / (FACE_MOST - FACE_LEAST)).clamp(0, 1)
