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
    of the U-Net per photo. ComfyUI's cancel button stops it.
    """
    phrases = ("", *EXPRESSIONS)
    prompts = [with_caption(template, phrase) for phrase in phrases]
    denoiser = ComfyDenoiser(
        model, clip, [identity], prompts, latents, masks, sides=sides, with_maps=False
    )
    found = []
    for sample in range(len(latents)):
        losses = {}
        for number, phrase in enumerate(phrases):
            losses[phrase] = 0.0
            for timestep in TIMESTEPS:
                comfy.model_management.throw_exception_if_processing_interrupted()
                batch = Batch([sample], [number], [timestep], timestep)
                made = denoiser(identity.key_vectors, identity.key_vectors, batch)
                losses[phrase] += noise_loss(made.output, made.target, made.face, 0.0).item()
        found.append(best_phrase(losses))
    return found
