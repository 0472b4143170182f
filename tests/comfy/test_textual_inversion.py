"""Whoever treats the conditioning as ordinary text gets an ordinary textual inversion.

*The twin* of an identity is an embedding file with its V vectors, their mean over the stages, in
ComfyUI's own ``embedding:``. What another node computes of a conditioning must draw what it draws
of the twin's; where the context is intact, the stages are in force as the oracle has them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from sefi_ide.sefi_core.comfyui.unet import sampling
from sefi_ide.sefi_core.comfyui.unet.conditioning import REGISTRY, UNUSED_SHARE, Registry
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy.composition import (
    CHUNKS,
    NEGATIVE,
    SCALE,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
    apply,
    check,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.oracle import Region, Texts, cfg, timestep_of

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")

OTHER = "portrait of <anna> at night"


@pytest.fixture(scope="module", params=["one-stage", "five-stages"])
def worlds(request, setting, tmp_path_factory):
    """The identity applied, and its twin as an embedding of the plain CLIP.

    One stage has K = V, and is a textual inversion whatever happens to it.
    """
    identity = setting.anna
    if request.param == "one-stage":
        rows = {"l": identity.value_vectors["l"][:1]}
        identity = Identity("anna", "person", "sd1", rows, rows)
    plain = setting.plain
    applied = World(*apply(plain.model, plain.clip, identity), setting.applied.people)
    return applied, twin(plain, identity, tmp_path_factory.mktemp("embeddings"))


class Twin(World):
    """The plain MODEL and CLIP with the identity as an embedding."""

    def encode(self, text: str):
        return nodes.CLIPTextEncode().encode(self.clip, self.text(text))[0]

    @staticmethod
    def text(text: str) -> str:
        return text.replace("<anna>", "embedding:anna")


def twin(plain: World, identity: Identity, folder) -> Twin:
    """The world in which ``embedding:anna`` is the mean of the identity's V vectors."""
    rows = identity.value_vectors["l"].mean(0)
    safetensors.torch.save_file({"emb_params": rows}, str(folder / "anna.safetensors"))
    clip = plain.clip.clone()
    clip.tokenizer = copy.copy(clip.tokenizer)
    clip.tokenizer.clip_l = copy.copy(clip.tokenizer.clip_l)
    clip.tokenizer.clip_l.embedding_directory = str(folder)
    return Twin(plain.model, clip)


def draws_the_twin(worlds, setting, case):
    """``case`` draws the same of both, and not the class word."""
    applied, twin = worlds
    drawn, expected = case(applied, setting.noise), case(twin, setting.noise)
    class_word = case(setting.plain, setting.noise)
    assert float((drawn - expected).abs().max() / expected.std()) < TOLERANCE
    assert float((drawn - class_word).abs().mean() / expected.std()) > VISIBLE


def scaled_row(context, other):
    context = context.clone()
    context[:, 5] *= 1.2
    return context


