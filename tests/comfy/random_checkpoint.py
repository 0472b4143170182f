"""A miniature Stable Diffusion with random weights whose pictures obey their context.

A random U-Net's output has nothing to do with its input, so sampling ends far from unit
variance. Here the U-Net copies its input to its output (at high noise the input *is*
the noise) and adds a random function of input and context, so that sampled latents stay
near unit variance and depend clearly on every word.
"""

from __future__ import annotations

from os import PathLike

import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import pytest
import safetensors.torch
import torch
from comfy.model_base import ModelType

from ..mini_sd import architecture
from ..mini_sd.architecture import (
    HEADS,
    SDXL_SIZES,
    Encoder,
    Family,
    NoInpainting,
    picked,
    text_options,
)

# Factors on PyTorch's own initialisation, tried out for contrast without saturation.
CONTEXT_GAIN = 4.0
OUTPUT_GAIN = 0.2
ENCODER_GAIN = 2.1
DECODER_GAIN = 1.5

SD2_ENCODERS = {"h": Encoder(96, 4, padding=0, layer=-2, projected=True)}
SD2_UNET_CONFIG = {
    **architecture.SD1_UNET_CONFIG,
    "context_dim": SD2_ENCODERS["h"].width,
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 16,
}


class RandomSD2ClipModel(comfy.text_encoders.sd2_clip.SD2ClipModel):
    """ComfyUI's SD2 text encoder at a small width and depth."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options=text_options(SD2_ENCODERS, model_options))


class RandomSD2(NoInpainting, comfy.supported_models.SD20):
    """Stable Diffusion 2.1 with fewer channels and a narrower text encoder."""

    unet_config = {
        **comfy.supported_models.SD20.unet_config,
        **picked(SD2_UNET_CONFIG, "context_dim", "model_channels"),
    }
    unet_extra_config = picked(SD2_UNET_CONFIG, *HEADS)
    latent_format = architecture.MiniLatent

    def model_type(self, state_dict, prefix=""):
        return ModelType.V_PREDICTION

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.sd2_clip.SD2Tokenizer, RandomSD2ClipModel
        )


REFINER_ENCODERS = {"g": architecture.SDXL_ENCODERS["g"]}
REFINER_UNET_CONFIG = {
    **architecture.SDXL_UNET_CONFIG,
    "context_dim": REFINER_ENCODERS["g"].width,
    "adm_in_channels": REFINER_ENCODERS["g"].width + 5 * architecture.SIZE_FEATURES,
}


class RandomRefinerClipModel(comfy.sdxl_clip.SDXLRefinerClipModel):
    """The refiner's text encoder, SDXL's ``g`` alone."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options=text_options(REFINER_ENCODERS, model_options))


class RandomRefiner(NoInpainting, comfy.supported_models.SDXLRefiner):
    """SDXL's refiner with fewer channels and a narrower text encoder."""

    unet_config = {
        **comfy.supported_models.SDXLRefiner.unet_config,
        **picked(REFINER_UNET_CONFIG, *SDXL_SIZES),
    }
    unet_extra_config = picked(REFINER_UNET_CONFIG, *HEADS)
    latent_format = architecture.MiniSDXLLatent

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            comfy.sdxl_clip.SDXLTokenizer, RandomRefinerClipModel
        )


REFINER = Family(
    "refiner", RandomRefiner, RandomRefinerClipModel, REFINER_ENCODERS, REFINER_UNET_CONFIG
)
SD2 = Family("sd2", RandomSD2, RandomSD2ClipModel, SD2_ENCODERS, SD2_UNET_CONFIG)
FAMILIES = {**architecture.FAMILIES, "sd2": SD2}


def of_families(*names: str) -> pytest.MarkDecorator:
    """For a test, or a module, whose miniature is of each of these families in turn.

    Through the fixture ``family``: a parameter in its place would leave the checkpoint of the last
    family to the tests behind it.
    """
    return pytest.mark.parametrize("family", names, indirect=True)


of_all_families = of_families(*FAMILIES)


def register() -> None:
    """Append all of them to ComfyUI's supported models, once per process."""
    architecture.register()
    models = comfy.supported_models.models
    models += [model for model in (RandomSD2, RandomRefiner) if model not in models]


def widths(family: str) -> dict[str, int]:
    """Text encoder -> width of its token embeddings."""
    return {name: encoder.width for name, encoder in FAMILIES[family].encoders.items()}


def build_modules(family: Family, seed: int = 0) -> dict[str, torch.nn.Module]:
    """The modules of ``Family.build_modules`` with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = family.build_modules()
    unet = modules["unet"]
    with torch.no_grad():
        for name, layer in unet.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                layer.weight *= CONTEXT_GAIN
        unet.out[-1].weight *= OUTPUT_GAIN
        _copy_input_to_output(unet)
        _scale_convolutions(modules["vae"].taesd_encoder, ENCODER_GAIN)
        _scale_convolutions(modules["vae"].taesd_decoder, DECODER_GAIN)
        modules["vae"].taesd_decoder[-1].bias += 0.5  # mid grey
    return modules


def _scale_convolutions(network: torch.nn.Module, gain: float) -> None:
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight *= gain


def _copy_input_to_output(unet: torch.nn.Module) -> None:
    """Route each latent channel y through the outermost skip connection to the output.

    The group norm before the output has groups of two channels; a group that holds
    (y, -y) keeps mean zero, and silu(y) - silu(-y) = y.
    """
    stem, last, head = unet.input_blocks[0][0], unet.output_blocks[-1][0], unet.out[-1]
    skipped = last.skip_connection.weight.shape[1] - unet.model_channels
    for channel in range(unet.in_channels):
        stem.weight[channel] = 0
        stem.weight[channel, channel, 1, 1] = 1
        for sign, pair in ((1.0, 2 * channel), (-1.0, 2 * channel + 1)):
            last.out_layers[-1].weight[pair] = 0
            last.skip_connection.weight[pair] = 0
            last.skip_connection.weight[pair, skipped + channel] = sign
            head.weight[:, pair] = 0
            head.weight[channel, pair, 1, 1] = sign


def save(
    path: str | PathLike[str],
    dtype: torch.dtype,
    seed: int = 0,
    family: Family = architecture.SD1,
) -> None:
    """Write the random miniature of a family as its checkpoint and register its model."""
    register()
    state_dict = family.checkpoint(build_modules(family, seed), dtype)
    safetensors.torch.save_file(state_dict, str(path))
