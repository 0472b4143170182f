"""The two losses of SeFi-IDE: the masked noise loss and the face-wise attention loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

ATTENTION_TARGETS = ("reference map", "face mask", "both")
ATTENTION_TOKENS = ("all", "placeholder", "context")


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
    sample_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the model's output, (B, C, h, w), with the background weighed down.

    ``face`` (B, 1, H, W) in [0, 1] is 1 on the face, at any size; outside it an error counts
    ``background_weight``. Weights are relative, so the loss keeps its scale. ``sample_weights``
    (B,) multiply the loss of each sample.
    """
    errors = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)
    if face is None or background_weight == 1.0:
        losses = errors.mean(dim=(1, 2, 3))
    else:
        face = F.adaptive_avg_pool2d(face, errors.shape[-2:])
        weights = background_weight + (1.0 - background_weight) * face
        total = weights.sum(dim=(1, 2, 3)).clamp_min(1e-6)
        losses = (errors * weights).sum(dim=(1, 2, 3)) / total
    if sample_weights is not None:
        losses = losses * sample_weights
    return losses.mean()


def attention_loss(
    layers: Sequence[MapPair],
    placeholder: torch.Tensor,
    face: torch.Tensor | None,
    target: str = "reference map",
    tokens: str = "all",
) -> torch.Tensor:
    """The face-wise attention loss of SeFi-IDE, the mean over layers, heads and samples.

    In each map the squared differences are summed over pixels and tokens, a squared Frobenius
    norm: the paper's weight of 0.003 would vanish with a mean. The sum is scaled to a grid of
    32 x 32, so that the weight means the same at every resolution.

    ``placeholder`` (B, tokens) is true at the placeholder's tokens. ``face`` (B, 1, H, W) in
    [0, 1] is the face mask at any size. ``target`` says what the maps are pulled to: the class
    word's ("reference map"), nothing outside the face ("face mask", placeholder only), or "both",
    where the placeholder's reference is restricted to the face. ``tokens`` are the ones that
    count: "all", the "placeholder", or its "context".
    """
    total = placeholder.new_zeros((), dtype=torch.float32)
    chosen = placeholder[:, None, None, :]  # over heads and pixels
    for layer in layers:
        seen, wanted = layer.target, layer.reference.detach()
        if target != "reference map":
            inside = F.adaptive_avg_pool2d(face, layer.size).flatten(2)[..., None]
        if target == "face mask":
            seen, wanted = torch.where(chosen, seen * (1.0 - inside), 0.0), torch.zeros_like(wanted)
        elif target == "both":
            wanted = torch.where(chosen, wanted * inside, wanted)
        if tokens != "all":
            counted = chosen if tokens == "placeholder" else ~chosen
            seen, wanted = (torch.where(counted, maps, 0.0) for maps in (seen, wanted))
        grid = 32 * 32 / (layer.size[0] * layer.size[1])
        maps = seen.shape[0] * seen.shape[1]
        total = total + F.mse_loss(seen, wanted, reduction="sum") * (grid / maps)
    return total / max(len(layers), 1)
