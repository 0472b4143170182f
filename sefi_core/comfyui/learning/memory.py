"""Memory of a training step, and whether the U-Net is computed again to save some of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ..base_model import family_of

logger = logging.getLogger(__name__)

BYTES_PER_CELL = {"sd1": 243_000, "sd2": 243_000, "sdxl": 445_000}
"""Family -> what a step keeps for the backward pass, in bytes of half precision per latent cell.

Counted on the true shapes by PyTorch's ``saved_tensors_hooks``: 228,000 of the U-Net of Stable
Diffusion 1.x, 420,000 of SDXL's, and the attention maps of the layers that the losses look at.
"""

BYTES_PER_CELL_AGAIN = 100_000
"""The same with gradient checkpointing: 38,000 and 35,000, the maps, and one block's own."""

SPARE = 1.25
"""For gradients and what the allocator cannot use."""


def memory_of_a_step(model: ModelPatcher, shape: Sequence[int], checkpointing: bool) -> int:
    """Bytes that forward and backward of latents (B, C, h, w) take beside the weights."""
    per_cell = BYTES_PER_CELL.get(family_of(model), max(BYTES_PER_CELL.values()))
    if checkpointing:
        per_cell = BYTES_PER_CELL_AGAIN
    size = comfy.model_management.dtype_size(model.model.get_dtype_inference())
    return int(SPARE * per_cell * size / 2 * shape[0] * shape[2] * shape[3])


def is_checkpointing(wanted: str, patchers: Sequence[ModelPatcher], shape: Sequence[int]) -> bool:
    """Whether to compute the U-Net's blocks once more in the backward pass.

    ``wanted`` is one of :data:`settings.CHECKPOINTING`; "auto" does it where what a step keeps of
    latents of this shape does not fit beside the weights. ``patchers`` are the MODEL's and those of
    whatever else must stay loaded.
    """
    if wanted != "auto":
        return wanted == "on"
    needed, free = memory_of_a_step(patchers[0], shape, False), _room(patchers)
    if free >= needed:
        logger.info(
            "SeFi Train Identity: gradient checkpointing is off, a step takes about %.1f of %.1f "
            "GB.",
            needed / 1e9,
            free / 1e9,
        )
        return False
    logger.info(
        "SeFi Train Identity: gradient checkpointing is on, a step would take about %.1f GB of "
        "%.1f GB that are free beside the weights.",
        needed / 1e9,
        max(0.0, free / 1e9),
    )
    return True


def _room(patchers: Sequence[ModelPatcher]) -> float:
    """Bytes that are free beside these models' weights, once ComfyUI has unloaded all others."""
    device = patchers[0].load_device
    free: Any = comfy.model_management.get_free_memory(device)  # a tuple if one asks for more
    if comfy.model_management.is_device_cpu(device):
        return free  # where weights are in the computer's memory already
    loaded = comfy.model_management.current_loaded_models
    free += sum(one.model_loaded_memory() for one in loaded if one.device == device)
    return free - sum(patcher.model_size() for patcher in patchers)
