"""What the pack asks of a loaded model: its family, training schedule and cross-attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.supported_models
import torch
from comfy.latent_formats import LatentFormat
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import (
    ModelSamplingDiscrete,
    ModelSamplingDiscreteEDM,
    StableCascadeSampling,
)
from comfy.supported_models_base import BASE

from ..stages import TRAINING_TIMESTEPS

_FAMILY_CLASSES = {
    comfy.supported_models.SD15: "sd1",
    comfy.supported_models.SD20: "sd2",
    comfy.supported_models.SDXL: "sdxl",
}

Block = tuple[str, int, int]
"""A transformer block as ComfyUI's attention patches name it: part, number, index."""


def family_of(model: ModelPatcher) -> str:
    """The base model family of a MODEL as identities name it; for others ComfyUI's class name."""
    config = model.model.model_config
    for supported, family in _FAMILY_CLASSES.items():
        if isinstance(config, supported):
            return family
    return type(config).__name__


def is_refiner(model: ModelPatcher) -> bool:
    """Whether a MODEL is SDXL's refiner, which goes on with pictures of SDXL."""
    return isinstance(model.model.model_config, comfy.supported_models.SDXLRefiner)


def model_sampling_of(model: ModelPatcher) -> Any:
    """The ``model_sampling`` in force of a MODEL, which nodes such as ModelSamplingDiscrete set.

    ComfyUI puts its class together at run time, of one for the sampling and one for the output.
    """
    return model.get_model_object("model_sampling")


def latent_format_of(model: ModelPatcher) -> LatentFormat:
    """The channels and the scale of the latents that a MODEL takes."""
    latent_format: Any = model.get_model_object("latent_format")  # ComfyUI says it is a module
    return latent_format


def training_sigmas(sampling: Any, config: BASE) -> torch.Tensor:
    """The sigma of every training timestep, ascending, (1000,).

    ``sampling`` is the model's ``model_sampling`` that is in force, because nodes such as
    ModelSamplingDiscrete (LCM, zero terminal SNR) change it; ``config`` its ``model_config``.
    Continuous samplings have no training timesteps; for them it is the schedule that the model was
    trained with.
    """
    # These two are subclasses whose timesteps are not in [0, 1000).
    discrete = isinstance(sampling, ModelSamplingDiscrete) and not isinstance(
        sampling, (ModelSamplingDiscreteEDM, StableCascadeSampling)
    )
    if not discrete:
        sampling = ModelSamplingDiscrete(config)
    return sampling.sigma(torch.arange(TRAINING_TIMESTEPS))


def cross_attention_layers(unet: torch.nn.Module) -> dict[Block, torch.nn.Module]:
    """The cross-attention layers of ComfyUI's U-Net; of other architectures none."""
    parts = (
        ("input", getattr(unet, "input_blocks", ())),
        ("middle", (getattr(unet, "middle_block", None) or (),)),  # distilled ones may have none
        ("output", getattr(unet, "output_blocks", ())),
    )
    return {
        (part, number, index): transformer.get_submodule("attn2")
        for part, blocks in parts
        for number, block in enumerate(blocks)
        for layer in block
        if isinstance(layer, SpatialTransformer)
        for index, transformer in enumerate(layer.transformer_blocks)
    }


def representative_layers(unet: torch.nn.Module) -> dict[Block, torch.nn.Module]:
    """One cross-attention layer of each place in the U-Net, the middle one of those in a row.

    SDXL has up to ten in a row, on the same queries' grid, whose maps would take ten times the
    memory; Stable Diffusion 1.x and 2.x have one.
    """
    rows: dict[tuple[str, int], list[Block]] = {}
    layers = cross_attention_layers(unet)
    for block in layers:
        rows.setdefault(block[:2], []).append(block)
    return {block: layers[block] for row in rows.values() for block in (row[len(row) // 2],)}


def uncompiled() -> AbstractContextManager[object]:
    """Inside it modules run as they are, those too that a node has compiled.

    What TorchCompileModel compiles does not depend on attention patches: code of a step without
    one would go on serving steps with one.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")
