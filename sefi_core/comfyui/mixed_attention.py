"""Mixed attention for a MODEL, with what a user chooses in words."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher

from ..errors import SeFiError
from ..regions import region_of
from .base_model import cross_attention_layers
from .unet.mixing import mix_attention
from .unet.mixing_step import MixSettings

TRAJECTORIES = ("own", "same")

ADAIN = {
    "off": (False, False),
    "keys": (True, False),
    "values": (False, True),
    "keys and values": (True, True),
}
"""Where the mean is moved -> in keys, in values."""

IDENTITIES = ("SeFi", "other nodes")


def mixed_attention(
    model: ModelPatcher,
    trajectory: str,
    adain_mean: str,
    hides_face: bool,
    start_percent: float,
    end_percent: float,
    identity: str,
    face_mask: torch.Tensor | None,
) -> ModelPatcher:
    """A clone of ``model`` with mixed attention; one that it has already is replaced.

    Raises :class:`SeFiError` if the range is empty, the mask is not one, or the model is no U-Net
    of Stable Diffusion.
    """
    if start_percent >= end_percent:
        raise SeFiError(
            f"the range is empty, start_percent {start_percent:g} to end_percent {end_percent:g}: "
            "set end_percent above start_percent"
        )
    if not cross_attention_layers(model.model.diffusion_model):
        raise SeFiError(
            "model has no attention layers that can be mixed: use a Stable Diffusion 1.x, 2.x or "
            "SDXL model"
        )
    keys, values = ADAIN[adain_mean]
    settings = MixSettings(
        own=trajectory == "own",
        adain_keys=keys,
        adain_values=values,
        start_percent=start_percent,
        end_percent=end_percent,
        hides=hides_face,
        mask=region_of(face_mask, "face_mask"),
        of_others=identity == "other nodes",
    )
    return mix_attention(model, settings)
