"""Mixed attention: against an oracle, in everything that other nodes do, and what it leaves."""

from __future__ import annotations

from dataclasses import replace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras import nodes_custom_sampler, nodes_hooks, nodes_perpneg
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from sefi_ide.nodes.mixed_attention import SeFiMixedAttention
from sefi_ide.sefi_core.comfyui.attention_maps import attention_maps
from sefi_ide.sefi_core.comfyui.unet.adapter import BESIDE_KEY
from sefi_ide.sefi_core.comfyui.unet.text_version import Texts
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    SIDE,
    STEPS,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
    apply,
    identity,
    random_latents,
    random_lora,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.mixing_oracle import MixedOracle, person_mask
from sefi_ide.tests.comfy.oracle import Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import FAMILIES, of_all_families

import nodes

pytestmark = [pytest.mark.usefixtures("inference_mode"), of_all_families]

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


@pytest.fixture(scope="module")
def nearly(setting) -> World:
    """Anna's vectors are those of the class word but for a millionth, so that she counts."""
    word = identity(setting.plain.clip, "anna", 2, seed=1, size=1e-6)
    return World(*apply(setting.plain.model, setting.plain.clip, word), setting.applied.people)


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


@case_of
def controlnet(world, noise):
    config = dict(world.unet_config)
    del config["out_channels"], config["transformer_depth_output"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        network = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    picture = torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(13))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        world.encode(TEXT), world.encode(NEGATIVE), control, picture, 0.8, 0.0, 1.0
    )
    return world.sample(positive, negative, noise)


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


@TRAJECTORIES
@pytest.mark.parametrize("name", CASES)
def test_the_class_word_changes_nothing(setting, nearly, family, trajectory, name):
    """And what an identity draws there is mixed."""
    case = CASES[name]
    for world in (nearly, setting.applied):
        vars(world)["unet_config"] = FAMILIES[family].unet_config
    settings = {"adain_mean": "keys and values", "face_hidden": "automatic"}

    def both(world):
        one = mixed(world, trajectory, **settings)
        vars(one)["unet_config"] = FAMILIES[family].unet_config
        return case(world, setting.noise), *batches(world, lambda: case(one, setting.noise))

    expected, drawn, calls = both(nearly)
    nothing = difference(drawn, expected)
    assert nothing < TOLERANCE and len(calls) >= 2 * STEPS
    expected, drawn, _ = both(setting.applied)
    assert difference(drawn, expected) > max(10 * nothing, 1e-5)


# Against the oracle.

MASK = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(41))
ADAIN = {"off": "", "keys": "k", "values": "v", "keys and values": "kv"}


def oracle(setting, trajectory="own", **settings) -> MixedOracle:
    return MixedOracle(setting.plain.model, own=trajectory == "own", place=PLACE, **settings)


@pytest.mark.parametrize(
    ("trajectory", "adain_mean", "hidden"),
    [
        ("own", "off", None),
        ("own", "keys", None),
        ("own", "values", MASK[0]),
        ("own", "keys and values", person_mask),
        ("same", "off", person_mask),
        ("same", "keys and values", MASK[0]),
    ],
)
def test_what_is_mixed_behind_the_projections(setting, trajectory, adain_mean, hidden):
    settings = {"adain_mean": adain_mean, "face_hidden": "off" if hidden is None else "automatic"}
    if hidden is MASK[0] or isinstance(hidden, torch.Tensor):
        settings["face_mask"] = MASK
    drawn = text_case()(mixed(setting.applied, trajectory, **settings), setting.noise)
    by_hand = oracle(setting, trajectory, adain=ADAIN[adain_mean], hidden=hidden)
    expected, _ = by_hand.sample_both(setting.noise, setting.plain.sigmas(), text_guidance(setting))
    assert difference(drawn, expected) < TOLERANCE
    # Where nearly all of the picture is hidden, little is mixed.
    without = text_case()(setting.applied, setting.noise)
    assert difference(drawn, without) > 5 * difference(drawn, expected)


