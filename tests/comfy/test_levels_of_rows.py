"""Rows of different noise levels in one call of the U-Net, as core's Train LoRA node has them."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.base_model import cross_attention_layers
from sefi_ide.sefi_core.comfyui.unet.adapter import add_beside
from sefi_ide.sefi_core.injection import Beside
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    SIDE,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
    apply,
    random_latents,
)
from sefi_ide.tests.comfy.mixing import difference
from sefi_ide.tests.comfy.random_checkpoint import of_all_families

pytestmark = pytest.mark.usefixtures("inference_mode")

LEVELS = torch.tensor([12.0, 0.3, 2.0])
BOTH = "a photo of <anna> and <bob>, smiling"
LEFT = torch.zeros(1, 8 * SIDE, 8 * SIDE)
LEFT[..., : 4 * SIDE] = 1


class AtLevels(comfy.samplers.Sampler):
    """Asks the model once, with a noise level for each latent."""

    def __init__(self, *levels):
        self.levels = levels

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_, **__):
        for levels in self.levels:
            answer = model_wrap(noise * levels.view(-1, 1, 1, 1), levels, **extra_args)
        return answer


def answers(world, text, noise, *levels):
    """What the model predicts for the last of ``levels``."""
    guider = comfy.samplers.CFGGuider(world.model)
    guider.set_conds(world.encode(text), world.encode(NEGATIVE))
    guider.set_cfg(SCALE)
    sigmas = torch.tensor([float(levels[0].max()), 0.0])
    return guider.sample(noise, torch.zeros_like(noise), AtLevels(*levels), sigmas, seed=0)


def check(world, text=TEXT):
    """Each row in one call with others is what it is alone, and its level matters to it."""
    noise = random_latents(len(LEVELS), seed=8)
    together = answers(world, text, noise, LEVELS)
    alone = [
        answers(world, text, noise[row : row + 1], LEVELS[row : row + 1])
        for row in range(len(LEVELS))
    ]
    for row, one in enumerate(alone):
        assert difference(together[row : row + 1], one) < TOLERANCE
    return alone


def plain(setting, text=TEXT):
    return check(setting.plain, text)


def changed(one, other):
    return float((one - other).abs().mean() / other.std())


@of_all_families
def test_stages_of_an_identity(setting):
    for one, other in zip(check(setting.applied), plain(setting), strict=True):
        assert changed(one, other) > VISIBLE


@of_all_families
def test_the_range_of_an_identity(setting):
    model, clip = apply(
        setting.plain.model, setting.plain.clip, setting.anna, strength_v=0.0, start=0.0, end=0.3
    )
    drawn = check(World(model, clip, setting.applied.people))
    acts = [changed(*pair) > 1e-6 for pair in zip(drawn, plain(setting), strict=True)]
    assert acts == [True, False, False]


@of_all_families
def test_an_identity_in_a_region(setting):
    """Where contexts are blended, and the pooled output with them."""
    model, clip = SeFiApplyIdentity.execute(
        setting.plain.model, setting.plain.clip, setting.anna, region=LEFT
    ).result
    check(World(model, clip, setting.applied.people))


@of_all_families
def test_contexts_that_another_pack_brings(setting):
    """Its patch brings copies, in which the rows are found again."""
    model = setting.applied.model.clone()
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k.clone(), v.clone()))
    check(replace(setting.applied, model=model))


@of_all_families
def test_who_is_where_is_read_at_the_level_of_each_row(setting):
    """The second call is below the levels at which the first latent's people are read."""
    world = setting.applied
    model, clip = setting.plain.model, setting.plain.clip
    for one in (setting.anna, setting.bob):
        model, clip = SeFiApplyIdentity.execute(model, clip, one, regions="automatic").result
    world = World(model, clip, setting.applied.people)
    noise = random_latents(2, seed=8)
    first, then = torch.tensor([14.0, 0.4]), torch.tensor([2.0, 0.3])
    together = answers(world, BOTH, noise, first, then)
    for row in range(2):
        part = slice(row, row + 1)
        alone = answers(world, BOTH, noise[part], first[part], then[part])
        assert difference(together[part], alone) < TOLERANCE


@of_all_families
@pytest.mark.parametrize("more", [{}, {"with_text": False}, {"region": LEFT}], ids=str)
def test_the_range_of_a_face_adapter(setting, more):
    """Beside one that acts everywhere, or alone."""
    model = setting.plain.model
    generator = torch.Generator().manual_seed(4)
    layers = {
        block: tuple(
            torch.randn(2, 3, layer.to_k.weight.shape[0], generator=generator) for _ in "kv"
        )
        for block, layer in cross_attention_layers(model.model.diffusion_model).items()
    }
    ranged = add_beside(model, Beside(layers, 1.0, 0.0, 0.3, **more))
    drawn = check(replace(setting.plain, model=ranged))
    acts = [changed(*pair) > 1e-6 for pair in zip(drawn, plain(setting), strict=True)]
    assert acts == [True, False, False]
    two = add_beside(ranged, Beside(layers, 0.5, 0.3, 1.0))
    drawn = check(replace(setting.plain, model=two))
    assert all(changed(*pair) > 1e-6 for pair in zip(drawn, plain(setting), strict=True))