CHANGES = {
    "scaled row": scaled_row,
    "average": lambda context, other: 0.5 * context + 0.5 * other,
    "there and back": lambda context, other: (context * 3) / 3,
    "cut": lambda context, other: context[:, :70],
    "half precision": lambda context, other: context.half().float(),
    "normalised": lambda context, other: (context - context.mean()) / context.std(),
    "later keyframe": lambda context, other: torch.lerp(context, other, 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_context(worlds, setting, change):
    def case(world, noise):
        (context, extra), *_ = world.encode(TEXT)
        other = world.encode(OTHER)[0][0]
        return world.sample([[change(context, other), extra]], world.encode(NEGATIVE), noise)

    draws_the_twin(worlds, setting, case)


def test_conditioning_average_of_one_person(worlds, setting):
    def case(world, noise):
        parts = world.encode(TEXT), world.encode(OTHER)
        positive = nodes.ConditioningAverage().addWeighted(*parts, 0.5)[0]
        return world.sample(positive, world.encode(NEGATIVE), noise)

    draws_the_twin(worlds, setting, case)


def ids_and_weights(clip, text):
    return clip.tokenize(text)["l"]


def weighted_by_hand(clip, text):
    """As A1111-like weighting nodes: encoded without weights, rows scaled, the mean restored."""
    chunks = ids_and_weights(clip, text)
    context, pooled = clip.cond_stage_model.clip_l.encode_token_weights(
        [[(item, 1.0) for item, _ in chunk] for chunk in chunks]
    )
    weights = torch.tensor([weight for chunk in chunks for _, weight in chunk])
    scaled = context * weights[None, :, None]
    return scaled * (context.mean() / scaled.mean()), pooled


def straight_from_the_encoder(clip, text):
    return clip.cond_stage_model.clip_l.encode_token_weights(ids_and_weights(clip, text))


def ids_only(clip, text):
    ids = [[item for item, _ in chunk] for chunk in ids_and_weights(clip, text)]
    context, pooled = clip.cond_stage_model.clip_l.encode(ids)[:2]
    return context * 1.0001, pooled


@pytest.mark.parametrize("way", [weighted_by_hand, straight_from_the_encoder, ids_only])
def test_nodes_that_encode_by_themselves(worlds, setting, way):
    def case(world, noise):
        clip = world.clip
        clip.load_model()
        text = "a photo of <anna>, (smiling:1.2)"
        if world is setting.plain:
            text = text.replace("<anna>", "person")
        context, pooled = way(clip, Twin.text(text) if isinstance(world, Twin) else text)
        return world.sample([[context, {"pooled_output": pooled}]], world.encode(NEGATIVE), noise)

    draws_the_twin(worlds, setting, case)


@pytest.mark.parametrize("text", [TEXT, "a (<anna>:1.3) (hat:0.5)", CHUNKS])
def test_tokens_through_json_still_mean_the_person(worlds, setting, text):
    applied, _ = worlds
    tokens = applied.clip.tokenize(text)
    expected = applied.clip.encode_from_tokens(tokens)
    read = json.loads(json.dumps(tokens))
    assert torch.equal(applied.clip.encode_from_tokens(read), expected)
    # The class word's own sentence has the same numbers.
    word = text.replace("<anna>", "person")
    plain = applied.clip.encode_from_tokens(applied.clip.tokenize(word))
    assert torch.equal(
        plain, setting.plain.clip.encode_from_tokens(setting.plain.clip.tokenize(word))
    )
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("text", [TEXT, "a photo of person", CHUNKS])
def test_as_many_values_as_the_original(worlds, setting, text):
    applied, _ = worlds
    for clip in (applied.clip, setting.plain.clip):
        tokens = clip.tokenize(text)
        context, pooled = clip.cond_stage_model.encode_token_weights(tokens)
        assert context.shape == (1, 77 * len(tokens["l"]), 128)
        assert pooled.shape == (1, 128)
        assert len(clip.cond_stage_model.clip_l.encode_token_weights(tokens["l"])) == 2


def test_the_pooled_output_is_the_twins(worlds):
    outputs = [world.encode(TEXT)[0][1]["pooled_output"] for world in worlds]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_an_intact_context_keeps_its_stages_without_its_dict(setting):
    def case(world, noise):
        context, extra = world.encode(TEXT)[0]
        zeros = {"pooled_output": torch.zeros_like(extra["pooled_output"])}
        return world.sample([[context, zeros]], world.encode(NEGATIVE), noise)

    check(setting, case, text_guidance(setting))


class Couple:
    """A pack that draws regions from conditionings of their own by patches of cross-attention.

    ``regions`` gives at a timestep the contexts for keys and values of each region (left, right);
    the prompt itself stays outside. Rows of the positive are multiplied, and put together by the
    regions' masks after the attention.
    """

    def __init__(self, regions, returns="both", checks_equality=False):
        self.regions, self.returns, self.checks_equality = regions, returns, checks_equality
        self.rows = []

    def patched(self, model):
        model = model.clone()
        model.set_model_attn2_patch(self.patch)
        model.set_model_attn2_output_patch(self.merge)
        return model

    def patch(self, query, key, value, options):
        if self.checks_equality:
            assert torch.equal(key, value)
        timestep = timestep_of(float(options["sigmas"][0]))
        parts = self.regions(timestep)
        chunks = options["cond_or_uncond"]
        queries, keys, values = ([] for _ in "qkv")
        self.rows = []
        for which, q, k, v in zip(
            chunks, *(tensor.chunk(len(chunks)) for tensor in (query, key, value)), strict=True
        ):
            self.rows.append(1 if which == 1 else len(parts))
            regions = [(k, v)] if which == 1 else parts
            for region_key, region_value in regions:
                queries.append(q)
                keys.append(region_key.to(k))
                values.append(region_value.to(v))
        keys = torch.cat(keys)
        values = keys if self.returns == "keys" else torch.cat(values)
        return torch.cat(queries), keys, values

    def merge(self, output, options):
        merged = []
        parts = iter(output.split(1))
        for rows in self.rows:
            group = [next(parts) for _ in range(rows)]
            if rows == 1:
                merged += group
                continue
            height, width = options["activations_shape"][-2:]
            left = (torch.arange(width) < width / 2).expand(height, width).reshape(1, -1, 1)
            merged.append(torch.where(left, *group))
        return torch.cat(merged)


REGIONS = ("a photo of <anna>", "portrait of <bob>, smiling")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"checks_equality": True}, {"returns": "keys"}],
    ids=["plain", "checks", "keys-for-both"],
)
def test_regions_of_a_pack(setting, settings, order):
    prompts = [setting.prompt(text) for text in REGIONS]
    plain, both = setting.plain, setting.applied

    def sample(model, couple, world):
        world = replace(world, model=couple.patched(model))
        return world.sample(world.encode("two people"), world.encode(NEGATIVE), setting.noise)

    def drawn(texts):
        contexts = [both.encode(text)[0][0] for text in texts]
        couple = Couple(lambda _: [(context, context) for context in contexts], **settings)
        if order == "after":
            return sample(both.model, couple, both)
        model, clip = apply(couple.patched(plain.model), plain.clip, setting.anna)
        model, clip = apply(model, clip, setting.bob)
        world = replace(both, model=model)
        return world.sample(world.encode("two people"), world.encode(NEGATIVE), setting.noise)

    # The pack on the plain model, told the contexts for keys and values by the oracle.
    knowing = Couple(lambda timestep: [prompt.contexts(timestep)[:2] for prompt in prompts])
    expected = sample(plain.model, knowing, plain)
    result = drawn(REGIONS)
    assert float((result - expected).abs().max() / expected.std()) < TOLERANCE
    words = [text.replace("<anna>", "person").replace("<bob>", "person") for text in REGIONS]
    assert float((result - drawn(words)).abs().mean() / expected.std()) > VISIBLE


