"""Identities together with everything else that patches or drives a MODEL or a CLIP."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras import nodes_custom_sampler, nodes_hooks, nodes_perpneg
from comfy_extras.nodes_train import TrainLoraNode
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    SIDE,
    TEXT,
    VISIBLE,
    World,
    apply,
    check,
    identity,
    person,
    random_controlnet,
    random_latents,
    random_lora,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.oracle import Concatenated, Oracle, Prompt, Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import FAMILIES, of_all_families

import nodes

pytestmark = [
    pytest.mark.usefixtures("inference_mode"),
    of_all_families,
]


@pytest.mark.parametrize("orders", [[1], [-1], [1, -1]], ids=["tiles-first", "reversed", "both"])
def test_model_function_wrapper_that_stacks_tiles(setting, orders):
    """The rows of the batch are no longer where ``uuids`` and ``cond_or_uncond`` say."""

    def wrapper(apply_model, arguments):
        tiles = torch.cat(arguments["input"].chunk(2, dim=3))
        context = arguments["c"]["c_crossattn"].repeat(2, 1, 1)
        timestep = arguments["timestep"].repeat(2)
        outputs = []
        for order in orders:
            places = list(range(len(tiles)))[::order]
            conditioning = {**arguments["c"], "c_crossattn": context[places]}
            if "y" in conditioning:
                conditioning["y"] = conditioning["y"].repeat(2, 1)[places]
            outputs.append(apply_model(tiles[places], timestep, **conditioning)[places])
        assert all(torch.allclose(output, outputs[0], atol=1e-3) for output in outputs)
        return torch.cat(outputs[-1].chunk(2), dim=3)

    def case(world, noise):
        model = world.model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return text_case()(replace(world, model=model), noise)

    oracle = Oracle(setting.plain.model, tiles=2)
    check(setting, case, text_guidance(setting), oracle=oracle)


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_guider(setting, style):
    def case(world, noise):
        guider = nodes_custom_sampler.DualCFGGuider.execute(
            world.model,
            world.encode(TEXT),
            world.encode("portrait of <bob> at night"),
            world.encode(NEGATIVE),
            2.0,
            3.0,
            style,
        ).result[0]
        return world.guide(guider, noise)

    regions = [
        [Region(setting.prompt(text))] for text in (TEXT, "portrait of <bob> at night", NEGATIVE)
    ]

    def guidance(predict):
        first, second, negative = map(predict, regions)
        if style == "nested":
            return negative + 3.0 * (second + 2.0 * (first - second) - negative)
        return negative + 3.0 * (second - negative) + 2.0 * (first - second)

    check(setting, case, guidance)


def test_perp_neg_guider(setting):
    def case(world, noise):
        guider = nodes_perpneg.PerpNegGuider.execute(
            world.model, world.encode(TEXT), world.encode(NEGATIVE), world.encode(""), SCALE, 0.8
        ).result[0]
        return world.guide(guider, noise)

    regions = [[Region(setting.prompt(text))] for text in (TEXT, NEGATIVE, "")]

    def guidance(predict):
        positive, negative, empty = map(predict, regions)
        towards, away = positive - empty, negative - empty
        away = away - (away * towards).sum() / (towards**2).sum() * towards
        return empty + SCALE * (towards - 0.8 * away)

    check(setting, case, guidance)


@pytest.fixture(scope="module")
def controlnet(family):
    """A small random ControlNet of ComfyUI's own class."""
    return random_controlnet(FAMILIES[family].unet_config)


