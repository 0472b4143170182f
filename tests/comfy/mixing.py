"""What the tests of mixed attention share."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
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


def adapted(world: World, weight: float) -> World:
    """As IP-Adapters do: an attention beside the text's, of the positive prompt alone."""
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randn(1, 4, 192, generator=generator)

    def replacement(query, key, value, options):
        own = tokens[..., : key.shape[-1]].to(key).expand(len(query), -1, -1)
        heads = options["n_heads"]
        positive = torch.tensor([one == 0 for one in options["cond_or_uncond"]])
        rows = positive.repeat_interleave(len(query) // len(positive)).view(-1, 1, 1)
        beside = optimized_attention(query, own, own, heads) * rows
        return optimized_attention(query, key, value, heads) + weight * beside

    model = world.model.clone()
    for block in (("input", 3), ("middle", 0), ("output", 3)):
        model.set_model_attn2_replace(replacement, *block)
    return replace(world, model=model)
