"""The losses of SeFi-IDE: the masked noise loss, the face-wise attention loss and the leak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class MapPair(NamedTuple):
    """The maps of one cross-attention layer, (B, heads, pixels, tokens) each.

    ``target`` comes from the prompt with the placeholder, ``reference`` from the same prompt with
    the class word, both with the same queries; ``size`` is (height, width) of the pixels. The
    gradient of ``target`` reaches the keys only: through the queries it would reach the values of
    the layers before, which say what the identity looks like.
    """

    target: torch.Tensor
    reference: torch.Tensor
    size: tuple[int, int]

    def target_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where ``tokens`` (B, tokens), 1 each, are looked at, (B, height, width): heads' mean."""
        maps = self.target.mean(dim=1) @ tokens[..., None].to(self.target.dtype)
        return maps.unflatten(1, self.size)[..., 0]


def noise_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    face: torch.Tensor | None = None,
    background_weight: float = 1.0,
    background: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the model's output, (B, C, h, w), with the background weighed down.

    ``face`` (B, 1, H, W) in [0, 1] is 1 on the face, at any size; outside it an error counts
    ``background_weight``. Weights are relative, so the loss keeps its scale. With ``background``
    (B, C, h, w) the target outside the face is that: class-guided denoising regularisation
    (Face2Diffusion, section 3.4).
    """
    if face is not None and background is not None:
        height, width = target.shape[-2:]
        here = F.adaptive_avg_pool2d(face, (height, width))
        target = torch.lerp(background.float(), target.float(), here)
    errors = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)
    if face is None or background_weight == 1.0:
        losses = errors.mean(dim=(1, 2, 3))
    else:
        height, width = errors.shape[-2:]
        face = F.adaptive_avg_pool2d(face, (height, width))
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


def leak(maps: Sequence[torch.Tensor], face: torch.Tensor) -> torch.Tensor:
    """Share (B,) of a word's attention that is on cells which show nothing of the face.

    ``maps`` are the word's (B, h, w) of every layer, each at the layer's own size, where no
    outline depends on how it was resized; all layers count by what they attend. ``face`` (B, 1, H,
    W) in [0, 1] is 1 on the face. A word that is looked at nowhere does not leak.

    The gradient lowers the attention outside and leaves that on the face alone: looking harder at
    the face would lower the share too, and hide what other words say of it.
    """
    of_size: dict[torch.Size, torch.Tensor] = {}
    for layer in maps:
        size = layer.shape[1:]
        of_size[size] = of_size[size] + layer if size in of_size else layer
    outside = total = maps[0].new_zeros(())
    for size, layer in of_size.items():
        hidden = 1 - F.adaptive_max_pool2d(face, size)[:, 0]
        outside = outside + (layer * hidden).mean(dim=(1, 2))
        total = total + layer.detach().mean(dim=(1, 2))
    return outside / total.clamp_min(1e-12)
