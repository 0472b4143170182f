"""What the pack asks of a loaded model: its family and its training schedule."""

from __future__ import annotations

import comfy.supported_models
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import (
    ModelSamplingDiscrete,
    ModelSamplingDiscreteEDM,
    StableCascadeSampling,
)

from ..stages import TRAINING_TIMESTEPS

FAMILIES = {
    comfy.supported_models.SD15: "sd1",
    comfy.supported_models.SD20: "sd2",
    comfy.supported_models.SDXL: "sdxl",
}


def family_of(model: ModelPatcher) -> str:
    """The base model family of a MODEL as identities name it; for others ComfyUI's class name."""
    config = model.model.model_config
    for supported, family in FAMILIES.items():
        if isinstance(config, supported):
            return family
    return type(config).__name__


def training_sigmas(model: BaseModel) -> torch.Tensor:
    """The sigma of every training timestep, ascending, (1000,).

    Read from the sampling that is in force now, because nodes such as ModelSamplingDiscrete (LCM,
    zero terminal SNR) change it. Continuous samplings have no training timesteps; for them it is
    the schedule that the model was trained with.
    """
    sampling = model.model_sampling
    # These two are subclasses whose timesteps are not in [0, 1000).
    discrete = isinstance(sampling, ModelSamplingDiscrete) and not isinstance(
        sampling, (ModelSamplingDiscreteEDM, StableCascadeSampling)
    )
    if not discrete:
        sampling = ModelSamplingDiscrete(model.model_config)
    return sampling.sigma(torch.arange(TRAINING_TIMESTEPS)).cpu()
