"""The miniature's autoencoder: ComfyUI's TAESD, started from a linear one.

TAESD is slow to train on a CPU. A linear network of the same shape (its blocks and ReLUs
left out) is fast, and is a special case of TAESD: a pair of channels holds every value and
its negative, so that the ReLUs lose nothing, and the residual blocks start as the identity.
``as_taesd`` writes one into the other; TAESD then goes on from there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import LATENT_CHANNELS

LATENT_NOISE = 0.08  # what a sampler leaves in a latent, in units of its deviation
WIDTH = 32  # half of TAESD's


class LinearAutoencoder(nn.Module):
    """TAESD without its blocks: latents of unit deviation at an eighth of the side."""

    def __init__(self, channels: int = LATENT_CHANNELS):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2, bias=False) for _ in range(3)),
            nn.Conv2d(WIDTH, channels, 3, padding=1),
        )
        self.scale = nn.BatchNorm2d(channels, affine=False)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(3)),
            nn.Conv2d(WIDTH, 3, 3, padding=1),
        )
        for conv in [*self.encoder, *self.decoder]:
            nn.init.orthogonal_(conv.weight)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures in [0, 1] (B, 3, H, W) to latents (B, C, H/8, W/8)."""
        return self.scale(self.encoder(pictures))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents back to pictures; the clamp is TAESD's."""
        x = self.decoder[0](torch.tanh(latents / 3) * 3)
        for conv in self.decoder[1:4]:
            x = conv(F.interpolate(x, scale_factor=2))
        return self.decoder[4](x)

    def loss(self, pictures: torch.Tensor) -> torch.Tensor:
        """Loss of a batch of pictures, with a sampler's noise on the latents."""
        latents = self.encode(pictures)
        drawn = self.decode(latents + LATENT_NOISE * torch.randn_like(latents))
        return picture_loss(drawn, pictures)


def crops(pictures: torch.Tensor, count: int, size: int, generator: torch.Generator):
    """Random square crops in [0, 1], (count, 3, size, size), aligned to latent cells."""
    rows = torch.randint(len(pictures), (count,), generator=generator)
    cells = (pictures.shape[-1] - size) // 8 + 1
    corners = 8 * torch.randint(cells, (count, 2), generator=generator)
    cut = [
        pictures[r, :, y : y + size, x : x + size]
        for r, (y, x) in zip(rows.tolist(), corners.tolist(), strict=True)
    ]
    return torch.stack(cut).float() / 255


def picture_loss(drawn: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """L1 on the pixels and on their differences, which keeps outlines sharp."""
    loss = (drawn - picture).abs().mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (drawn.diff(dim=axis) - picture.diff(dim=axis)).abs().mean()
    return loss


@torch.no_grad()
def as_taesd(linear: LinearAutoencoder, taesd: nn.Module) -> None:
    """Write the linear autoencoder into ComfyUI's TAESD, exactly."""
    from comfy.taesd.taesd import Block

    for module in taesd.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv[-1].weight)
            nn.init.zeros_(module.conv[-1].bias)
    deviation = (linear.scale.running_var + linear.scale.eps).sqrt()
    for source, target, last_scale in (
        (linear.encoder, taesd.taesd_encoder, deviation),
        (linear.decoder, taesd.taesd_decoder, None),
    ):
        convs = [m for m in target if isinstance(m, nn.Conv2d)]
        for position, (small, large) in enumerate(zip(source, convs, strict=True)):
            weight, bias = small.weight, small.bias
            if position == len(convs) - 1 and last_scale is not None:
                weight = weight / last_scale[:, None, None, None]
                bias = (bias - linear.scale.running_mean) / last_scale
            if position > 0:
                weight = torch.cat([weight, -weight], dim=1)
            if position < len(convs) - 1:
                weight = torch.cat([weight, -weight], dim=0)
                bias = None if bias is None else torch.cat([bias, -bias])
            large.weight.copy_(weight)
            if bias is not None:
                large.bias.copy_(bias)


def decoder_loss(
    taesd: nn.Module, linear: LinearAutoencoder, pictures: torch.Tensor
) -> torch.Tensor:
    """Loss of TAESD's decoder on the linear encoder's latents, with a sampler's noise."""
    with torch.no_grad():
        latents = linear.encode(pictures)
        latents = latents + LATENT_NOISE * torch.randn_like(latents)
    return picture_loss(taesd.taesd_decoder(latents), pictures)
