"""The token embeddings of ComfyUI's text encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.sd import CLIP

from .tokens import class_word_ids, encoder_names, token_widths

SD1_EMBEDDING_SIZE = 0.014
"""Root mean square of Stable Diffusion 1.x's token embeddings: 768 numbers of a norm of 0.39."""

SAMPLED_ROWS = 1024


def class_word_embedding(clip: CLIP, class_word: str) -> dict[str, torch.Tensor]:
    """Text encoder -> token embeddings (tokens, width) of a class word, one row per token."""
    clip.load_model()
    ids = class_word_ids(clip, class_word)
    return {
        encoder: token_embeddings(clip.cond_stage_model, encoder, ids)
        for encoder in encoder_names(clip)
    }


def token_embeddings(
    text_encoder: torch.nn.Module, encoder: str, ids: Sequence[int]
) -> torch.Tensor:
    """Rows (len(ids), width) of an encoder's table of token embeddings, float32 on the CPU.

    ``text_encoder`` is a loaded CLIP's ``cond_stage_model``.
    """
    model = getattr(text_encoder, f"clip_{encoder}")
    table = model.transformer.get_input_embeddings()
    device = model.execution_device or table.weight.device  # as SDClipModel.forward chooses it
    with torch.inference_mode():  # samplers have made ComfyUI's cast buffers in it
        rows = table(torch.tensor(ids, device=device), out_dtype=torch.float32)
    return rows.to("cpu", torch.float32, copy=True)


def embedding_units(clip: CLIP) -> dict[str, float]:
    """Text encoder -> size of its token embeddings over Stable Diffusion 1.x's.

    The size is the root mean square of rows all over the table. With it a learning rate means what
    trainers for Stable Diffusion 1.x mean by it, whatever the encoder.
    """
    clip.load_model()
    units = {}
    for encoder in token_widths(clip):
        table = getattr(clip.cond_stage_model, f"clip_{encoder}").transformer.get_input_embeddings()
        ids = range(0, table.weight.shape[0], max(1, table.weight.shape[0] // SAMPLED_ROWS))
        rows = token_embeddings(clip.cond_stage_model, encoder, ids)
        units[encoder] = float(rows.square().mean().sqrt()) / SD1_EMBEDDING_SIZE
    return units
