"""The token embeddings of ComfyUI's text encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel

from .tokens import class_word_ids, encoder_models

SD1_EMBEDDING_SIZE = 0.014
"""Root mean square of Stable Diffusion 1.x's token embeddings: 768 numbers of a norm of 0.39."""

SAMPLED_ROWS = 1024


def class_word_embedding(clip: CLIP, class_word: str) -> dict[str, torch.Tensor]:
    """Text encoder -> token embeddings (tokens, width) of a class word, one row per token."""
    clip.load_model()
    ids = class_word_ids(clip, class_word)
    return {
        encoder: token_embeddings(model, ids) for encoder, model in encoder_models(clip).items()
    }


def token_embeddings(model: SDClipModel, ids: Sequence[int]) -> torch.Tensor:
    """Rows (len(ids), width) of a loaded encoder's table of token embeddings, float32, CPU."""
    table = model.transformer.get_input_embeddings()
    device = model.execution_device or table.weight.device  # as SDClipModel.forward chooses it
    with torch.inference_mode():  # samplers have made ComfyUI's cast buffers in it
        rows = table(torch.tensor(ids, device=device), out_dtype=torch.float32)
    return rows.to("cpu", torch.float32, copy=True)


def position_embeddings(model: SDClipModel) -> torch.Tensor:
    """What a loaded encoder adds to each place of a chunk, (tokens, width), float32, CPU."""
    weight = model.transformer.text_model.embeddings.position_embedding.weight
    return weight.detach().to("cpu", torch.float32, copy=True)


def with_last_repeated(rows: torch.Tensor, least: int) -> torch.Tensor:
    """Token embeddings (vectors, width) with ``least`` rows or more: the last one is repeated.

    As the tokens of a placeholder are where it has more positions than its class word has tokens.
    """
    return torch.cat([rows, rows[-1:].expand(max(0, least - len(rows)), -1)])


def embedding_units(clip: CLIP) -> dict[str, float]:
    """Text encoder -> size of its token embeddings over Stable Diffusion 1.x's.

    The size is the root mean square of rows all over the table. With it a learning rate means what
    trainers for Stable Diffusion 1.x mean by it, whatever the encoder.
    """
    clip.load_model()
    units = {}
    for encoder, model in encoder_models(clip).items():
        size = model.transformer.get_input_embeddings().weight.shape[0]
        rows = token_embeddings(model, range(0, size, max(1, size // SAMPLED_ROWS)))
        units[encoder] = float(rows.square().mean().sqrt()) / SD1_EMBEDDING_SIZE
    return units
