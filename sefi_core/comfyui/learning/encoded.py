"""Prompts that are encoded for the training: embeddings that are put in, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ...learning.parametrisation import Vectors
from ..clip.tokens import PlaceholderToken, Tokens, items_of

Rows = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
"""Token embeddings (vectors, width) of each text encoder for K and for V, in one stage."""

Encoded = tuple[torch.Tensor, torch.Tensor | None]
"""A prompt's context (1, tokens, width) and its pooled output (1, width), or None."""


class Texts(NamedTuple):
    """Encoded prompts of a batch: contexts for keys and values (B, tokens, width), pooled output.

    The pooled output (B, width), or None, is that of the V prompt, as while sampling.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pooled: torch.Tensor | None


def rows_of(keys: Vectors, values: Vectors, stage: int) -> Rows:
    """The embeddings of one stage."""
    key = {encoder: rows[stage] for encoder, rows in keys.items()}
    if values is keys:
        return key, key
    return key, {encoder: rows[stage] for encoder, rows in values.items()}


def texts_of(keys: Sequence[Encoded], values: Sequence[Encoded]) -> Texts:
    """The prompts of a batch, repeated to one length; ``values`` may be ``keys`` themselves."""
    length = math.lcm(*(context.shape[1] for context, _ in keys))
    pooled = [one for _, one in values if one is not None]
    of_keys = stacked([context for context, _ in keys], length)
    return Texts(
        of_keys,
        of_keys if values is keys else stacked([context for context, _ in values], length),
        torch.cat(pooled) if pooled else None,
    )


def placeholder_tokens(tokens: Tokens) -> torch.Tensor:
    """1 for the placeholder's tokens of a prompt, (1, tokens, 1)."""
    of_encoders = zip(*(items_of(chunks) for chunks in tokens.values()), strict=True)
    marked = [any(isinstance(item, PlaceholderToken) for item in items) for items in of_encoders]
    return torch.tensor(marked, dtype=torch.float32)[None, :, None]


def stacked(tensors: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Prompts (1, tokens, width) as one batch (B, length, width).

    ``length`` is a multiple of each; the prompts are repeated, as ComfyUI's ``CONDCrossAttn`` does.
    """
    if len(tensors) == 1 and tensors[0].shape[1] == length:
        return tensors[0]
    return torch.cat([tensor.repeat(1, length // tensor.shape[1], 1) for tensor in tensors])
