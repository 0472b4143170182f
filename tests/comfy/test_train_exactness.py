"""What is trained is what is sampled, and what diffusers trains."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Batch

from .random_checkpoint import of_all_families
from .training_runs import CHANNELS, load, random_vectors

pytestmark = of_all_families


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


class Denoise(comfy.samplers.Sampler):
    """Asks the model once, for a given latent at a given sigma."""

    def __init__(self, noised: torch.Tensor, sigma: torch.Tensor) -> None:
        self.noised, self.sigma = noised, sigma

    def sample(self, model_wrap, sigmas, extra_args, *_, **__):
        self.denoised = model_wrap(self.noised, self.sigma, **extra_args)
        return self.noised


def denoiser_of(model, clip, identity, *templates: str) -> ComfyDenoiser:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, CHANNELS, 8, 8, generator=generator)
    templates = templates or ("(a photo:1.2) of <name>",)
    return ComfyDenoiser(model, clip, [identity], templates, latents, None)


def captured(denoiser: ComfyDenoiser, batch: Batch, family: str):
    """A prediction with what the U-Net got: latents and timesteps."""
    identity_vectors = [random_vectors(family, 5, seed) for seed in (1, 2)]
    seen = []
    unet = denoiser.model.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        with torch.inference_mode(False), torch.no_grad():
            prediction = denoiser(*identity_vectors, batch)
    finally:
        hook.remove()
    return prediction, seen[0][0], seen[0][1], identity_vectors


@pytest.mark.parametrize("sampling", ["eps", "v_prediction"])
@pytest.mark.parametrize("timestep", [30, 350, 990])
def test_the_trained_prediction_is_the_sampled_one(models, family, sampling, timestep):
    """At every stage, for noise and velocity prediction, through SeFi Apply Identity."""
    model, clip, _ = models
    model = ModelSamplingDiscrete().patch(model, sampling, False)[0]
    word = random_vectors(family, 5, seed=0)
    denoiser = denoiser_of(model, clip, Identity("anna", "person", family, word, word))
    batch = Batch(samples=[1], templates=[0], timesteps=[timestep], noise_seed=4)
    prediction, x, _, (keys, values) = captured(denoiser, batch, family)
    sigma = denoiser.sigmas[[timestep]]
    noised = x * (1 + sigma**2) ** 0.5
    expected = denoiser.sampling.calculate_denoised(sigma, prediction.output, noised)

    identity = Identity("anna", "person", family, keys, values)
    with torch.inference_mode():
        patched, patched_clip = apply_identity(model, clip, AppliedIdentity(identity))
        cond = patched_clip.encode_from_tokens_scheduled(
            patched_clip.tokenize("(a photo:1.2) of <anna>")
        )
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(cond, cond)
        guider.set_cfg(1.0)
        sampler = Denoise(noised, sigma)
        guider.sample(torch.zeros_like(noised), torch.zeros_like(noised), sampler, sigma)
    torch.testing.assert_close(sampler.denoised, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noised_latents_and_targets_are_those_of_diffusers(models, family, kind):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    )
    model, clip, _ = models
    sampling = "eps" if kind == "epsilon" else kind
    model = ModelSamplingDiscrete().patch(model, sampling, False)[0]
    word = random_vectors(family, 5, seed=0)
    denoiser = denoiser_of(model, clip, Identity("anna", "person", family, word, word))
    batch = Batch(samples=[0, 1], templates=[0, 0], timesteps=[5, 700], noise_seed=4)
    prediction, x, timesteps, _ = captured(denoiser, batch, family)

    t = torch.tensor(batch.timesteps)
    noise = torch.randn(denoiser.latents.shape, generator=torch.Generator().manual_seed(4))
    assert timesteps.tolist() == batch.timesteps
    torch.testing.assert_close(x, scheduler.add_noise(denoiser.latents, noise, t))
    target = noise if kind == "epsilon" else scheduler.get_velocity(denoiser.latents, noise, t)
    torch.testing.assert_close(prediction.target, target, rtol=1e-4, atol=1e-4)


def test_prompts_of_two_and_three_chunks_fit_in_one_batch(models, family):
    """Neither is a multiple of the other; a sample's output does not depend on its neighbour."""
    model, clip, _ = models
    word = random_vectors(family, 5, seed=0)
    templates = [f"a photo of <name> {'very ' * words}" for words in (100, 170)]
    denoiser = denoiser_of(model, clip, Identity("anna", "person", family, word, word), *templates)
    both, first, second = (
        captured(denoiser, Batch([0, 1], numbers, [5, 700], 4), family)[0]
        for numbers in ([0, 1], [0, 0], [1, 1])
    )
    assert not torch.allclose(first.output, second.output, rtol=1e-2, atol=1e-3)
    alone = torch.stack([first.output[0], second.output[1]])
    torch.testing.assert_close(both.output, alone, rtol=1e-4, atol=1e-5)
    assert {pair.target.shape[-1] for pair in both.layers} == {6 * 77}
