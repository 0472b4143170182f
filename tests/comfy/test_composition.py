"""Identities together with everything else that ComfyUI does to conditioning and models.

Every case is sampled three times: by ComfyUI with the identity, by ComfyUI with the class word and
neither patched MODEL nor CLIP, and by the oracle. The first must equal the last and be visibly
different from the second.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras import nodes_custom_sampler, nodes_hooks, nodes_perpneg
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.text import class_word_embedding
from sefi_ide.sefi_core.identity import Identity
from sefi_ide.tests.comfy.oracle import Concatenated, Fixed, Oracle, Person, Prompt, Region, cfg
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS, UNET_CONFIG

import nodes

STEPS = 3
SIDE = 8  # latent cells
SCALE = 3.0
TEXT = "a photo of <anna>, smiling"
CHUNKS = "many words " * 45 + "and then <anna> " + "and more words " * 20
"""Three chunks; ComfyUI's pooled output is of the first, which is without the placeholder."""
NEGATIVE = "blurry, dark"
TOLERANCE = 1e-4
VISIBLE = 0.01  # of the latents' standard deviation, in the mean


@dataclass
class World:
    """A MODEL and a CLIP. Without people the class word is written instead of a placeholder."""

    model: object
    clip: object
    people: dict[str, Person] | None = None

    def encode(self, text: str):
        if self.people is None:
            text = text.replace("<anna>", "person").replace("<bob>", "person")
        return nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def sample(self, positive, negative, noise, scale=SCALE):
        return comfy.sample.sample(
            self.model, noise, STEPS, scale, "euler", "normal", positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip

    def sigmas(self):
        sampling = self.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)

    def guide(self, guider, noise):
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            self.sigmas(),
            disable_pbar=True,
            seed=0,
        )


@pytest.fixture(scope="module", autouse=True)
def inference_mode():
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def identity(clip, name: str, stages: int, seed: int) -> Identity:
    """Random vectors about the class word's, another pair for each stage."""
    generator = torch.Generator().manual_seed(seed)
    word = class_word_embedding(clip, "person")["l"]
    keys, values = (word + 0.1 * torch.randn(stages, 1, 128, generator=generator) for _ in "kv")
    return Identity(name, "person", "sd1", {"l": keys}, {"l": values})


def random_latents(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, LATENT_CHANNELS, SIDE, SIDE, generator=generator)


def apply(model, clip, identity, strength_k=1.0, strength_v=1.0, start=0.0, end=1.0):
    return SeFiApplyIdentity.execute(
        model, clip, identity, strength_k, strength_v, start, end
    ).result


def person(identity: Identity, **settings) -> Person:
    return Person(identity.class_word, identity.keys["l"], identity.values["l"], **settings)


