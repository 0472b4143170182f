"""Face adapters together with what other nodes do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.base_model import cross_attention_layers
from sefi_ide.tests.comfy import adapting
from sefi_ide.tests.comfy.adapting import (
    FEATHER,
    LEFT,
    PIXELS,
    PLAIN,
    apply,
    close,
    differs,
    draw,
    guidance,
)
from sefi_ide.tests.comfy.composition import LATENT_CHANNELS, NEGATIVE, SCALE, TEXT, World
from sefi_ide.tests.comfy.oracle import Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import of_families

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")

photos, embedder = adapting.photos, adapting.embedder
made, oracle = adapting.made, adapting.oracle


@of_families("sd1", "sdxl")
@pytest.mark.parametrize("order", ["identity first", "adapter first"])
@pytest.mark.parametrize("where", ["everywhere", "regions"])
def test_with_an_identity(setting, made, oracle, photos, order, where):
    """Each in its half, and both everywhere."""
    opened = made()
    regions = where == "regions"
    anna, other = (LEFT, 1 - LEFT) if regions else (None, None)

    def identity(model):
        return SeFiApplyIdentity.execute(
            model, setting.plain.clip, setting.anna, region=anna
        ).result

    def adapter(model):
        return apply(model, opened, photos, region=other)

    if order == "identity first":
        model, clip = identity(setting.plain.model)
        model = adapter(model)
    else:
        model, clip = identity(adapter(setting.plain.model))
    world = World(model, clip, setting.applied.people)
    knowing = oracle((opened, None, None, {"region": other}))
    knowing.masks = {"anna": anna} if regions else {}
    expected = knowing.sample(setting.noise, setting.plain.sigmas(), guidance(setting, TEXT))
    result = draw(model, world, setting.noise, TEXT)
    close(result, expected)
    for without in (setting.plain.model, identity(setting.plain.model)[0]):
        differs(result, draw(without, replace(world, clip=clip), setting.noise, TEXT))


@of_families("sd1", "sdxl")
def test_two_adapters_in_two_regions(setting, made, oracle, photos):
    opened, second = made(), made(seed=9)
    model = apply(setting.plain.model, opened, photos, region=LEFT)
    model = apply(model, second, photos, region=1 - LEFT, strength=0.5)
    expected = oracle(
        (opened, None, None, {"region": LEFT}),
        (second, None, None, {"region": 1 - LEFT, "strength": 0.5}),
    ).sample(setting.noise, setting.plain.sigmas(), guidance(setting))
    close(draw(model, setting.plain, setting.noise), expected)


@of_families("sd1", "sdxl")
def test_batches_and_areas(setting, made, oracle, photos):
    """Masks of a batch go round; areas see a crop of their picture's."""
    generator = torch.Generator().manual_seed(7)
    masks = torch.rand(2, 16, 16, generator=generator)
    noise = torch.randn(3, LATENT_CHANNELS, 8, 16, generator=generator)
    opened = made()
    model = apply(setting.plain.model, opened, photos, region=masks)
    knowing = oracle((opened, None, None, {"region": masks}))
    close(
        draw(model, setting.plain, noise),
        knowing.sample(noise, setting.plain.sigmas(), guidance(setting)),
    )

    world = replace(setting.plain, model=model)
    texts = PLAIN, "a wall in fog"
    areas = [
        nodes.ConditioningSetArea().append(world.encode(text), 64, 64, x, 0, 1.0)[0]
        for text, x in zip(texts, (0, 64), strict=True)
    ]
    result = world.sample(areas[0] + areas[1], world.encode(NEGATIVE), noise)
    cells = [(8, 8, 0, 0), (8, 8, 0, 8)]
    negative = setting.prompt(NEGATIVE)
    positive = [Region(setting.prompt(t), c) for t, c in zip(texts, cells, strict=True)]
    negatives = [Region(negative), *(Region(negative, cell) for cell in cells)]
    close(result, knowing.sample(noise, world.sigmas(), cfg(positive, negatives, SCALE)))


