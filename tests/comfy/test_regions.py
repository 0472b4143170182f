"""Identities that act in a part of the picture, against attention that is computed by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.attention_maps import attention_maps
from sefi_ide.sefi_core.comfyui.unet import blending
from sefi_ide.sefi_core.comfyui.unet.conditioning import CONDITIONING_KEY, REGISTRY
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.tests.comfy import composition
from sefi_ide.tests.comfy.composition import (
    LATENT_CHANNELS,
    NEGATIVE,
    SCALE,
    SIDE,
    STEPS,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
    random_latents,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.oracle import Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import of_all_families
from sefi_ide.tests.comfy.region_oracle import RegionOracle

import nodes

pytestmark = [pytest.mark.usefixtures("inference_mode"), of_all_families]

TWO = "a photo of <anna> and <bob> at the sea"
PIXELS = 8 * SIDE
EQUAL = 1e-5

LEFT = torch.zeros(1, PIXELS, PIXELS)
LEFT[..., : PIXELS // 2] = 1
RIGHT = 1 - LEFT
FEATHER = torch.linspace(1, 0, PIXELS).expand(1, PIXELS, PIXELS).clone()
ONES, ZEROS = torch.ones(1, 5, 7), torch.zeros(1, 5, 7)


def masked(setting, **masks: torch.Tensor) -> SimpleNamespace:
    """The setting with regions for people, by name."""
    people = [setting.anna, setting.bob]
    model, clip = setting.plain.model, setting.plain.clip
    for one in people:
        model, clip = SeFiApplyIdentity.execute(model, clip, one, region=masks.get(one.name)).result
    oracle = RegionOracle(setting.plain.model, masks=masks)
    applied = World(model, clip, setting.applied.people)
    return SimpleNamespace(**{**vars(setting), "applied": applied, "oracle": oracle})


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def noise(height=SIDE, width=SIDE, count=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, LATENT_CHANNELS, height, width, generator=generator)


def check(setting, case, guidance, **settings):
    """As :func:`composition.check`; the whole identity is drawn otherwise, too."""
    drawn = composition.check(setting, case, guidance, **settings)
    everywhere = replace(
        setting.applied, model=setting.everywhere.model, clip=setting.everywhere.clip
    )
    whole = case(everywhere, settings.get("noise", setting.noise))
    assert float((drawn - whole).abs().mean() / drawn.std()) > VISIBLE / 2
    return drawn


@pytest.fixture
def regions(setting):
    """Makes a setting in which people have regions."""

    def make(**masks):
        made = masked(setting, **masks)
        made.everywhere = setting.applied
        return made

    return make


@pytest.mark.parametrize("text", [TEXT, TWO])
def test_a_mask_of_ones_is_no_region(setting, regions, text):
    drawn = text_case(text)(regions(anna=ONES, bob=ONES).applied, setting.noise)
    assert difference(drawn, text_case(text)(setting.applied, setting.noise)) < EQUAL


@pytest.mark.parametrize("text", [TEXT, TWO])
def test_a_mask_of_zeros_is_the_class_word(setting, regions, text):
    drawn = text_case(text)(regions(anna=ZEROS, bob=ZEROS).applied, setting.noise)
    assert difference(drawn, text_case(text)(setting.plain, setting.noise)) < EQUAL


def test_without_a_region_the_same_bits(setting, regions):
    """And neither another attention nor anything else in the payload."""
    ours = regions()
    drawn = text_case(TWO)(ours.applied, setting.noise)
    assert torch.equal(drawn, text_case(TWO)(setting.applied, setting.noise))
    (payload,) = ours.applied.encode(TWO)[0][1][CONDITIONING_KEY]
    assert not any("parts" in phase for phase in payload["phases"])


@pytest.mark.parametrize("kind", ["tokens", "position-free"])
def test_an_identity_whose_context_is_the_conditionings_own(setting, kind):
    """K = V and one stage, as after textual inversion or from a face encoder."""
    alike = {name: rows[:1] for name, rows in setting.anna.value_vectors.items()}
    free = kind == "position-free"
    one = replace(setting.anna, key_vectors=alike, value_vectors=alike, position_free=free)

    def drawn(**settings):
        plain = setting.plain
        applied = SeFiApplyIdentity.execute(plain.model, plain.clip, one, **settings).result
        return text_case()(World(*applied, setting.applied.people), setting.noise)

    class_word = text_case()(setting.plain, setting.noise)
    everywhere = drawn()
    assert difference(everywhere, class_word) > VISIBLE
    assert difference(drawn(region=ZEROS), class_word) < EQUAL
    assert difference(drawn(region=ONES), everywhere) < EQUAL
    assert difference(drawn(region=LEFT), everywhere) > VISIBLE
    assert difference(drawn(region=LEFT), class_word) > VISIBLE


@pytest.mark.parametrize(
    "mask",
    [LEFT, FEATHER, FEATHER[:, :, :50], torch.rand(1, 3, 5), torch.rand(1, 37, 5), LEFT[0]],
    ids=["half", "feather", "odd", "small", "high", "no-batch"],
)
def test_one_person(regions, mask):
    ours = regions(anna=mask if mask.ndim == 3 else mask)
    ours.oracle.masks = {"anna": mask.reshape(-1, *mask.shape[-2:])}
    check(ours, text_case(), text_guidance(ours))


@pytest.mark.parametrize("height, width", [(8, 16), (24, 8), (9, 13)])
def test_pictures_that_are_not_square(regions, height, width):
    ours = regions(anna=FEATHER)
    check(ours, text_case(), text_guidance(ours), noise=noise(height, width))


@pytest.mark.parametrize(
    "masks",
    [
        {"anna": LEFT, "bob": RIGHT},
        {"anna": FEATHER, "bob": 1 - FEATHER},
        {"anna": FEATHER, "bob": FEATHER[:, :20, :31]},
        {"anna": LEFT},
        {"anna": LEFT, "bob": ZEROS},
        {"anna": LEFT, "bob": ONES},
    ],
    ids=["halves", "seam", "overlap", "one-of-two", "nowhere", "everywhere"],
)
def test_two_people(regions, masks):
    ours = regions(**masks)
    check(ours, text_case(TWO), text_guidance(ours, TWO))


def test_a_batch_of_masks_goes_round(regions):
    """Two masks for anna and three for bob, five pictures."""
    generator = torch.Generator().manual_seed(7)
    anna, bob = (torch.rand(n, 16, 16, generator=generator) for n in (2, 3))
    ours = regions(anna=anna, bob=bob)
    check(ours, text_case(TWO), text_guidance(ours, TWO), noise=noise(count=5))


def test_a_prompt_for_each_frame_in_windows(regions):
    """Each frame its own mask, though the model sees four frames at a time."""
    masks = torch.rand(10, 8, 8, generator=torch.Generator().manual_seed(8))
    ours = regions(anna=masks)
    latents = random_latents(10, seed=31)
    model = ContextWindowsManualNode.execute(
        ours.applied.model, 4, 1, "standard_static", 1, False, "flat", 0, False
    ).result[0]
    drawn = text_case()(replace(ours.applied, model=model), latents)
    expected = ours.oracle.sample(latents, ours.plain.sigmas(), text_guidance(ours))
    assert difference(drawn, expected) < TOLERANCE


def test_areas_see_a_crop_of_the_mask(regions):
    ours = regions(anna=FEATHER, bob=1 - FEATHER)
    latents = noise(8, 16)

    def case(world, latents):
        left, right = (
            nodes.ConditioningSetArea().append(world.encode(text), 64, 64, x, 0, 1.0)[0]
            for text, x in ((TWO, 0), ("<bob> in fog", 64))
        )
        return world.sample(left + right, world.encode(NEGATIVE), latents)

    cells = [(8, 8, 0, 0), (8, 8, 0, 8)]
    prompts = [ours.prompt(TWO), ours.prompt("<bob> in fog")]
    negative = ours.prompt(NEGATIVE)
    positive = [Region(prompt, cell) for prompt, cell in zip(prompts, cells, strict=True)]
    negatives = [Region(negative), *(Region(negative, cell) for cell in cells)]
    check(ours, case, cfg(positive, negatives, SCALE), noise=latents)


@pytest.mark.parametrize("order", [1, -1])
def test_tiles_of_another_pack_are_found_in_the_picture(regions, order):
    ours = regions(anna=FEATHER)

    def wrapper(apply_model, arguments):
        tiles = torch.cat(arguments["input"].chunk(2, dim=3))
        places = list(range(len(tiles)))[::order]
        given = {**arguments["c"], "c_crossattn": arguments["c"]["c_crossattn"].repeat(2, 1, 1)}
        given["c_crossattn"] = given["c_crossattn"][places]
        if "y" in given:
            given["y"] = given["y"].repeat(2, 1)[places]
        output = apply_model(tiles[places], arguments["timestep"].repeat(2), **given)[places]
        return torch.cat(output.chunk(2), dim=3)

    def case(world, latents):
        model = world.model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return text_case()(replace(world, model=model), latents)

    ours.oracle.tiles = 2
    check(ours, case, text_guidance(ours), noise=noise(8, 16))


def test_a_changed_tile_is_drawn_with_the_identity_everywhere(regions, setting, caplog):
    caplog.set_level("INFO")
    ours = regions(anna=LEFT)

    def wrapper(apply_model, arguments):
        larger = torch.nn.functional.pad(arguments["input"], (4, 4, 0, 0), mode="circular")
        return apply_model(larger, arguments["timestep"], **arguments["c"])[..., 4:-4]

    drawn, whole = (
        text_case()(replace(world, model=padded), setting.noise)
        for world in (ours.applied, setting.applied)
        for padded in (world.model.clone(),)
        if padded.set_model_unet_function_wrapper(wrapper) is None
    )
    assert difference(drawn, whole) < EQUAL
    assert sum("regions cannot be found" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    "text", [TEXT, "a photo of <anna> " + "in the old town by the river " * 14]
)
def test_long_and_short_prompts_in_one_batch(regions, text):
    """ComfyUI repeats the shorter one, whose two halves are of one prompt."""
    ours = regions(anna=FEATHER)
    other = "blurry " * 90
    check(ours, text_case(text, other), text_guidance(ours, text, other))


def test_saved_conditioning_keeps_the_regions(regions):
    ours = regions(anna=LEFT, bob=RIGHT)

    def case(world, latents):
        file = io.BytesIO()
        torch.save(world.encode(TWO), file)
        REGISTRY.__init__(REGISTRY.unused_bytes)
        file.seek(0)
        positive = torch.load(file, weights_only=True)
        return world.sample(positive, world.encode(NEGATIVE), latents)

    check(ours, case, text_guidance(ours, TWO))


def test_an_attention_replacement_of_another_pack_stays_in_force(regions):
    """It gets the rows that it knows, and what it adds is added once."""
    ours = regions(anna=FEATHER)
    rows = []

    def replacement(q, k, v, options):
        rows.append(len(q))
        attention = blending.plain_attention(q, k, v, options)
        return attention + 0.1 * q

    def patched(world):
        model = world.model.clone()
        for block in ("input", 1), ("input", 2), ("middle", 0), ("output", 1):
            model.set_model_attn2_replace(replacement, *block)
        return replace(world, model=model)

    whole = text_case()(patched(replace(ours.applied)), ours.noise)
    assert set(rows) == {2}
    ones = regions(anna=ONES)
    assert (
        difference(
            text_case()(patched(ones.applied), ours.noise),
            text_case()(patched(ours.everywhere), ours.noise),
        )
        < EQUAL
    )
    plain = text_case()(ours.applied, ours.noise)
    assert difference(whole, plain) > VISIBLE


@pytest.mark.parametrize(
    "masks, attended",
    [
        ({}, None),
        ({"anna": ONES}, None),
        ({"anna": LEFT}, 1),
        ({"anna": LEFT, "bob": RIGHT}, 1),
        ({"anna": LEFT / 2, "bob": RIGHT / 2}, 1.5),
        ({"anna": LEFT, "bob": LEFT}, 1),
        ({"anna": FEATHER}, 1.5),
    ],
)
def test_no_attention_more_than_needed(regions, monkeypatch, masks, attended):
    """A layer attends once, and each query to the parts alone that have a share of its place.

    ``attended`` is how many queries there are through those without regions, None where nothing is
    blended.
    """
    plain, calls = blending.plain_attention, []
    monkeypatch.setattr(
        blending,
        "plain_attention",
        lambda q, *args: (calls.append(q.shape[0] * q.shape[1]), plain(q, *args))[1],
    )
    monkeypatch.setattr(blending, "GATHERING", 0)  # here there are fewer queries than in a row
    ours = regions(**masks)
    layers = len(blending_layers(ours))
    text_case(TWO)(ours.applied, ours.noise)
    if attended is None:
        assert not calls
        return
    assert len(calls) == layers * STEPS
    queries = [2 * (SIDE // level) ** 2 for level in (2, 4)]  # of positive and negative
    assert [max(calls) / queries[0], min(calls) / queries[1]] == [attended, attended]


def blending_layers(ours):
    unet = ours.plain.model.model.diffusion_model
    return [name for name, _ in unet.named_modules() if name.endswith("attn2")]


def test_a_region_that_is_not_seen_costs_nothing(regions, monkeypatch):
    """The area lies where anna's mask is black everywhere."""
    monkeypatch.setattr(blending, "plain_attention", None)
    ours = regions(anna=LEFT)
    plain = setting_of_class_word(ours)

    def case(world):
        positive = nodes.ConditioningSetArea().append(world.encode(TEXT), 32, 64, 32, 0, 1.0)[0]
        return world.sample(positive + world.encode("a wall"), world.encode(NEGATIVE), ours.noise)

    assert difference(case(ours.applied), case(plain)) < EQUAL


