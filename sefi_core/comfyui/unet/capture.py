"""Looking into cross-attention: what the layers at some levels of the U-Net attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import optimized_attention

from ..base_model import Block

LEVELS = (2, 4)
"""The latent's side through that of the layers whose attention maps are looked at."""

PATCH = "attn2"

SHARE = "sefi_share"
"""The option that has the :class:`Share`."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
"""An ``attn2_replace`` patch: queries, keys, values (B, n, heads * d) and options to the output."""


class Share(NamedTuple):
    """What part of the layer's attention this one is, where identities have regions.

    The layer attends ``parts`` times, and what it gives is the sum by ``of_queries`` (rows,
    queries, 1).
    """

    number: int
    parts: int
    of_queries: torch.Tensor | float


WHOLE = Share(0, 1, 1.0)


class Layer(NamedTuple):
    """A cross-attention layer while it computes; ``size`` is (height, width) of the queries."""

    block: Block
    heads: int
    size: tuple[int, int]
    share: Share = WHOLE


Look = Callable[[Layer, torch.Tensor, torch.Tensor, torch.Tensor], "torch.Tensor | None"]
"""Gets a layer, q, k and v; returns the layer's output if it has computed that itself."""


def looking(
    look: Look, height: int, previous: Attend | None = None, otherwise: Attend | None = None
) -> Attend:
    """An ``attn2_replace`` patch that shows the layers at :data:`LEVELS` to ``look``.

    ``height`` is that of the latents. What the layer gives is that of ``look``, of ``previous``,
    the patch that was there, or of ``otherwise``, by default ComfyUI's attention.
    """
    compute = previous or otherwise or plain_attention

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        rows, columns = options["activations_shape"][-2:]
        output = None
        if round(height / rows) in LEVELS:
            block = *options["block"], options["block_index"]
            share = options.get(SHARE, WHOLE)
            output = look(Layer(block, options["n_heads"], (rows, columns), share), q, k, v)
        return compute(q, k, v, options) if output is None else output

    return attend


def previous_patch(replaced: Mapping[Any, Attend], block: Block) -> Attend | None:
    """The patch in force at a block: ComfyUI looks for the layer's first, then the whole block's.

    ``replaced`` are the ``attn2`` patches of a MODEL's ``patches_replace``.
    """
    return replaced.get(block, replaced.get(block[:2]))


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """What a layer without a patch computes."""
    return optimized_attention(
        q,
        k,
        v,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
    )
