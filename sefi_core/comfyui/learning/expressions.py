"""Which expression a photo shows, asked of the loaded model itself.

Where the model's noise loss inside the face is lower with "smiling" in the prompt, the photo shows
a smile: the diffusion classifier of Li et al. 2023. No other model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...identity.identity import Identity
from ...learning.loop import Batch
from ...learning.losses import noise_loss
from ...text.captions import EXPRESSIONS, best_phrase, with_caption
from .denoiser import ComfyDenoiser

TIMESTEPS = (125, 200, 275, 350, 425, 500, 575, 650)
"""Where expressions are decided: less noise leaves nothing to explain, more hides the face."""


@torch.inference_mode()  # as samplers, with which ComfyUI's cast buffers are shared
def expressions_in(
    model: ModelPatcher,
    clip: CLIP,
    identity: Identity,
    template: str,
    latents: torch.Tensor,
    masks: torch.Tensor | None,
    sides: Sequence[int] | None = None,
) -> list[str]:
    """For each of the latents (N, C, h, w) one of ``EXPRESSIONS``, or "" where none is clear.

    ``identity`` has the class word's vectors, ``template`` is a training prompt, and ``masks`` (N,
    1, H, W) are the faces or None, ``sides`` as in :class:`ComfyDenoiser`. Costs 56 forward passes
    of the U-Net per photo, as many at once as there is room for. ComfyUI's cancel button stops it.
    """
    phrases: tuple[str, ...] = ("", *EXPRESSIONS)
    prompts = [with_caption(template, phrase) for phrase in phrases]
    denoiser = ComfyDenoiser(
        # Without gradients a pass takes no more memory than with checkpointing.
        model, clip, [identity], prompts, latents, masks, sides=sides, checkpointing=True,
        with_maps=False,
    )  # fmt: skip
    at_once = _at_once(model, latents, len(phrases))
    found = []
    for sample in range(len(latents)):
        face = None if masks is None else masks[sample : sample + 1]
        losses: dict[str, float] = dict.fromkeys(phrases, 0.0)
        for timestep in TIMESTEPS:
            for first in range(0, len(phrases), at_once):
                comfy.model_management.throw_exception_if_processing_interrupted()
                numbers = range(len(phrases))[first : first + at_once]
                batches = [Batch([sample], [number], [timestep], timestep) for number in numbers]
                output, target = denoiser.predict_class_word({}, *batches)
                known = None if face is None else face.to(output.device)
                for row, number in enumerate(numbers):
                    part = slice(row, row + 1)
                    loss = noise_loss(output[part], target[part], known, 0.0)
                    losses[phrases[number]] += loss.item()
        found.append(best_phrase(losses))
    return found


def _at_once(model: ModelPatcher, latents: torch.Tensor, wanted: int) -> int:
    """How many passes there is room for, as ComfyUI's ``calc_cond_batch`` counts."""
    free = comfy.model_management.get_free_memory(model.load_device)
    for count in range(wanted, 1, -1):
        if model.memory_required([count, *latents.shape[1:]]) * 1.5 < free:
            return count
    return 1