def test_controlnet(setting, controlnet):
    """It sees the context of the class word."""
    picture = torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(13))

    def case(world, noise):
        positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
            world.encode(TEXT), world.encode(NEGATIVE), controlnet, picture, 0.8, 0.0, 1.0
        )
        return world.sample(positive, negative, noise)

    control = controlnet.copy().set_cond_hint(picture.movedim(-1, 1), 0.8)
    model = setting.plain.model.model
    control.pre_run(model, model.model_sampling.percent_to_sigma)
    without = text_case()(setting.applied, setting.noise)
    guidance = cfg(
        [Region(setting.prompt(TEXT), control=control)],
        [Region(setting.prompt(NEGATIVE), control=control)],
        SCALE,
    )
    assert (check(setting, case, guidance) - without).abs().mean() > VISIBLE


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(setting, order):
    def lora(model, clip):
        return comfy.sd.load_lora_for_models(model, clip, random_lora(setting.plain), 0.7, 0.7)

    plain = World(*lora(setting.plain.model, setting.plain.clip))
    if order == "before":
        applied = World(*apply(plain.model, plain.clip, setting.anna), setting.applied.people)
    else:
        applied = World(*lora(setting.applied.model, setting.applied.clip), setting.applied.people)
    people = {"anna": setting.applied.people["anna"]}
    regions = [
        Prompt(plain.clip, text, people if "<" in text else None) for text in (TEXT, NEGATIVE)
    ]
    guidance = cfg([Region(regions[0])], [Region(regions[1])], SCALE)
    result = check(
        setting, text_case(), guidance, applied=applied, plain=plain, oracle=Oracle(plain.model)
    )
    without = text_case()(setting.applied, setting.noise)
    assert (result - without).abs().mean() > VISIBLE


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_replacement(setting, order):
    """As IP-Adapters do: attention over the text plus attention over tokens of their own."""
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randn(1, 4, 192, generator=generator)

    def replacement(query, key, value, options):
        own = tokens[..., : key.shape[-1]].to(key).expand(len(query), -1, -1)
        heads = options["n_heads"]
        return optimized_attention(query, key, value, heads) + 0.5 * optimized_attention(
            query, own, own, heads
        )

    def patched(model):
        model = model.clone()
        for block in (("input", 3), ("input", 5), ("middle", 0), ("output", 0), ("output", 3)):
            model.set_model_attn2_replace(replacement, *block)
        return model

    plain = replace(setting.plain, model=patched(setting.plain.model))
    if order == "before":
        applied = World(*apply(plain.model, plain.clip, setting.anna), setting.applied.people)
    else:
        applied = replace(setting.applied, model=patched(setting.applied.model))
    result = check(
        setting,
        text_case(),
        text_guidance(setting),
        applied=applied,
        plain=plain,
        oracle=Oracle(plain.model),
    )
    assert (result - text_case()(setting.applied, setting.noise)).abs().mean() > VISIBLE


@pytest.mark.parametrize("order", ["before", "after"])
def test_clip_skip(setting, order):
    def skip(clip):
        return nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]

    plain = replace(setting.plain, clip=skip(setting.plain.clip))
    if order == "before":
        applied = World(*apply(plain.model, plain.clip, setting.anna), setting.applied.people)
    else:
        applied = replace(setting.applied, clip=skip(setting.applied.clip))
    people = {"anna": setting.applied.people["anna"]}
    guidance = cfg(
        [Region(Prompt(plain.clip, TEXT, people))], [Region(Prompt(plain.clip, NEGATIVE))], SCALE
    )
    check(setting, text_case(), guidance, applied=applied, plain=plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"strength_k": 0.5, "strength_v": 1.0},
        {"strength_k": 1.0, "strength_v": 0.0},
        {"strength_k": 1.5, "strength_v": -0.5},
        {"start": 0.3, "end": 0.8},
    ],
    ids=["half-key", "no-value", "outside", "range"],
)
def test_strengths_and_range(setting, settings):
    world = World(
        *apply(setting.plain.model, setting.plain.clip, setting.anna, **settings),
        setting.applied.people,
    )
    prompt = Prompt(setting.plain.clip, TEXT, {"anna": person(setting.anna, **settings)})
    guidance = cfg([Region(prompt)], [Region(setting.prompt(NEGATIVE))], SCALE)
    check(setting, text_case(), guidance, applied=world)


def test_two_people_with_ranges_and_strengths_of_their_own(setting):
    text = "a photo of <anna> and <bob> at the sea"
    first, second = {"end": 0.6, "strength_v": 0.7}, {"start": 0.2}
    model, clip = apply(setting.plain.model, setting.plain.clip, setting.anna, **first)
    world = World(*apply(model, clip, setting.bob, **second), setting.applied.people)
    people = {"anna": person(setting.anna, **first), "bob": person(setting.bob, **second)}
    guidance = cfg(
        [Region(Prompt(setting.plain.clip, text, people))],
        [Region(setting.prompt(NEGATIVE))],
        SCALE,
    )
    check(setting, text_case(text), guidance, applied=world)


def test_same_name_again_replaces(setting):
    """As in a prompt: the name can only mean one person, and the last word counts."""
    other = setting.bob.renamed("anna")
    world = World(
        *apply(setting.applied.model, setting.applied.clip, other), setting.applied.people
    )
    prompt = Prompt(setting.plain.clip, TEXT, {"anna": setting.applied.people["bob"]})
    guidance = cfg([Region(prompt)], [Region(setting.prompt(NEGATIVE))], SCALE)
    check(setting, text_case(), guidance, applied=world)


def test_conditioning_of_another_apply_node(setting):
    """The payload travels with the conditioning, so any patched MODEL of the kind can use it."""
    model, _ = apply(setting.plain.model, setting.plain.clip, setting.bob)
    world = replace(setting.applied, model=model)
    check(setting, text_case(), text_guidance(setting), applied=world)