@pytest.fixture(scope="module")
def setting(mini_checkpoint):
    """The plain world, the world in which anna (5 stages) and bob (3) are applied, the oracle."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(
        mini_checkpoint, embedding_directory=None
    )
    # In double precision a batch of two gives the numbers of two batches of one.
    model.model.diffusion_model.to(torch.float64).dtype = torch.float64
    anna, bob = identity(clip, "anna", 5, seed=1), identity(clip, "bob", 3, seed=2)
    people = {"anna": person(anna), "bob": person(bob)}
    applied = World(*apply(*apply(model, clip, anna), bob), people)
    cache: dict[str, Prompt] = {}

    def prompt(text: str) -> Prompt:
        used = {name: one for name, one in people.items() if f"<{name}>" in text}
        return cache.setdefault(text, Prompt(clip, text, used))

    return SimpleNamespace(
        plain=World(model, clip),
        applied=applied,
        oracle=Oracle(model),
        prompt=prompt,
        anna=anna,
        bob=bob,
        noise=torch.randn(
            1, LATENT_CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(3)
        ),
    )


def check(setting, case, guidance, *, noise=None, applied=None, plain=None, oracle=None):
    """Sample ``case`` with the identity and with the class word, ``guidance`` with the oracle."""
    noise = setting.noise if noise is None else noise
    applied, plain = applied or setting.applied, plain or setting.plain
    oracle = oracle or setting.oracle
    result = case(applied, noise)
    class_word = case(plain, noise)
    expected = oracle.sample(noise, plain.sigmas(), guidance)
    unit = float(expected.std())
    assert float((result - expected).abs().max()) / unit < TOLERANCE
    assert float((result - class_word).abs().mean()) / unit > VISIBLE
    return result


def text_case(text=TEXT, negative=NEGATIVE):
    def case(world, noise):
        return world.sample(world.encode(text), world.encode(negative), noise)

    return case


def text_guidance(setting, text=TEXT, negative=NEGATIVE):
    return cfg([Region(setting.prompt(text))], [Region(setting.prompt(negative))], SCALE)


def combine(*conditionings):
    return [entry for conditioning in conditionings for entry in conditioning]


def area(conditioning, x, width, strength=1.0):
    """The columns from ``x`` of the picture, in pixels."""
    return nodes.ConditioningSetArea().append(conditioning, width, 8 * SIDE, x, 0, strength)[0]


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "a photo of (<anna>:1.3), [smiling] and (old:0.7)",
        "<anna>",
        "<anna> looks at <anna>, <anna>'s hat",
        "a photo of <anna> and <bob> at the sea",
        "a photo of <anna> and <nobody>",
        CHUNKS,
    ],
    ids=["plain", "weights", "alone", "repeated", "two-people", "unknown", "chunks"],
)
def test_prompts(setting, text):
    check(setting, text_case(text), text_guidance(setting, text))


def test_positive_and_negative_are_one_batch(setting):
    calls = []
    unet = setting.applied.model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    try:
        text_case()(setting.applied, setting.noise)
    finally:
        handle.remove()
    assert calls == [2] * STEPS


def test_long_prompt_and_short_negative_are_one_batch(setting):
    """ComfyUI repeats the shorter context to the least common multiple."""
    text = "a photo of <anna> " + "in the old town by the river " * 14
    calls = []
    unet = setting.applied.model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    try:
        check(setting, text_case(text), text_guidance(setting, text))
        check(setting, text_case(NEGATIVE, text), text_guidance(setting, NEGATIVE, text))
    finally:
        handle.remove()
    assert 2 in calls


def test_area_on_the_positive_only(setting):
    """ComfyUI copies the positive's dict, uuid included, into the negative."""

    def case(world, noise):
        positive = combine(area(world.encode(TEXT), 16, 32), world.encode("a wall"))
        return world.sample(positive, world.encode(NEGATIVE), noise)

    cells = SIDE, 4, 0, 2
    positive = [Region(setting.prompt(TEXT), cells), Region(setting.prompt("a wall"))]
    negative = [Region(setting.prompt(NEGATIVE)), Region(setting.prompt(NEGATIVE), cells)]
    check(setting, case, cfg(positive, negative, SCALE))


@pytest.mark.parametrize("raw_clip", [False, True], ids=["same-clip", "raw-clip"])
def test_area_against_the_class_word_of_the_same_sentence(setting, raw_clip):
    """The negative's context equals the positive's, and its dict is a copy of the positive's."""
    plain_text = TEXT.replace("<anna>", "person")

    def case(world, noise):
        background = world.encode("a wall")
        negative = (setting.plain if raw_clip else world).encode(plain_text)
        return world.sample(combine(area(world.encode(TEXT), 0, 32), background), negative, noise)

    cells = SIDE, 4, 0, 0
    positive = [Region(setting.prompt(TEXT), cells), Region(setting.prompt("a wall"))]
    negative = [Region(setting.prompt(plain_text)), Region(setting.prompt(plain_text), cells)]
    check(setting, case, cfg(positive, negative, SCALE))


def test_areas(setting):
    def case(world, noise):
        positive = combine(
            area(world.encode(TEXT), 0, 40, 0.8), area(world.encode("a tree in fog"), 24, 40)
        )
        return world.sample(positive, world.encode(NEGATIVE), noise)

    left, right = (SIDE, 5, 0, 0), (SIDE, 5, 0, 3)
    negative = setting.prompt(NEGATIVE)
    positive = [Region(setting.prompt(TEXT), left, strength=0.8)]
    positive += [Region(setting.prompt("a tree in fog"), right)]
    # The negative's copies take over the positives' strengths.
    negatives = [
        Region(negative), Region(negative, left, strength=0.8), Region(negative, right),
    ]  # fmt: skip
    check(setting, case, cfg(positive, negatives, SCALE))


