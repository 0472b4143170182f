"""Mixed attention in everything that other nodes do."""

from __future__ import annotations

from dataclasses import replace

import comfy.ops
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from sefi_ide.tests.comfy import composition
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SIDE,
    STEPS,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
    apply,
    identity,
    random_latents,
)
from sefi_ide.tests.comfy.mixing import TRAJECTORIES, batches, difference, halves, mixed
from sefi_ide.tests.comfy.mixing_cases import CASES
from sefi_ide.tests.comfy.random_checkpoint import FAMILIES, of_all_families

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def nearly(setting) -> World:
    """Anna's vectors are those of the class word but for a millionth, so that she counts."""
    word = identity(setting.plain.clip, "anna", 2, seed=1, size=1e-6)
    return World(*apply(setting.plain.model, setting.plain.clip, word), setting.applied.people)


@of_all_families
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


# A cache of what was computed, by the ids of conditionings.


def cached(world: World) -> World:
    model = EasyCacheNode.execute(world.model, 0.2, 0.15, 0.95, False).result[0]
    return replace(world, model=model)


@of_all_families
def test_both_passes_have_caches_of_their_own(setting, monkeypatch):
    """The text's half is a plain run with EasyCache, which leaves steps out."""
    monkeypatch.setattr(composition, "STEPS", 12)
    noise = random_latents(1, seed=8)
    word = TEXT.replace("<anna>", "person")
    _, expected = halves(cached(setting.plain), word, noise, "euler")
    _, plain = halves(setting.plain, word, noise, "euler")
    _, both = halves(mixed(cached(setting.applied)), TEXT, noise, "euler")
    assert difference(plain, expected) > VISIBLE  # it has left some out
    assert difference(both[1:], expected) < TOLERANCE


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


@of_all_families
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