@pytest.mark.parametrize("way", ["concat", "hooks", "pooled-only"])
def test_conditioning_without_its_dict_of_another_apply_node(setting, way):
    """As of a first pass; or ComfyUI has run the Apply node again and kept the conditioning."""

    def encode(world):
        if way == "concat":
            style, text = world.encode("in a garden"), world.encode(TEXT)
            return nodes.ConditioningConcat().concat(style, text)[0]
        clip = world.clip
        if way == "hooks":
            hooks = comfy.hooks.create_hook_lora(random_lora(setting.plain), 0.0, 0.0)
            clip = nodes_hooks.SetClipHooks().apply_hooks(clip, True, True, hooks)[0]
            return replace(world, clip=clip).encode(TEXT)
        text = TEXT if world.people else TEXT.replace("<anna>", "person")
        context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        return [[context, {"pooled_output": pooled}]]

    model, _ = apply(setting.plain.model, setting.plain.clip, setting.anna)
    kept = encode(setting.applied)

    def case(world, noise):
        positive = kept if world.people else encode(world)
        return world.sample(positive, world.encode(NEGATIVE), noise)

    prompt = setting.prompt(TEXT)
    if way == "concat":
        prompt = Concatenated(setting.prompt("in a garden"), prompt)
    guidance = cfg([Region(prompt)], [Region(setting.prompt(NEGATIVE))], SCALE)
    check(setting, case, guidance, applied=replace(setting.applied, model=model))


def train_lora(model, positive, checkpointing):
    """The half of core's LoRA that begins at zero, after one step."""
    arguments = {
        "model": model,
        "latents": {"samples": random_latents(1, seed=19)},
        "positive": positive,
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": 1,
        "learning_rate": 1e-3,
        "rank": 4,
        "optimizer": "SGD",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": checkpointing,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the other half
        result = TrainLoraNode.execute(**{key: [value] for key, value in arguments.items()}).result
    learned = [rows for key, rows in result[0].items() if key.endswith("lora_down.weight")]
    return torch.cat([rows.float().flatten() for rows in learned])


def test_core_trains_a_lora_with_the_identity(mini_sd):
    """With checkpointing the U-Net is called again in the backward pass, after the step."""
    model, clip, _ = mini_sd
    anna = identity(clip, "anna", 5, seed=1)
    applied, applied_clip = apply(model, clip, anna)
    positive = nodes.CLIPTextEncode().encode(applied_clip, TEXT)[0]
    plain, checkpointed, class_word = (
        train_lora(trained, positive, checkpointing)
        for trained, checkpointing in ((applied, False), (applied, True), (model, False))
    )
    assert (plain - class_word).norm() > 0.05 * plain.norm()
    assert (plain - checkpointed).norm() < 1e-3 * plain.norm()


def test_runs_are_identical_and_leave_nothing_behind(setting):
    """Ten queues: equal pictures, upstream MODEL and CLIP as they were, no patch piles up."""

    def patches(world):
        patcher, clip = world.model, world.clip.patcher
        return (
            {kind: list(wrappers) for kind, wrappers in patcher.wrappers.items()},
            patcher.model_options,
            len(patcher.patches),
            len(patcher.attachments),
            {name: id(patch) for name, patch in clip.object_patches.items()},
            len(clip.attachments),
            id(world.clip.tokenizer),
        )

    def weights(world):
        comfy.model_management.unload_all_models()  # and with them LoRAs of other tests
        return {
            **{f"model.{k}": v.clone() for k, v in world.model.model.state_dict().items()},
            **{f"clip.{k}": v.clone() for k, v in world.clip.cond_stage_model.state_dict().items()},
        }

    upstream, before = patches(setting.plain), weights(setting.plain)
    upstream_picture = text_case()(setting.plain, setting.noise)
    worlds = []
    for _ in range(10):
        applied = apply(*apply(setting.plain.model, setting.plain.clip, setting.anna), setting.bob)
        worlds.append(World(*applied, setting.applied.people))
        worlds[-1].encode(TEXT)
    pictures = [text_case()(world, setting.noise) for world in (*worlds[::3], worlds[-1])]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert patches(setting.plain) == upstream
    assert torch.equal(text_case()(setting.plain, setting.noise), upstream_picture)
    after = weights(setting.plain)
    assert after.keys() == before.keys()
    # Rows that the checkpoint lacks are uninitialised and may be NaN.
    assert all(
        torch.allclose(after[key], before[key], rtol=0, atol=0, equal_nan=True) for key in before
    )

    def counts(world):
        wrappers = [
            wrapper
            for by_key in world.model.wrappers.values()
            for entries in by_key.values()
            for wrapper in entries
        ]
        transformer_options = world.model.model_options["transformer_options"]
        return len(wrappers), transformer_options, len(world.clip.patcher.object_patches)

    assert counts(worlds[0]) == counts(worlds[-1])
    once = World(*apply(setting.plain.model, setting.plain.clip, setting.anna))
    assert counts(once) == counts(worlds[-1])