def test_a_face_is_hidden(setting):
    """A mask of zeros hides nothing, one of ones everything: then nothing of the text's is left."""

    def drawn(**settings):
        return text_case()(mixed(setting.applied, **settings), setting.noise)

    nothing, everything = (drawn(face_mask=torch.full((1, 5, 7), share)) for share in (0.0, 1.0))
    assert difference(nothing, drawn(face_hidden="off")) < TOLERANCE
    assert difference(everything, text_case()(setting.applied, setting.noise)) < TOLERANCE
    found = drawn()
    assert difference(found, nothing) > TOLERANCE < difference(found, everything)


@TRAJECTORIES
def test_a_range(setting, trajectory):
    drawn = text_case()(
        mixed(setting.applied, trajectory, face_hidden="off", start_percent=0.3, end_percent=0.8),
        setting.noise,
    )
    expected, _ = oracle(setting, trajectory, start=0.3, end=0.8).sample_both(
        setting.noise, setting.plain.sigmas(), text_guidance(setting)
    )
    assert difference(drawn, expected) < TOLERANCE


@TRAJECTORIES
def test_of_two_areas_only_the_identitys_is_mixed(setting, trajectory):
    def case(world):
        def area(text, x):
            return nodes.ConditioningSetArea().append(world.encode(text), 32, 64, x, 0, 1.0)[0]

        positive = area(TEXT, 0) + area("a tree in fog", 32)
        return world.sample(positive, world.encode(NEGATIVE), setting.noise)

    settings = {"adain_mean": "keys", "face_mask": MASK}
    drawn = case(mixed(setting.applied, trajectory, **settings))
    left, right = (SIDE, 4, 0, 0), (SIDE, 4, 0, 4)
    positive = [Region(setting.prompt(TEXT), left), Region(setting.prompt("a tree in fog"), right)]
    negative = [Region(setting.prompt(NEGATIVE), cells) for cells in (None, left, right)]
    expected, _ = oracle(setting, trajectory, adain="k", hidden=MASK[0]).sample_both(
        setting.noise, setting.plain.sigmas(), cfg(positive, negative, SCALE)
    )
    assert difference(drawn, expected) < TOLERANCE


# The text's picture.

SAMPLERS = [
    "euler", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m_sde", "dpmpp_3m_sde_gpu", "lcm", "ddpm", "er_sde", "seeds_2", "sa_solver", "uni_pc",
]  # fmt: skip


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


@pytest.mark.parametrize("name", [*SAMPLERS, "churn"])
def test_the_texts_half_is_a_plain_run(setting, name):
    """With the class word's text, and the noise that the sampler draws on its way."""
    noise = random_latents(2, seed=8)
    options = {"s_churn": 0.5} if name == "churn" else {}
    name = "euler" if name == "churn" else name
    torch.manual_seed(3)
    _, expected = halves(setting.plain, WORD, noise, name, **options)
    torch.manual_seed(3)
    result, both = halves(mixed(setting.applied), TEXT, noise, name, **options)
    assert len(both) == 4 and result.shape == noise.shape
    assert difference(both[2:], expected) < TOLERANCE
    assert difference(both[:2], expected) > VISIBLE


@pytest.mark.parametrize("name", ["controlnet", "hooks", "sag", "areas", "context-windows"])
def test_the_texts_half_is_a_plain_run_with_other_nodes(setting, family, name, monkeypatch):
    """What they see of the prompt is the class word's as well."""
    kept = []
    euler = comfy.k_diffusion.sampling.sample_euler

    def sample_euler(*arguments, **settings):
        kept.append(euler(*arguments, **settings))
        return kept[-1]

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", sample_euler)
    for world in (setting.plain, one := mixed(setting.applied)):
        vars(world)["unet_config"] = FAMILIES[family].unet_config
        CASES[name](world, setting.noise)
    expected, both = kept
    assert len(both) == 2 * len(expected) and one.people
    assert difference(both[len(expected) :], expected) < TOLERANCE