def test_masks(setting):
    mask = torch.zeros(SIDE, SIDE)
    mask[:, :5] = 1.0

    def case(world, noise):
        def masked(text, mask):
            return nodes.ConditioningSetMask().append(world.encode(text), mask, "default", 0.9)[0]

        positive = combine(masked(TEXT, mask), masked("a tree in fog", 1 - mask))
        return world.sample(positive, world.encode(NEGATIVE), noise)

    positive = [Region(setting.prompt(TEXT), mask=0.9 * mask)]
    positive += [Region(setting.prompt("a tree in fog"), mask=0.9 * (1 - mask))]
    check(setting, case, cfg(positive, [Region(setting.prompt(NEGATIVE))], SCALE))


def test_same_sentence_in_two_regions(setting):
    """Two people, equal class words: the contexts of both regions are equal, only dicts differ."""

    def case(world, noise):
        positive = combine(
            area(world.encode("a photo of <anna>"), 0, 32),
            area(world.encode("a photo of <bob>"), 32, 32),
        )
        return world.sample(positive, world.encode(NEGATIVE), noise)

    left, right = (SIDE, 4, 0, 0), (SIDE, 4, 0, 4)
    positive = [Region(setting.prompt("a photo of <anna>"), left)]
    positive += [Region(setting.prompt("a photo of <bob>"), right)]
    negative = [Region(setting.prompt(NEGATIVE), cells) for cells in (None, left, right)]
    check(setting, case, cfg(positive, negative, SCALE))


@pytest.mark.parametrize(
    "negative", ["a photo of person, smiling", "a photo of <bob>, smiling"], ids=["word", "other"]
)
def test_same_sentence_as_negative(setting, negative):
    check(setting, text_case(TEXT, negative), text_guidance(setting, TEXT, negative))


def test_zero_out_of_the_positive_as_negative(setting):
    def case(world, noise):
        positive = world.encode(TEXT)
        return world.sample(positive, nodes.ConditioningZeroOut().zero_out(positive)[0], noise)

    prompt = setting.prompt(TEXT)
    check(
        setting,
        case,
        cfg([Region(prompt)], [Region(Fixed(torch.zeros_like(prompt.base)))], SCALE),
    )


def test_combine(setting):
    def case(world, noise):
        positive = nodes.ConditioningCombine().combine(
            world.encode(TEXT), world.encode("portrait of <bob> at night")
        )[0]
        return world.sample(positive, world.encode(NEGATIVE), noise)

    positive = [Region(setting.prompt(text)) for text in (TEXT, "portrait of <bob> at night")]
    check(setting, case, cfg(positive, [Region(setting.prompt(NEGATIVE))], SCALE))


@pytest.mark.parametrize(
    "texts",
    [
        (TEXT, "in a garden"),
        ("in a garden", TEXT),
        (TEXT, "portrait of <bob> at night"),
        (TEXT, TEXT),
        (TEXT, TEXT.replace("anna", "bob")),
        (TEXT, TEXT.replace("<anna>", "person")),
        (TEXT.replace("<anna>", "person"), TEXT.replace("anna", "bob")),
    ],
    ids=["to", "from", "both", "twice", "same-sentence", "class-word", "class-word-first"],
)
def test_concat(setting, texts):
    def case(world, noise):
        positive = nodes.ConditioningConcat().concat(*map(world.encode, texts))[0]
        return world.sample(positive, world.encode(NEGATIVE), noise)

    concatenated = Concatenated(*map(setting.prompt, texts))
    check(setting, case, cfg([Region(concatenated)], [Region(setting.prompt(NEGATIVE))], SCALE))


