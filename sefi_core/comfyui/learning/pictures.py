"""The pictures that go with a training: where the placeholder looks, and what it draws."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...attention.heat_maps import added_up
from ...errors import SeFiError, printable
from ...identity.identity import Identity
from ...learning.loop import Batch
from ...learning.parametrisation import Vectors
from ...learning.report import text_picture
from ..apply import apply_identity
from ..base_model import latent_format_of
from ..methods.tokens import AppliedIdentity
from .denoiser import ComfyDenoiser

logger = logging.getLogger(__name__)

MAP_TIMESTEP = 400
PREVIEW_STEPS, PREVIEW_CFG, PREVIEW_SEED = 10, 5.0, 0


def picture_or_why_not(what: str, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A picture (H, W, 3) that decorates a training, or one that says why there is none.

    What was learned is not lost for it, whatever goes wrong.
    """
    try:
        return draw()
    except Exception as error:
        why = printable(str(error)) or type(error).__name__
        logger.warning("SeFi Train Identity: the %s could not be drawn: %s", what, why)
        return text_picture(f"The {what} could not be drawn: {why}")


@torch.no_grad()
def placeholder_map(denoiser: ComfyDenoiser, keys: Vectors, values: Vectors) -> torch.Tensor:
    """Where the placeholder looks in the first training picture, (h, w) with a maximum of 1."""
    with_maps, denoiser.with_maps = denoiser.with_maps, True
    try:
        prediction = denoiser(keys, values, Batch([0], [0], [MAP_TIMESTEP], 0))
    finally:
        denoiser.with_maps = with_maps
    seen = [maps.cpu() for maps in prediction.placeholder_maps()]
    return added_up(seen, max(layer.size for layer in prediction.layers))[0]


@torch.inference_mode()  # as any sampler, with which ComfyUI's cast buffers are shared
def sample_picture(
    model: ModelPatcher, clip: CLIP, vae: VAE, identity: Identity, prompt: str, side: int
) -> torch.Tensor:
    """A quick picture (side, side, 3) of a prompt with the identity applied."""
    model, clip = apply_identity(model, clip, AppliedIdentity(identity))
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")
    )
    shape = (1, latent_format_of(model).latent_channels, side // 8, side // 8)
    latent = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latent, PREVIEW_SEED)
    samples = comfy.sample.sample(
        model, noise, PREVIEW_STEPS, PREVIEW_CFG, "euler", "normal", positive, negative, latent,
        disable_pbar=True, seed=PREVIEW_SEED,
    )  # fmt: skip
    picture = vae.decode(samples)[0]
    if not torch.isfinite(picture).all():
        raise SeFiError(
            "vae gives pictures that are not numbers (NaN): start ComfyUI with --fp32-vae"
        )
    return picture
