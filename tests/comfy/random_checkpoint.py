"""A miniature Stable Diffusion with random weights whose pictures obey their context.

A random U-Net's output has nothing to do with its input, so sampling ends far from unit
variance. Here the U-Net copies its input to its output (at high noise the input *is*
the noise) and adds a random function of input and context, so that sampled latents stay
near unit variance and depend clearly on every word.
"""

from __future__ import annotations

from os import PathLike

import safetensors.torch
import torch

from ..mini_sd import architecture

# Factors on PyTorch's own initialisation, tried out for contrast without saturation.
CONTEXT_GAIN = 4.0
OUTPUT_GAIN = 0.2
ENCODER_GAIN = 2.1
DECODER_GAIN = 1.5


def build_modules(seed: int = 0) -> dict[str, torch.nn.Module]:
    """The modules of ``architecture.build_modules`` with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = architecture.build_modules()
    unet = modules["model.diffusion_model."]
    with torch.no_grad():
        for name, layer in unet.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                layer.weight *= CONTEXT_GAIN
        unet.out[-1].weight *= OUTPUT_GAIN
        _copy_input_to_output(unet)
        autoencoder = modules["first_stage_model."]
        _scale_convolutions(autoencoder.taesd_encoder, ENCODER_GAIN)
        _scale_convolutions(autoencoder.taesd_decoder, DECODER_GAIN)
        autoencoder.taesd_decoder[-1].bias += 0.5  # mid grey
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


def save(path: str | PathLike[str], dtype: torch.dtype, seed: int = 0) -> None:
    """Write the random miniature as a Stable Diffusion checkpoint and register its model."""
    architecture.register()
    state_dict = architecture.checkpoint_state_dict(build_modules(seed), dtype)
    safetensors.torch.save_file(state_dict, str(path))
