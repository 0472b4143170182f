"""What other nodes do beside mixed attention: ``CASES`` by name."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras import nodes_custom_sampler, nodes_hooks, nodes_perpneg
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    SIDE,
    STEPS,
    TEXT,
    random_controlnet,
    random_latents,
    random_lora,
    text_case,
)
from sefi_ide.tests.comfy.mixing import WIDE

import nodes

# In everything that other nodes do: case(world, noise), of whose world the model may be patched.

CASES = {}


def case_of(function):
    CASES[function.__name__.replace("_", "-")] = function
    return function


def patched(world, node, *settings):
    return replace(world, model=node.execute(world.model, *settings).result[0])


@case_of
def plain(world, noise):
    return text_case()(world, noise)


@case_of
def batch(world, noise):
    return text_case()(world, random_latents(3, seed=7))


@case_of
def cfg_1(world, noise):
    return world.sample(world.encode(TEXT), world.encode(NEGATIVE), noise, scale=1.0)


@case_of
def hypertile(world, noise):
    wide = random_latents(4, seed=5).view(WIDE)
    model = HyperTile.execute(world.model, 32, 2, 2, False)[0]
    return text_case()(replace(world, model=model), wide)


@case_of
def freeu(world, noise):
    return text_case()(patched(world, FreeU_V2, 1.3, 1.4, 0.9, 0.2), noise)


@case_of
def pag(world, noise):
    return text_case()(patched(world, PerturbedAttentionGuidance, 2.0), noise)


@case_of
def sag(world, noise):
    return text_case()(patched(world, SelfAttentionGuidance, 0.5, 2.0), random_latents(2, seed=7))


@case_of
def tome(world, noise):
    wide = random_latents(4, seed=5).view(WIDE)
    return text_case()(patched(world, TomePatchModel, 0.0), wide)


@case_of
def noise_mask(world, noise):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., :5] = 1
    return comfy.sample.sample(
        world.model, noise, STEPS, SCALE, "euler_ancestral", "normal", world.encode(TEXT),
        world.encode(NEGATIVE), random_latents(1, seed=9), denoise=0.8, disable_pbar=True,
        noise_mask=mask, seed=0,
    )  # fmt: skip


@case_of
def areas(world, noise):
    def area(text, x, width):
        return nodes.ConditioningSetArea().append(world.encode(text), width, 8 * SIDE, x, 0, 0.9)[0]

    positive = area(TEXT, 0, 40) + area("a tree in fog", 24, 40) + world.encode("a wall")
    return world.sample(positive, world.encode(NEGATIVE), noise)


@case_of
def cond_masks(world, noise):
    mask = torch.zeros(SIDE, SIDE)
    mask[:, :5] = 1.0

    def masked(text, mask):
        return nodes.ConditioningSetMask().append(world.encode(text), mask, "default", 0.9)[0]

    positive = masked(TEXT, mask) + masked("a tree in fog", 1 - mask)
    return world.sample(positive, world.encode(NEGATIVE), noise)


@case_of
def dual_cfg(world, noise):
    guider = nodes_custom_sampler.DualCFGGuider.execute(
        world.model, world.encode(TEXT), world.encode("a street at night"),
        world.encode(NEGATIVE), 2.0, 3.0, "nested",
    ).result[0]  # fmt: skip
    return world.guide(guider, noise)


@case_of
def perp_neg(world, noise):
    guider = nodes_perpneg.PerpNegGuider.execute(
        world.model, world.encode(TEXT), world.encode(NEGATIVE), world.encode(""), SCALE, 0.8
    ).result[0]
    return world.guide(guider, noise)


@case_of
def longer_negative(world, noise):
    return text_case(TEXT, "dark and " * 60)(world, noise)


@case_of
def the_person_in_the_negative(world, noise):
    return text_case("a street at night", TEXT)(world, noise)


@case_of
def the_person_in_both(world, noise):
    return text_case(TEXT, "bad photo of <anna>")(world, noise)


@case_of
def hooks(world, noise):
    lora = comfy.hooks.create_hook_lora(random_lora(world), 0.6, 0.5)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.4))
    lora = nodes_hooks.SetHookKeyframes().set_hook_keyframes(lora, keyframes)[0]
    clip = nodes_hooks.SetClipHooks().apply_hooks(world.clip, True, True, lora)[0]
    positive = replace(world, clip=clip).encode(TEXT)
    return world.sample(positive, world.encode(NEGATIVE), noise)


@case_of
def context_windows(world, noise):
    model = ContextWindowsManualNode.execute(
        world.model, 4, 1, "standard_static", 1, False, "flat", 0, False
    ).result[0]
    return text_case()(replace(world, model=model), random_latents(10, seed=31))


@case_of
def stacked_tiles(world, noise):
    """Rows are no longer where ``uuids`` and ``cond_or_uncond`` say."""

    def wrapper(apply_model, arguments):
        tiles = torch.cat(arguments["input"].chunk(2, dim=3))
        places = list(range(len(tiles)))[::-1]
        given = dict(arguments["c"])
        for name in ("c_crossattn", "y"):
            if name in given:
                one = given[name]
                given[name] = torch.cat([one, one])[places]
        output = apply_model(tiles[places], arguments["timestep"].repeat(2), **given)[places]
        return torch.cat(output.chunk(2), dim=3)

    model = world.model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return text_case()(replace(world, model=model), random_latents(4, seed=5).view(WIDE))


@case_of
def one_tile_after_the_other(world, noise):
    def wrapper(apply_model, arguments):
        tiles = arguments["input"].chunk(2, dim=3)
        outputs = [apply_model(one, arguments["timestep"], **arguments["c"]) for one in tiles]
        return torch.cat(outputs, dim=3)

    model = world.model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return text_case()(replace(world, model=model), random_latents(4, seed=5).view(WIDE))


@case_of
def chunks_of_one(world, noise):
    """As where memory is short: every conditioning in a call of its own."""
    base = world.model.model
    required, base.memory_required = base.memory_required, lambda *_, **__: float("inf")
    try:
        return text_case()(world, noise)
    finally:
        base.memory_required = required


def controlled(world, text):
    """Positive of ``text`` and negative, both with a ControlNet."""
    control = random_controlnet(world.unet_config)
    picture = torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(13))
    return nodes.ControlNetApplyAdvanced().apply_controlnet(
        world.encode(text), world.encode(NEGATIVE), control, picture, 0.8, 0.0, 1.0
    )


@case_of
def controlnet(world, noise):
    return world.sample(*controlled(world, TEXT), noise)


@case_of
def attention_of_a_pack(world, noise):
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randn(1, 4, 192, generator=generator)

    def replacement(query, key, value, options):
        own = tokens[..., : key.shape[-1]].to(key).expand(len(query), -1, -1)
        heads = options["n_heads"]
        beside = optimized_attention(query, own, own, heads)
        return optimized_attention(query, key, value, heads) + 0.5 * beside

    model = world.model.clone()
    for block in (("input", 3), ("middle", 0), ("output", 3)):
        model.set_model_attn2_replace(replacement, *block)
    return text_case()(replace(world, model=model), noise)
