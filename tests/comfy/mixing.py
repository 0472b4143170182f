"""What the tests of mixed attention share."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from sefi_ide.nodes.mixed_attention import SeFiMixedAttention
from sefi_ide.tests.comfy.composition import NEGATIVE, SCALE, SIDE, TEXT, World

TRAJECTORIES = pytest.mark.parametrize("trajectory", ["own", "same"])
PLACE = 4  # of <anna> in TEXT, behind the start token and "a photo of"
WIDE = 1, -1, 2 * SIDE, 2 * SIDE
WORD = TEXT.replace("<anna>", "person")


def mixed(world: World, trajectory="own", **settings) -> World:
    return replace(
        world,
        model=SeFiMixedAttention.execute(world.model, trajectory, **settings).result[0],
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.std())


def batches(world: World, run) -> tuple[torch.Tensor, list[int]]:
    """What ``run`` returns, and the rows of each call of the U-Net meanwhile."""
    calls: list[int] = []
    unet = world.model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    try:
        return run(), calls
    finally:
        handle.remove()


def halves(world, text, noise, name, **options):
    """What the sampler ends with, all its latents, before anything is taken away."""
    function = comfy.samplers.sampler_object(name).sampler_function
    kept = []

    def sampler_function(*arguments, **settings):
        kept.append(function(*arguments, **settings))
        return kept[-1]

    guider = comfy.samplers.CFGGuider(world.model)
    guider.set_conds(world.encode(text), world.encode(NEGATIVE))
    guider.set_cfg(SCALE)
    sampler = comfy.samplers.KSAMPLER(sampler_function, options)
    result = guider.sample(
        noise, torch.zeros_like(noise), sampler, world.sigmas(), disable_pbar=True, seed=6
    )
    return result, kept[0]
