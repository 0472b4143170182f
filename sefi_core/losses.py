"""The two losses of SeFi-IDE: the masked noise loss and the face-wise attention loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class MapPair(NamedTuple):
    """The maps of one cross-attention layer, (B, heads, pixels, tokens) each.

    ``target`` comes from the prompt with the placeholder, ``reference`` from the same prompt with
    the class word, both with the same queries; ``size`` is (height, width) of the pixels.
    """

    target: torch.Tensor
    reference: torch.Tensor
    size: tuple[int, int]


def noise_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    face: torch.Tensor | None = None,
    background_weight: float = 1.0,
) -> torch.Tensor:
    """Mean squared error of the model's output, (B, C, h, w), with the background weighed down.

    ``face`` (B, 1, H, W) in [0, 1] is 1 on the face, at any size; outside it an error counts
    ``background_weight``. Weights are relative, so the loss keeps its scale.
    """
    errors = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)
    if face is None or background_weight == 1.0:
        losses = errors.mean(dim=(1, 2, 3))
    else:
        face = F.adaptive_avg_pool2d(face, errors.shape[-2:])
        weights = background_weight + (1.0 - background_weight) * face
        total = weights.sum(dim=(1, 2, 3)).clamp_min(1e-6)
        losses = (errors * weights).sum(dim=(1, 2, 3)) / total
    return losses.mean()


def attention_loss(layers: Sequence[MapPair]) -> torch.Tensor:
    """The face-wise attention loss of SeFi-IDE, the mean over layers, heads and samples.

    In each map the squared differences from the class word's are summed over pixels and tokens, a
    squared Frobenius norm: the paper's weight of 0.003 would vanish with a mean. The sum is scaled
    to a grid of 32 x 32, so that the weight means the same at every resolution. There is at least
    one layer.
    """
    losses = []
    for target, reference, (height, width) in layers:
        maps = target.shape[0] * target.shape[1]
        distance = F.mse_loss(target, reference.detach(), reduction="sum")
        losses.append(distance * (32 * 32 / (height * width * maps)))
    return torch.stack(losses).mean()