def test_one_style_in_front_of_two_people(setting):
    """ConditioningConcat drops the dict of what it appends, and both sentences are equal."""
    texts = [TEXT, TEXT.replace("anna", "bob")]

    def case(world, noise):
        style = world.encode("in a garden")
        people = [nodes.ConditioningConcat().concat(style, world.encode(text))[0] for text in texts]
        return world.sample(
            nodes.ConditioningCombine().combine(*people)[0], world.encode(NEGATIVE), noise
        )

    style = setting.prompt("in a garden")
    positive = [Region(Concatenated(style, setting.prompt(text))) for text in texts]
    check(setting, case, cfg(positive, [Region(setting.prompt(NEGATIVE))], SCALE))


def test_average_is_left_alone_with_one_warning(setting, caplog):
    def case(world, noise):
        average = nodes.ConditioningAverage().addWeighted(
            world.encode(TEXT), world.encode("in a garden"), 0.5
        )[0]
        return world.sample(world.encode(TEXT), average, noise)

    average = Fixed((setting.prompt(TEXT).base + setting.prompt("in a garden").base) / 2)
    with caplog.at_level(logging.WARNING):
        check(setting, case, cfg([Region(setting.prompt(TEXT))], [Region(average)], SCALE))
    warnings = [record for record in caplog.records if "<anna>" in record.getMessage()]
    assert len(warnings) == 1 and "SeFi Apply Identity" in warnings[0].getMessage()


def test_timestep_ranges(setting):
    def case(world, noise):
        def during(text, start, end):
            return nodes.ConditioningSetTimestepRange().set_range(world.encode(text), start, end)[0]

        positive = combine(during("a tree in fog", 0.0, 0.3), during(TEXT, 0.3, 1.0))
        return world.sample(positive, world.encode(NEGATIVE), noise)

    positive = [Region(setting.prompt("a tree in fog"), end=0.3)]
    positive += [Region(setting.prompt(TEXT), start=0.3)]
    check(setting, case, cfg(positive, [Region(setting.prompt(NEGATIVE))], SCALE))


def clip_lora(seed=5):
    """A random LoRA on the text encoder and one on the U-Net."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for key, size_out, size_in in (
        ("lora_te_text_model_encoder_layers_1_mlp_fc1", 512, 128),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v", 192, 128),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k", 192, 128),
    ):
        lora[f"{key}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator)
        lora[f"{key}.lora_down.weight"] = torch.randn(4, size_in, generator=generator) * 0.1
    return lora


@pytest.mark.parametrize("concat", [False, True], ids=["plain", "concat"])
def test_clip_hooks_with_a_schedule(setting, concat):
    """ComfyUI drops the encoder's dict and encodes anew for each keyframe."""

    def case(world, noise):
        hooks = comfy.hooks.create_hook_lora(clip_lora(), 0.0, 1.0)
        keyframes = comfy.hooks.HookKeyframeGroup()
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.4))
        hooks = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, keyframes)[0]
        clip = nodes_hooks.SetClipHooks().apply_hooks(world.clip, True, True, hooks)[0]
        positive = replace(world, clip=clip).encode(TEXT)
        assert len(positive) == 2
        if concat:
            positive = nodes.ConditioningConcat().concat(positive, world.encode("a hat"))[0]
        return world.sample(positive, world.encode(NEGATIVE), noise)

    people = {"anna": setting.applied.people["anna"]}
    positive = []
    for strength, start, end in ((1.0, 0.0, 0.4), (0.3, 0.4, 1.0)):
        _, clip = comfy.sd.load_lora_for_models(
            setting.plain.model, setting.plain.clip, clip_lora(), 0.0, strength
        )
        prompt = Prompt(clip, TEXT, people)
        for timestep in range(0, 1000, 200):
            prompt.contexts(timestep)  # now, while this LoRA is loaded
        if concat:
            prompt = Concatenated(prompt, setting.prompt("a hat"))
        positive.append(Region(prompt, start=start, end=end))
    check(setting, case, cfg(positive, [Region(setting.prompt(NEGATIVE))], SCALE))


