"""Regions found automatically, together with what other nodes do to the model.

By hand: the first step, in which it is read who is where, as without regions; from then on as with
masks.
"""

from __future__ import annotations

import comfy.sample
import pytest
import torch
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    STEPS,
    TOLERANCE,
    VISIBLE,
)
from sefi_ide.tests.comfy.mixing import adapted, difference, halves, mixed
from sefi_ide.tests.comfy.mixing_cases import controlled
from sefi_ide.tests.comfy.random_checkpoint import FAMILIES, of_families
from sefi_ide.tests.comfy.test_automatic import TWO, divide_in_halves, halves_of, noise, shared

pytestmark = [pytest.mark.usefixtures("inference_mode"), of_families("sd1", "sdxl")]

WORDS = TWO.replace("<anna>", "person").replace("<bob>", "person")


@pytest.fixture
def left_and_right(monkeypatch):
    return divide_in_halves(monkeypatch)


def steps(world, conditionings, latents, begin, end):
    """Some of the sampler's steps."""
    return comfy.sample.sample(
        world.model, torch.zeros_like(latents) if begin else latents, STEPS, SCALE, "euler",
        "normal", *conditionings, latents if begin else torch.zeros_like(latents),
        disable_pbar=True, seed=0, start_step=begin, last_step=end, force_full_denoise=end == STEPS,
        disable_noise=False,
    )  # fmt: skip


def plain(world):
    return world, (world.encode(TWO), world.encode(NEGATIVE))


def with_a_controlnet(world):
    return world, controlled(world, TWO)


def with_another_pack(world):
    return plain(adapted(world, 1.0))


def with_mixed_attention(world):
    return plain(mixed(world, "same", adain_mean="keys"))


@pytest.mark.parametrize(
    "other", [plain, with_a_controlnet, with_another_pack, with_mixed_attention]
)
def test_each_has_their_part_after_the_first_step(setting, family, left_and_right, other):
    latents, (left, right) = noise(), halves_of(setting.noise.shape[2:]).split(1)
    masks = {"anna": left, "bob": right}
    ours, everywhere, painted = (
        shared(setting, regions, chosen).applied
        for regions, chosen in (
            (("automatic", "automatic"), None),
            (("off", "off"), None),
            (("off", "off"), masks),
        )
    )
    for world in (ours, everywhere, painted):
        vars(world)["unet_config"] = FAMILIES[family].unet_config
    drawn = steps(*other(ours), latents, 0, STEPS)
    first = steps(*other(everywhere), latents, 0, 1)
    expected = steps(*other(painted), first, 1, STEPS)
    assert difference(drawn, expected) < TOLERANCE
    assert len(left_and_right) == 1 and (left_and_right[0] > 0).all()
    without = steps(*other(everywhere), latents, 0, STEPS)
    assert difference(drawn, without) > 10 * difference(drawn, expected)
    if other is not plain:
        assert difference(drawn, steps(*plain(ours), latents, 0, STEPS)) > TOLERANCE


def test_the_texts_half_of_mixed_attention_knows_no_people(setting, left_and_right):
    """Nor does it read where they are."""
    ours = mixed(shared(setting).applied, "own")
    _, both = halves(ours, TWO, noise(), "euler")
    _, expected = halves(setting.plain, WORDS, noise(), "euler")
    assert difference(both[1:], expected) < TOLERANCE
    assert difference(both[:1], expected) > VISIBLE
    assert len(left_and_right) == 1