def test_previews_and_results_have_the_pictures_that_were_asked_for(setting):
    noise = random_latents(2, seed=8)
    world = mixed(setting.applied)
    guider = comfy.samplers.CFGGuider(world.model)
    guider.set_conds(world.encode(TEXT), world.encode(NEGATIVE))
    guider.set_cfg(SCALE)
    seen = []
    result = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), world.sigmas(),
        callback=lambda step, x0, x, steps: seen.append((step, x0, x.shape, steps)),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    assert [(one[0], one[2], one[3]) for one in seen] == [(n, noise.shape, 3) for n in range(STEPS)]
    assert all(one[1].shape == noise.shape for one in seen) and result.shape == noise.shape
    latent_format = world.model.get_model_object("latent_format")
    assert difference(latent_format.process_out(seen[-1][1].float()), result) < TOLERANCE


# Where there is nothing to mix.


@TRAJECTORIES
@pytest.mark.parametrize(
    "why", ["no-identity", "out-of-range", "identity-over", "no-patched-model"]
)
def test_nothing_to_mix(setting, trajectory, why):
    """The same bits, and no call of the U-Net more."""
    text, settings, world = TEXT, {}, setting.applied
    if why == "no-identity":
        text = WORD
    elif why == "no-patched-model":
        world, text = setting.plain, WORD
    elif why == "out-of-range":  # none of three steps is in it
        settings = {"start_percent": 0.05, "end_percent": 0.06}
    else:
        anna = setting.anna
        applied = apply(setting.plain.model, setting.plain.clip, anna, start=0.05, end=0.06)
        world = World(*applied, setting.applied.people)
    expected, before = batches(world, lambda: text_case(text)(world, setting.noise))
    other = mixed(world, trajectory, **settings)
    drawn, calls = batches(world, lambda: text_case(text)(other, setting.noise))
    assert torch.equal(drawn, expected)
    assert calls == before


def test_steps_after_the_range_cost_nothing(setting):
    early = mixed(setting.applied, end_percent=0.3)
    _, calls = batches(early, lambda: text_case()(early, setting.noise))
    assert calls == [2, 1, 1] + [2] * (STEPS - 1)


@TRAJECTORIES
def test_what_came_before_is_untouched(setting, trajectory):
    """Pictures are the same each time, and so are those of the MODEL before the node."""
    before = text_case()(setting.applied, setting.noise)
    options = setting.applied.model.model_options
    wrappers = {kind: dict(by_key) for kind, by_key in setting.applied.model.wrappers.items()}
    world = mixed(mixed(setting.applied, "same"), trajectory)
    drawn = [text_case()(world, setting.noise) for _ in range(3)]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    once = text_case()(mixed(setting.applied, trajectory), setting.noise)
    assert torch.equal(once, drawn[0])  # a second node replaces the first
    assert torch.equal(text_case()(setting.applied, setting.noise), before)
    assert setting.applied.model.model_options == options
    assert setting.applied.model.wrappers == wrappers
    assert difference(drawn[0], before) > TOLERANCE


def test_the_node_before_apply(setting):
    """The order of the two nodes does not matter."""
    model = mixed(setting.plain).model
    world = World(*apply(model, setting.plain.clip, setting.anna), setting.applied.people)
    drawn = text_case()(world, setting.noise)
    expected = text_case()(mixed(setting.applied), setting.noise)
    assert difference(drawn, expected) < TOLERANCE


@TRAJECTORIES
def test_attention_maps_are_those_of_the_identity(setting, trajectory):
    arguments = {"samples": setting.noise}, "a photo of <anna>", ["<anna>"], 400, 0
    world = mixed(setting.applied, trajectory)
    one, other = (attention_maps(w.model, w.clip, *arguments) for w in (world, setting.applied))
    assert all(map(torch.equal, one.layers, other.layers))


# Identities of other nodes.


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


