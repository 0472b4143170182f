"""Identities in everything that ComfyUI's nodes do to conditioning."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy_extras import nodes_hooks
from sefi_ide.tests.comfy.composition import (
    CHUNKS,
    NEGATIVE,
    SCALE,
    SIDE,
    STEPS,
    TEXT,
    TOLERANCE,
    VISIBLE,
    check,
    random_latents,
    random_lora,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.oracle import Concatenated, Fixed, Prompt, Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import of_all_families

import nodes

pytestmark = [
    pytest.mark.usefixtures("inference_mode"),
    of_all_families,
]


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
    zeros = Fixed(torch.zeros_like(prompt.base), torch.zeros_like(prompt.pooled))
    check(
        setting,
        case,
        cfg([Region(prompt)], [Region(zeros)], SCALE),
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


def test_average_is_a_textual_inversion(setting, caplog):
    """Nobody can tell its stages apart any more, but the person is in it."""

    def case(world, noise):
        average = nodes.ConditioningAverage().addWeighted(
            world.encode(TEXT), world.encode("in a garden"), 0.5
        )[0]
        return world.sample(world.encode(TEXT), average, noise)

    one, other = setting.prompt(TEXT), setting.prompt("in a garden")
    average = Fixed((one.base + other.base) / 2, (one.pooled + other.pooled) / 2)
    with caplog.at_level(logging.INFO):
        check(setting, case, cfg([Region(setting.prompt(TEXT))], [Region(average)], SCALE))
    said = [record for record in caplog.records if "<anna>" in record.getMessage()]
    assert len(said) == 1 and "SeFi Apply Identity" in said[0].getMessage()


def test_timestep_ranges(setting):
    def case(world, noise):
        def during(text, start, end):
            return nodes.ConditioningSetTimestepRange().set_range(world.encode(text), start, end)[0]

        positive = combine(during("a tree in fog", 0.0, 0.3), during(TEXT, 0.3, 1.0))
        return world.sample(positive, world.encode(NEGATIVE), noise)

    positive = [Region(setting.prompt("a tree in fog"), end=0.3)]
    positive += [Region(setting.prompt(TEXT), start=0.3)]
    check(setting, case, cfg(positive, [Region(setting.prompt(NEGATIVE))], SCALE))


@pytest.mark.parametrize("concat", [False, True], ids=["plain", "concat"])
def test_clip_hooks_with_a_schedule(setting, concat):
    """ComfyUI drops the encoder's dict and encodes anew for each keyframe."""

    def case(world, noise):
        hooks = comfy.hooks.create_hook_lora(random_lora(setting.plain), 0.0, 1.0)
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
            setting.plain.model, setting.plain.clip, random_lora(setting.plain), 0.0, strength
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


def test_long_schedules_whose_parts_are_gone(setting):
    """One row for each picture; its parts are dropped, and something else is encoded after."""
    noise = random_latents(24, seed=23)
    texts = [f"a photo of <anna>, number {number}" for number in range(len(noise))]
    clip = setting.applied.clip
    parts = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in texts]
    contexts, pooled = zip(*parts, strict=True)
    positive = [[torch.cat(contexts), {"pooled_output": torch.cat(pooled)}]]
    del parts, contexts, pooled
    setting.applied.encode("portrait of <anna>")
    negative = setting.applied.encode(NEGATIVE)
    drawn, class_word = (
        world.sample(positive, negative, noise) for world in (setting.applied, setting.plain)
    )
    assert all((drawn - class_word).abs().flatten(1).mean(1) > VISIBLE * drawn.std())


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
def test_a_prompt_for_each_picture_of_the_batch(setting, family, texts, pooled):
    """As prompt schedules of animations make them: one conditioning with a row for each picture."""
    noise = random_latents(len(texts), seed=8)

    if family == "sdxl" and not pooled:
        pytest.skip("SDXL has no prompt without a pooled output")

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