def test_a_pack_that_cuts_contexts(setting):
    """Nothing is recognised in what is left, so the swap has to come before the cut."""

    class Cut:
        def __init__(self, prompt):
            self.prompt, self.base, self.pooled = prompt, prompt.base, prompt.pooled

        def contexts(self, timestep):
            key, value, pooled = self.prompt.contexts(timestep)
            return Texts(key[:, :77], value[:, :77], pooled)

    def patch(query, key, value, options):
        return query, key[:, :77], value[:, :77]

    text = "a photo of <anna> " + "in the old town by the river " * 14

    def case(world, noise):
        model = world.model.clone()
        model.set_model_attn2_patch(patch)
        return text_case(text)(replace(world, model=model), noise)

    guidance = cfg(
        [Region(Cut(setting.prompt(text)))], [Region(Cut(setting.prompt(NEGATIVE)))], SCALE
    )
    check(setting, case, guidance)


def test_a_patch_that_changes_nothing_of_the_context(setting):
    def case(world, noise):
        model = world.model.clone()
        model.set_model_attn2_patch(lambda query, key, value, options: (query, key, value))
        return text_case()(replace(world, model=model), noise)

    check(setting, case, text_guidance(setting))


def test_none_of_a_hundred_and_twenty_prompts_is_forgotten():
    """In the shape of Stable Diffusion 1.x, five stages each, when only a copy of them is left."""
    registry = Registry(REGISTRY.unused_bytes)
    assert 0 < UNUSED_SHARE < 1
    bases = [torch.full((1, 77, 768), float(number)) for number in range(1, 121)]
    for base in bases:
        phases = [
            {"key": torch.empty_like(base), "value": torch.empty_like(base)} for _ in range(5)
        ]
        registry.add(base.clone(), {"base": base, "phases": phases})
    assert len(registry) == 120


def test_only_keys_do_not_come_back_by_content(setting):
    """With V of the class word a context does not tell; the class word's own must stay."""
    clip, model = setting.plain.clip, setting.plain.model
    model, only_keys = apply(model, clip, setting.anna, strength_v=0.0)
    world = World(model, only_keys, setting.applied.people)
    kept = world.encode(TEXT)
    word = TEXT.replace("<anna>", "person")
    expected = text_case(word)(setting.plain, setting.noise)
    drawn = world.sample(world.encode(word), world.encode(NEGATIVE), setting.noise)
    assert torch.equal(drawn, expected)
    with_keys = world.sample(kept, world.encode(NEGATIVE), setting.noise)
    assert float((with_keys - expected).abs().mean() / expected.std()) > VISIBLE


@pytest.mark.parametrize("size", [1, 2], ids=["turned", "tiles"])
def test_conditioning_of_a_file_when_rows_change_their_places(setting, monkeypatch, size):
    """Known by its own dict only: the registry of another process has never seen it."""
    monkeypatch.setattr(sampling, "REGISTRY", Registry(0))

    def wrapper(apply_model, arguments):
        places = list(range(len(arguments["input"])))[::-1]
        given = arguments["input"][places], arguments["timestep"][places]
        context = arguments["c"]["c_crossattn"][places]
        conditioning = {**arguments["c"], "c_crossattn": context}
        if size > 1:
            given = tuple(torch.cat([one] * size) for one in given)
            conditioning["c_crossattn"] = torch.cat([context] * size)
        return apply_model(*given, **conditioning)[: len(places)][places]

    def case(world, noise):
        model = world.model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return text_case()(replace(world, model=model), noise)

    check(setting, case, text_guidance(setting))
