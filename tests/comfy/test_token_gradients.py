"""Gradients of the tokens against finite differences, all in float64.

ComfyUI fixes its text encoder and the U-Net's output to float32. The ``float64`` fixture widens
just these casts, so that the real encoder, U-Net and attention patches compute in float64.
"""

from __future__ import annotations

import itertools

import comfy.sd1_clip
import pytest
import torch
from sefi_ide.sefi_core.comfyui.learning import denoiser as denoiser_module
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.learning.differentiable import differentiable
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Batch, Prediction
from sefi_ide.sefi_core.learning.losses import attention_loss, leak, noise_loss

from . import random_checkpoint
from .random_checkpoint import of_all_families
from .training_runs import random_vectors

STAGES, VECTORS = 5, 2
CHANNELS = random_checkpoint.architecture.LATENT_CHANNELS
SIDE = 8  # latent cells

Vectors = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


class WideTorch:
    """The module ``torch`` with float64 under the name of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(comfy.sd1_clip, "torch", WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    original_to = torch.Tensor.to

    def wide_to(tensor, *args, **kwargs):
        # Latents and sigmas of the denoiser; everything else is float64 already.
        args = [torch.float64 if argument is torch.float32 else argument for argument in args]
        return original_to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide_to)


def denoiser_of(model, clip, family, dtype: torch.dtype = torch.float64) -> ComfyDenoiser:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, CHANNELS, SIDE, SIDE, generator=generator)
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[..., 2:6, 2:6] = 1
    keys, values = vectors(family, torch.float32)
    identity = Identity("anna", "old person", family, keys, values)
    denoiser = ComfyDenoiser(
        model, clip, [identity], ["a (photo:1.3) of <name> on the beach"], latents, masks
    )
    denoiser.dtype = dtype
    return denoiser


def vectors(family: str, dtype: torch.dtype = torch.float64) -> Vectors:
    return tuple(
        {
            encoder: rows.to(dtype)
            for encoder, rows in random_vectors(family, STAGES, seed, VECTORS, 0.2).items()
        }
        for seed in (5, 6)
    )


@pytest.fixture
def held_queries(monkeypatch):
    """Holds the queries of the attention losses at those of the first forward pass.

    Training holds them still as well, so finite differences must not move them. Returns a function
    to be called with the number of layers after the backward pass, which may compute them again.
    """
    compute = denoiser_module.key_probabilities
    first: list[torch.Tensor] = []
    later: list[torch.Tensor] = []

    def key_probabilities(q, k, heads):
        if not later:
            first.append(q.detach())
            return compute(q, k, heads)
        later.append(later.pop(0))
        return compute(later[-1], k, heads)

    monkeypatch.setattr(denoiser_module, "key_probabilities", key_probabilities)
    return lambda layers: later.extend(first[:layers])


def looked_at(prediction: Prediction) -> torch.Tensor:
    """How much attention the placeholder gets."""
    return sum(maps.mean(dim=(1, 2)) for maps in prediction.placeholder_maps()).detach()


def loss_of(prediction: Prediction, first: Prediction) -> torch.Tensor:
    """All losses; what is held still while training is that of the ``first`` prediction."""
    noise = noise_loss(prediction.output, prediction.target, prediction.face, 0.3)
    layers = [
        layer._replace(reference=other.reference.detach())
        for layer, other in zip(prediction.layers, first.layers, strict=True)
    ]
    attention = attention_loss(layers)
    leaked = leak(prediction.placeholder_maps(), prediction.face)
    leaked = leaked * looked_at(prediction) / looked_at(first)
    return noise + 0.05 * attention + leaked.mean()


@of_all_families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_agree_with_finite_differences(
    mini_sd, family, float64, held_queries, checkpointing
):
    """In random directions, for K and V, in both stages of a batch of two."""
    model, clip, _ = mini_sd
    batch = Batch(samples=[0, 1], templates=[0, 0], timesteps=[300, 900], noise_seed=7)
    with torch.inference_mode(False), torch.enable_grad():
        denoiser = denoiser_of(model, clip, family)
        parts = vectors(family)
        for part in parts:
            for rows in part.values():
                rows.requires_grad_()
        modules = denoiser.model.model.diffusion_model, denoiser.clip.cond_stage_model
        with differentiable(*modules, gradient_checkpointing=checkpointing):
            prediction = denoiser(*parts, batch)
            loss = loss_of(prediction, prediction)
            assert loss.dtype == torch.float64
            loss.backward()
            held_queries(len(prediction.layers))
            generator = torch.Generator().manual_seed(1)
            step = 1e-5
            for role, encoder in itertools.product(range(2), parts[0]):
                gradient = parts[role][encoder].grad
                assert gradient[[0, 2, 3]].abs().max() == 0
                for stage in (1, 4):
                    direction = torch.zeros_like(gradient)
                    shape = gradient.shape[1:]
                    direction[stage] = torch.randn(shape, generator=generator).double()
                    losses = []
                    for sign in (1, -1):
                        moved = [
                            {name: rows.detach().clone() for name, rows in part.items()}
                            for part in parts
                        ]
                        moved[role][encoder] += sign * step * direction
                        with torch.no_grad():
                            losses.append(loss_of(denoiser(*moved, batch), prediction))
                    measured = (losses[0] - losses[1]) / (2 * step)
                    expected = (gradient * direction).sum()
                    assert expected.abs() > 1e-4
                    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-9)
