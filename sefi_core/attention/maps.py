"""Attention maps from queries and keys."""

from __future__ import annotations

import torch


def attention_probabilities(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """``softmax(q k^T / sqrt(d))`` of every head, (B, heads, pixels, tokens), in float32.

    ``q`` is (B, pixels, heads * d) and ``k`` (B, tokens, heads * d), as ComfyUI's attention
    patches get them.
    """
    scale = (q.shape[-1] // heads) ** -0.5  # of the queries, the smaller tensor
    q, k = (split_heads(tensor, heads) for tensor in (q.float() * scale, k.float()))
    return (q @ k.transpose(-1, -2)).softmax(dim=-1)


def key_probabilities(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """:func:`attention_probabilities` with a gradient in the keys only, the queries held still."""
    return attention_probabilities(q.detach(), k, heads)


def attend(probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The output (B, pixels, heads * d) of attention with these probabilities, in v's type.

    ``probabilities`` is (B, heads, pixels, tokens), ``v`` (B, tokens, heads * d).
    """
    out = probabilities.to(v.dtype) @ split_heads(v, probabilities.shape[1])
    return out.transpose(1, 2).flatten(2)


def split_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, tokens, heads * d) as (B, heads, tokens, d)."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
