"""Mixed attention: the half of each batch that draws the text's picture."""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    STEPS,
    TEXT,
    TOLERANCE,
    VISIBLE,
    random_latents,
)
from sefi_ide.tests.comfy.mixing import WORD, difference, halves, mixed
from sefi_ide.tests.comfy.mixing_cases import CASES
from sefi_ide.tests.comfy.random_checkpoint import FAMILIES, of_all_families

pytestmark = pytest.mark.usefixtures("inference_mode")

SAMPLERS = [
    "euler", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m_sde", "dpmpp_3m_sde_gpu", "lcm", "ddpm", "er_sde", "seeds_2", "sa_solver", "uni_pc",
]  # fmt: skip


@of_all_families
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


@of_all_families
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


@of_all_families
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