def setting_of_class_word(ours) -> World:
    return ours.plain


def test_the_attention_map_is_the_sum_of_the_parts(regions, family):
    ours = regions(anna=LEFT)
    latent = {"samples": noise(16, 16)}
    whole, nowhere = regions(), regions(anna=ZEROS)
    maps = {
        name: attention_maps(
            one.applied.model, one.applied.clip, latent, TEXT, ["<anna>"], 400, 3
        ).layers[0]
        for name, one in (("ours", ours), ("whole", whole), ("nowhere", nowhere))
    }
    # The first layer's queries do not know yet what the prompt is.
    width = maps["ours"].shape[-1] // 2
    assert maps["ours"].shape == maps["whole"].shape
    expected = torch.cat([maps["whole"][..., :width], maps["nowhere"][..., width:]], dim=-1)
    # SDXL's pooled output, which is that of all parts together, tells every layer.
    rtol = 2e-2 if family == "sdxl" else 1e-3
    torch.testing.assert_close(maps["ours"], expected, rtol=rtol, atol=1e-6)
    assert difference(maps["whole"], maps["nowhere"]) > VISIBLE


def test_upstream_is_untouched(setting, regions):
    mask = LEFT.clone()
    before = text_case()(setting.plain, setting.noise)
    options = {**setting.plain.model.model_options["transformer_options"]}
    text_case()(regions(anna=mask).applied, setting.noise)
    assert torch.equal(before, text_case()(setting.plain, setting.noise))
    assert setting.plain.model.model_options["transformer_options"] == options
    assert torch.equal(mask, LEFT)


@pytest.mark.parametrize(
    "mask, message",
    [
        ("a text", "region is a str: connect a MASK"),
        (torch.zeros(3), "region is a tensor of the shape (3,)"),
        (torch.zeros(1, 0, 4), "region is a tensor of the shape (1, 0, 4)"),
        (torch.zeros(0, 4, 4), "region is a batch of no masks"),
        (torch.full((1, 4, 4), float("nan")), "region holds values that are not numbers"),
    ],
)
def test_a_bad_mask_is_refused_in_a_sentence(setting, mask, message):
    plain = setting.plain
    with pytest.raises(SeFiError) as error:
        SeFiApplyIdentity.execute(plain.model, plain.clip, setting.anna, region=mask)
    assert message in str(error.value)