@of_families("sd1")
@pytest.mark.parametrize("order", [1, -1])
def test_tiles_of_another_pack(setting, made, oracle, photos, order):
    """It stacks tiles and gives their rows another order."""
    opened = made()
    model = apply(setting.plain.model, opened, photos, region=FEATHER)

    def wrapper(apply_model, arguments):
        tiles = torch.cat(arguments["input"].chunk(2, dim=3))
        places = list(range(len(tiles)))[::order]
        given = {**arguments["c"], "c_crossattn": arguments["c"]["c_crossattn"].repeat(2, 1, 1)}
        given["c_crossattn"] = given["c_crossattn"][places]
        output = apply_model(tiles[places], arguments["timestep"].repeat(2), **given)[places]
        return torch.cat(output.chunk(2), dim=3)

    model.set_model_unet_function_wrapper(wrapper)
    noise = torch.randn(1, LATENT_CHANNELS, 8, 16, generator=torch.Generator().manual_seed(4))
    knowing = oracle((opened, None, None, {"region": FEATHER}))
    knowing.tiles = 2
    close(
        draw(model, setting.plain, noise),
        knowing.sample(noise, setting.plain.sigmas(), guidance(setting)),
    )


@of_families("sd1", "sdxl")
def test_cfg_1_and_guiders(setting, made, oracle, photos):
    opened = made()
    model = apply(setting.plain.model, opened, photos)
    knowing = oracle((opened, None, None, {}))
    alone = knowing.sample(
        setting.noise,
        setting.plain.sigmas(),
        lambda predict: predict([Region(setting.prompt(PLAIN))]),
    )
    close(draw(model, setting.plain, setting.noise, scale=1.0), alone)

    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    world = replace(setting.plain, model=model)
    guider = DualCFGGuider.execute(
        model, world.encode(PLAIN), world.encode("a wall"), world.encode(NEGATIVE), SCALE, 2.0,
        "regular",
    ).result[0]  # fmt: skip

    def dual(predict):
        one, other, negative = (
            predict([Region(setting.prompt(text))]) for text in (PLAIN, "a wall", NEGATIVE)
        )
        return negative + 2.0 * (other - negative) + SCALE * (one - other)

    expected = knowing.sample(setting.noise, setting.plain.sigmas(), dual)
    close(world.guide(guider, setting.noise), expected)


@of_families("sd1")
def test_controlnet_sees_the_text_alone(setting, made, oracle, photos, family):
    from sefi_ide.tests.comfy.test_composition_models import controlnet as fixture

    network = fixture.__wrapped__(family)
    picture = torch.rand(1, PIXELS, PIXELS, 3, generator=torch.Generator().manual_seed(13))
    opened = made()
    model = apply(setting.plain.model, opened, photos)
    world = replace(setting.plain, model=model)
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        world.encode(PLAIN), world.encode(NEGATIVE), network, picture, 0.8, 0.0, 1.0
    )
    result = world.sample(positive, negative, setting.noise)
    control = network.copy().set_cond_hint(picture.movedim(-1, 1), 0.8)
    plain = setting.plain.model.model
    control.pre_run(plain, plain.model_sampling.percent_to_sigma)
    both = cfg(
        [Region(setting.prompt(PLAIN), control=control)],
        [Region(setting.prompt(NEGATIVE), control=control)],
        SCALE,
    )
    knowing = oracle((opened, None, None, {}))
    close(result, knowing.sample(setting.noise, setting.plain.sigmas(), both))
    differs(result, draw(model, setting.plain, setting.noise))


@of_families("sd1")
def test_with_patches_of_other_packs(setting, made, photos):
    """A replacement stays in force; region contexts of attention couple add the face once."""
    from sefi_ide.sefi_core.comfyui.unet.capture import plain_attention
    from sefi_ide.tests.comfy.test_textual_inversion import Couple

    opened = made()
    model = apply(setting.plain.model, opened, photos, region=FEATHER)
    alone = draw(model, setting.plain, setting.noise)
    calls = []

    def replacement(q, k, v, options):
        calls.append(len(q))
        return plain_attention(q, k, v, options)

    patched = model.clone()
    for block in cross_attention_layers(model.model.diffusion_model):
        patched.set_model_attn2_replace(replacement, *block)
    close(draw(patched, setting.plain, setting.noise), alone)
    assert calls and set(calls) == {2}

    context = setting.plain.encode(PLAIN)[0][0]
    couple = Couple(lambda _: [(context, context)] * 2)
    close(draw(couple.patched(model), setting.plain, setting.noise), alone)
    couple = Couple(lambda _: [(context, context)] * 2)
    before = apply(couple.patched(setting.plain.model), opened, photos, region=FEATHER)
    close(draw(before, setting.plain, setting.noise), alone)