@pytest.mark.parametrize("copied", [False, True], ids=["same-tensor", "copied-tensor"])
def test_text_nodes_that_keep_the_pooled_output_only(setting, copied):
    """Many nodes of other packs call ``encode_from_tokens(tokens, return_pooled=True)``."""

    def encode(world, text):
        text = text if world.people else text.replace("<anna>", "person")
        context, pooled = world.clip.encode_from_tokens(
            world.clip.tokenize(text), return_pooled=True
        )
        return [[context.clone() if copied else context, {"pooled_output": pooled}]]

    def case(world, noise):
        # The class word's own sentence has an equal context and must stay what it is.
        return world.sample(encode(world, TEXT), encode(world, "a photo of person, smiling"), noise)

    check(setting, case, text_guidance(setting, TEXT, "a photo of person, smiling"))


@pytest.mark.parametrize("text", [TEXT, CHUNKS], ids=["plain", "chunks"])
def test_class_word_sentence_after_the_identitys(setting, text):
    """Sampled later, alone, by the patched model: not one bit of the identity."""
    text_case(text)(setting.applied, setting.noise)
    text = text.replace("<anna>", "person")
    expected = text_case(text)(setting.plain, setting.noise)
    for clip in (setting.applied.clip, setting.plain.clip):
        world = replace(setting.applied, clip=clip)
        assert torch.equal(text_case(text)(world, setting.noise), expected)


def test_appended_class_word_sentence_after_the_identitys(setting):
    """An identity's prompt that was appended before, and is kept, must not come back."""

    def case(world, noise, text):
        parts = world.encode("in a garden"), world.encode(text)
        positive = nodes.ConditioningConcat().concat(*parts)[0]
        return world.sample(positive, world.encode(NEGATIVE), noise)

    case(setting.applied, setting.noise, TEXT)
    text = TEXT.replace("<anna>", "person")
    expected = case(setting.plain, setting.noise, text)
    assert torch.equal(case(setting.applied, setting.noise, text), expected)


def test_saved_conditioning(setting):
    def case(world, noise):
        file = io.BytesIO()
        torch.save(world.encode(TEXT), file)
        file.seek(0)
        return world.sample(torch.load(file, weights_only=True), world.encode(NEGATIVE), noise)

    check(setting, case, text_guidance(setting))


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


def test_latent_batch(setting):
    noise = random_latents(4, seed=7)
    check(setting, text_case(), text_guidance(setting), noise=noise)


@pytest.mark.parametrize(
    "texts, pooled",
    [
        ([TEXT, "a photo of a person, smiling", "<bob> at the sea"], True),
        ([TEXT, "a photo of a person, smiling", "<bob> at the sea"], False),
        ([TEXT, TEXT.replace("anna", "bob"), TEXT.replace("<anna>", "person"), TEXT], True),
    ],
    ids=["pooled", "no-pooled", "equal-contexts"],
)
def test_a_prompt_for_each_picture_of_the_batch(setting, texts, pooled):
    """As prompt schedules of animations make them: one conditioning with a row for each picture."""
    noise = random_latents(len(texts), seed=8)

    def case(world, noise):
        encoded = [world.encode(text)[0] for text in texts]
        dicts = [dict(extra) for _, extra in encoded]
        merged = dicts[0]
        merged["pooled_output"] = torch.cat([extra["pooled_output"] for extra in dicts])
        if not pooled:
            del merged["pooled_output"]
        positive = [[torch.cat([context for context, _ in encoded]), merged]]
        return world.sample(positive, world.encode(NEGATIVE), noise)

    result = case(setting.applied, noise)
    for row, text in enumerate(texts):
        one = noise[row : row + 1]
        guidance = text_guidance(setting, text)
        expected = setting.oracle.sample(one, setting.plain.sigmas(), guidance)
        difference = (result[row : row + 1] - expected).abs().max() / expected.std()
        assert float(difference) < TOLERANCE


@pytest.fixture(scope="module")
def controlnet():
    """A small random ControlNet of ComfyUI's own class."""
    config = {key: value for key, value in UNET_CONFIG.items() if key != "out_channels"}
    config.pop("transformer_depth_output")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        network = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    device = torch.device("cpu")
    return comfy.controlnet.ControlNet(network, load_device=device)


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
        return comfy.sd.load_lora_for_models(model, clip, clip_lora(), 0.7, 0.7)

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
