"""The pictures that go with a training: where the placeholder looks, and what it draws."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...attention.heat_maps import added_up, heat_picture
from ...errors import SeFiError, printable
from ...identity.identity import Identity
from ...images import resized
from ...learning.loop import Batch
from ...learning.losses import noise_loss
from ...learning.parametrisation import Vectors
from ...learning.report import text_picture
from ..apply import apply_identity
from ..base_model import latent_format_of
from ..methods.tokens import AppliedIdentity
from .denoiser import ComfyDenoiser

logger = logging.getLogger(__name__)

MAP_TIMESTEP = 400
LOSS_TIMESTEPS = (MAP_TIMESTEP, 150, 700)
"""Where the loss before and after is measured: at middling, little and much noise."""

SAMPLE_STEPS, PREVIEW_STEPS, SAMPLE_CFG, SAMPLE_SEED = 10, 4, 5.0, 0
OVERLAY_SIDE = 384
"""Of the picture of the attention, in pixels."""


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


class Look(NamedTuple):
    """How the model sees the first photo with some vectors.

    ``where`` (h, w) is where the placeholder looks, with a maximum of 1; ``loss`` the noise loss on
    fixed noise at fixed timesteps, which can be compared, as those of the steps cannot.
    """

    where: torch.Tensor
    loss: float


@torch.no_grad()
def look(
    denoiser: ComfyDenoiser,
    keys: Vectors,
    values: Vectors,
    background: float,
    timesteps: Sequence[int] = LOSS_TIMESTEPS,
) -> Look:
    """See :class:`Look`; ``background`` is the weight of what is outside the mask.

    ``timesteps`` are those of the loss, and one of them is :data:`MAP_TIMESTEP`.
    """
    with_maps = denoiser.with_maps
    losses, where = [], torch.empty(0)
    try:
        for timestep in timesteps:
            denoiser.with_maps = timestep == MAP_TIMESTEP
            seen = denoiser(keys, values, Batch([0], [0], [timestep], 0))
            losses.append(noise_loss(seen.output, seen.target, seen.face, background).item())
            if denoiser.with_maps:
                where = maps_together([[maps.cpu() for maps in seen.placeholder_maps()]])
    finally:
        denoiser.with_maps = with_maps
    return Look(where, sum(losses) / len(losses))


def attention_picture(where: torch.Tensor, photo: torch.Tensor) -> torch.Tensor:
    """A map (h, w) over the photo (H, W, 3), as a picture of :data:`OVERLAY_SIDE` pixels a side."""
    size = (OVERLAY_SIDE, OVERLAY_SIDE)
    photo = resized(photo.float().cpu().movedim(-1, 0), size).movedim(0, -1)
    heat = added_up([where[None].float().cpu()], size)[0]
    return heat_picture(heat, photo, "")[:OVERLAY_SIDE]


def maps_together(looks: Iterable[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The maps (1, h, w) of the layers of some passes as one of the largest layer's size."""
    looks = list(looks)
    size = max((layer.shape[1], layer.shape[2]) for layer in looks[0])
    together = [
        torch.stack(layers).float().mean(dim=0).cpu() for layers in zip(*looks, strict=True)
    ]
    return added_up(together, size)[0]


def sample_picture(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    identity: Identity,
    prompt: str,
    side: int,
    steps: int = SAMPLE_STEPS,
) -> torch.Tensor:
    """A quick picture (side, side, 3) of a prompt with the identity applied."""
    with torch.inference_mode():
        model, clip = apply_identity(model, clip, AppliedIdentity(identity))
    return picture_of(model, clip, vae, prompt, side, steps)


@torch.inference_mode()  # as any sampler, with which ComfyUI's cast buffers are shared
def picture_of(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    prompt: str,
    side: int,
    steps: int = SAMPLE_STEPS,
) -> torch.Tensor:
    """A quick picture (side, side, 3) of a prompt."""
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")
    )
    shape = (1, latent_format_of(model).latent_channels, side // 8, side // 8)
    latent = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latent, SAMPLE_SEED)
    samples = comfy.sample.sample(
        model, noise, steps, SAMPLE_CFG, "euler", "normal", positive, negative, latent,
        disable_pbar=True, seed=SAMPLE_SEED,
    )  # fmt: skip
    picture = vae.decode(samples)[0]
    if not torch.isfinite(picture).all():
        raise SeFiError(
            "vae gives pictures that are not numbers (NaN): start ComfyUI with --fp32-vae"
        )
    return picture


def preview_side(side: int, scale: float) -> int:
    """Side of a preview for training pictures of ``side`` pixels, in whole cells of the U-Net."""
    return max(64, round(side * scale / 64) * 64)