@TRAJECTORIES
def test_the_identity_of_another_node(setting, trajectory):
    settings = {"identity": "other nodes", "face_mask": MASK}
    nothing = adapted(setting.plain, 0.0)
    drawn, calls = batches(
        nothing, lambda: text_case(WORD)(mixed(nothing, trajectory, **settings), setting.noise)
    )
    assert difference(drawn, text_case(WORD)(nothing, setting.noise)) < TOLERANCE
    assert calls == STEPS * {"own": [2, 1, 1], "same": [1, 1, 1]}[trajectory]
    world = adapted(setting.plain, 1.0)
    expected = text_case(WORD)(world, setting.noise)
    assert (
        difference(text_case(WORD)(mixed(world, trajectory, **settings), setting.noise), expected)
        > VISIBLE
    )
    assert difference(text_case(WORD)(mixed(world, trajectory), setting.noise), expected) == 0


def test_the_text_is_without_another_nodes_identity(setting):
    world = mixed(adapted(setting.plain, 1.0), identity="other nodes", face_hidden="off")
    _, both = halves(world, WORD, setting.noise, "euler")
    _, expected = halves(setting.plain, WORD, setting.noise, "euler")
    assert difference(both[1:], expected) < TOLERANCE


def test_what_is_taken_away_from_the_text(setting):
    """Attention beside the text's and to other contexts, of packs and of SeFi's face adapters."""
    guider = comfy.samplers.CFGGuider(setting.plain.model)
    guider.conds = {"positive": [], "negative": []}
    given = {
        BESIDE_KEY: ("an adapter",),
        "patches": {"attn1_patch": [1], "attn2_patch": [2], "attn2_output_patch": [3]},
        "patches_replace": {"attn1": {("middle", 0): 4}, "attn2": {("middle", 0): 5}},
        "sigmas": 6,
    }
    kept = {
        "patches": {"attn1_patch": [1]},
        "patches_replace": {"attn1": {("middle", 0): 4}},
        "sigmas": 6,
    }
    before = {name: dict(one) if isinstance(one, dict) else one for name, one in given.items()}
    assert Texts(guider, of_others=True).options(given) == kept
    assert Texts(guider, of_others=False).options(given) == given == before


# A model for inpainting.


@pytest.fixture
def inpainting(setting, mini_sd, monkeypatch):
    """Worlds of a model that also sees a picture and a mask, whose latents are 4 in a row."""
    model, clip, _ = mini_sd
    unet = model.model.diffusion_model
    old = unet.input_blocks[0][0]
    extra = old.in_channels + 1
    new = comfy.ops.disable_weight_init.Conv2d(
        old.in_channels + extra, old.out_channels, 3, padding=1
    )
    generator = torch.Generator().manual_seed(43)
    more = torch.randn(old.out_channels, extra, 3, 3, generator=generator)
    new.weight = torch.nn.Parameter(torch.cat([old.weight, 0.02 * more], 1), requires_grad=False)
    new.bias = old.bias
    unet.input_blocks[0][0] = new
    unet.to(torch.float64).dtype = torch.float64
    model.model.concat_keys = ("mask", "masked_image")
    monkeypatch.setattr(
        model.model,
        "blank_inpaint_image_like",
        lambda noise: torch.zeros_like(noise),
        raising=False,
    )
    word = identity(clip, "anna", 2, seed=1, size=1e-6)
    return World(*apply(model, clip, word), setting.applied.people)


@TRAJECTORIES
def test_a_model_for_inpainting(inpainting, trajectory):
    """Each picture of the batch goes on with its own."""
    noise, pictures = random_latents(2, seed=8), random_latents(2, seed=45)
    mask = torch.ones(2, 1, SIDE, SIDE)
    mask[0, ..., :3] = 0

    def case(world):
        def encode(text):
            ((context, extra),) = world.encode(text)
            return [[context, {**extra, "concat_latent_image": pictures, "concat_mask": mask}]]

        return world.sample(encode(TEXT), encode(NEGATIVE), noise)

    expected = case(inpainting)
    assert difference(case(mixed(inpainting, trajectory)), expected) < TOLERANCE
    mask[:] = 1
    assert difference(case(inpainting), expected) > VISIBLE
