"""Mixed attention: the half of each batch that draws the text's picture."""

from __future__ import annotations

from dataclasses import replace

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_advanced_samplers import SamplerEulerCFGpp
from comfy_extras.nodes_apg import APG
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

# These keep the unconditional prediction of each step, for all their latents.
CFG_PP = [name for name in comfy.samplers.SAMPLER_NAMES if name.endswith("_cfg_pp")]


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
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", CFG_PP)
def test_the_texts_half_is_a_plain_run_where_samplers_listen_to_guidance(setting, name, count):
    noise = random_latents(count, seed=8)
    torch.manual_seed(3)
    _, expected = halves(setting.plain, WORD, noise, name)
    torch.manual_seed(3)
    _, both = halves(mixed(setting.applied), TEXT, noise, name)
    assert len(CFG_PP) >= 7
    assert difference(both[count:], expected) < TOLERANCE
    assert difference(both[:count], expected) > VISIBLE


@of_all_families
@pytest.mark.parametrize("end", [1.0, 0.5])
def test_pictures_of_such_a_sampler_are_those_that_it_draws_alone(setting, end):
    """Behind the end of the range, too, where the text's half is not computed any more."""
    noise = random_latents(2, seed=8)
    world = mixed(setting.applied, end_percent=end)
    both, *alone = (
        drawn_by(world, SamplerEulerCFGpp.execute("regular").result[0], one)
        for one in (noise, noise[:1], noise[1:])
    )
    assert difference(both, torch.cat(alone)) < TOLERANCE


@of_all_families
@pytest.mark.parametrize(("trajectory", "times"), [("own", 1), ("same", 0)])
def test_it_is_said_that_averages_of_guidance_are_of_both_pictures(
    setting, trajectory, times, caplog
):
    caplog.set_level("INFO")
    world = mixed(setting.applied, trajectory)
    averaged = replace(world, model=APG.execute(world.model, 1.0, 5.0, -0.5).result[0])
    for one in (world, averaged):
        drawn_by(one, comfy.samplers.sampler_object("euler"), setting.noise)
        said = [line for line in caplog.messages if "APG" in line]
        assert len(said) == (0 if one is world else times)
    assert all(
        line.startswith("SeFi Mixed Attention: ") and "set trajectory to same" in line
        for line in said
    )


def drawn_by(world, sampler, noise):
    guider = comfy.samplers.CFGGuider(world.model)
    guider.set_conds(world.encode(TEXT), world.encode(NEGATIVE))
    guider.set_cfg(SCALE)
    zeros = torch.zeros_like(noise)
    return guider.sample(noise, zeros, sampler, world.sigmas(), disable_pbar=True, seed=0)


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
