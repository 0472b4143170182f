"""The networks that turn a face into image tokens (``image_proj`` of IP-Adapter's files).

Module names are those of the published files, whose weights load as they are. All of them take
faces (rows, people, F) and, where they look at pictures, a CLIP's states (rows, N, C), and give
image tokens (rows, T, width).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64
"""Channels of an attention head in the resamplers."""


class Sizes(NamedTuple):
    """Of a projection: a face's embedding, the tokens' width, their number, the CLIP's states."""

    face: int
    width: int
    tokens: int = 4
    states: int = 0
    hidden: int = 0
    """Of the perceptron, by default twice the embedding."""
    depth: int = 4
    inner: int = 0
    """Of a resampler with latents of its own, by default ``width``."""


class FaceProjection(nn.Module):
    """FaceID and FaceID portrait: a perceptron gives each face ``tokens`` tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden = sizes.hidden or 2 * sizes.face
        self.width = sizes.width
        self.proj = nn.Sequential(
            nn.Linear(sizes.face, hidden),
            nn.GELU(),
            nn.Linear(hidden, sizes.width * sizes.tokens),
        )
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, faces: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Image tokens (rows, people x tokens, width); a CLIP's states say nothing."""
        return self.norm(self.proj(faces).reshape(len(faces), -1, self.width))


class PlusProjection(FaceProjection):
    """FaceID plus: the face's tokens look at a CLIP's states of the picture.

    With ``shortcut``, as in plus v2, what they find is added to them.
    """

    def __init__(self, sizes: Sizes, shortcut: bool) -> None:
        super().__init__(sizes)
        self.shortcut = shortcut
        self.perceiver_resampler = Perceiver(sizes.width, sizes.width, sizes.states, sizes.depth)

    def forward(self, faces: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Image tokens (rows, people x tokens, width); the states must be given."""
        assert states is not None
        tokens = super().forward(faces)
        found = self.perceiver_resampler(tokens, states)
        return tokens + found if self.shortcut else found


class _Layers(nn.Module):
    """Tokens that look at a sequence, and at each other, layer by layer."""

    def __init__(self, inner: int, width: int, looks_at: int, depth: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(looks_at, inner)
        self.proj_out = nn.Linear(inner, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Look(inner), _Think(inner)]) for _ in range(depth)
        )

    def perceive(self, tokens: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        """Tokens (rows, T, inner) and a sequence (rows, N, looks_at) to (rows, T, width)."""
        seen = self.proj_in(sequence)
        for layer in self.layers:
            look, think = layer.children()
            tokens = tokens + look(tokens, seen)
            tokens = tokens + think(tokens)
        return self.norm_out(self.proj_out(tokens))


class Perceiver(_Layers):
    """The tokens are given."""

    def forward(self, tokens: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        """See :meth:`perceive`."""
        return self.perceive(tokens, sequence)


class Resampler(_Layers):
    """Latents of its own look at a sequence: FaceID portrait unnorm, which looks at the faces."""

    def __init__(self, sizes: Sizes, looks_at: int | None = None) -> None:
        inner = sizes.inner or sizes.width
        super().__init__(inner, sizes.width, looks_at or sizes.face, sizes.depth)
        self.latents = nn.Parameter(torch.randn(1, sizes.tokens, inner) / math.sqrt(inner))

    def forward(self, faces: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Image tokens (rows, tokens, width)."""
        return self.perceive(self.latents.expand(len(faces), -1, -1), faces)


class PairProjection(nn.Module):
    """Infinite-ID (arXiv 2403.11781): tokens of the picture, then tokens of the face."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.clip = Resampler(sizes._replace(tokens=sizes.tokens * 4), looks_at=sizes.states)
        self.face = FaceProjection(sizes)

    def forward(self, faces: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Image tokens (rows, 4 x tokens + people x tokens, width); states must be given."""
        assert states is not None
        return torch.cat([self.clip(states), self.face(faces)], dim=1)


class _Look(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        tokens = self.norm2(tokens)
        pairs = self.to_kv(torch.cat([self.norm1(seen), tokens], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.to_q(tokens), *pairs)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Think(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
