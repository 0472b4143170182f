"""Training that begins at an identity which a face encoder has predicted, and class guidance."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Batch
from sefi_ide.sefi_core.learning.losses import noise_loss

from .random_checkpoint import of_all_families
from .training_runs import CHANNELS, load, photo_and_mask, random_vectors, run


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


def predicted(family, stages=1, vectors=2, **changes):
    rows = random_vectors(family, stages, seed=8, vectors=vectors, scale=0.3)
    made = {"training": {"encoder": "faces.safetensors"}, "position_free": True, **changes}
    return Identity("x", "person", family, rows, rows, **made)


@of_all_families
def test_a_predicted_identity_is_refined_in_its_own_steps(models, family):
    start = predicted(family)
    assert start.predicted
    own = {"predicted_steps": 4, "predicted_learning_rate": 0.004}
    learned, losses, _ = run(models, identity=start, steps=9, stages=3, **own)
    assert len(losses["loss"]) == 4
    assert learned.training["steps"] == learned.training["steps_done"] == 4
    assert learned.training["learning_rate"] == pytest.approx(0.004)
    assert (learned.name, learned.stages, learned.vectors) == ("anna", 3, 2)
    assert learned.position_free and not learned.predicted
    for encoder, rows in start.key_vectors.items():
        moved = (learned.key_vectors[encoder] - rows).abs()
        assert 0 < moved.max() < 0.1
        assert moved.amax((1, 2)).min() > 0  # in every stage

    # And what was refined is gone on from as any identity.
    again, losses, _ = run(models, identity=learned, steps=2, stages=3)
    assert len(losses["loss"]) == 2 and again.position_free


def test_the_attention_loss_holds_on_to_the_map_of_the_start(models):
    """It is nothing before the first step, and something against the class word's map."""
    start = predicted("sd1", stages=5)
    latents = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    apart = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, reference in (("class word", None), ("start", start.key_vectors["l"].mean(0))):
            denoiser = ComfyDenoiser(
                *models[:2],
                [start],
                ["a photo of <name>"],
                latents,
                None,
                reference=None if reference is None else {"l": reference},
            )
            rows = {"l": start.key_vectors["l"].mean(0)}
            made = denoiser.predict([(rows, rows)], Batch([0], [0], [300], 1))
            apart[name] = max(
                float((pair.target - pair.reference).abs().max()) for pair in made.layers
            )
    assert apart["start"] < 1e-6 < 1e-3 < apart["class word"]


@of_all_families
def test_the_background_is_what_the_model_draws_for_the_class_word(models, family):
    model, clip, _ = models
    word = predicted(family, stages=1, position_free=False, training={})
    latents = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = Batch([0, 1], [0, 0], [200, 700], 4)
    with torch.inference_mode(False), torch.no_grad():
        denoiser = ComfyDenoiser(
            model, clip, [word], ["a photo of <name>"], latents, None, class_guided=True
        )
        background = denoiser(word.key_vectors, word.value_vectors, batch).background
        plain = denoiser.prompts[0]
        context, pooled = denoiser._encode(
            {encoder: [[(int(t), w) for t, w in chunk] for chunk in chunks]
             for encoder, chunks in plain.items()}
        )  # fmt: skip
        denoiser.references[0] = context, pooled
        seen = []
        unet = denoiser.model.model.diffusion_model
        hook = unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True
        )
        try:
            again = denoiser(word.key_vectors, word.value_vectors, batch).background
        finally:
            hook.remove()
    torch.testing.assert_close(seen[1], context.repeat(2, 1, 1))  # the second pass
    assert torch.equal(background, again)
    assert not torch.allclose(seen[0], seen[1])


def test_class_guidance_is_trained_only_where_it_is_asked_for(models):
    photos, masks = photo_and_mask()
    options = {"photos": [photos], "masks": [masks], "steps": 2}
    plain, guided, weighted = (
        run(models, **options, **change)[1]["loss"]
        for change in (
            {},
            {"background_target": "class word"},
            {"background_target": "class word", "background_weight": 0.5},
        )
    )
    assert plain != guided != weighted != plain
    # Without a mask there is no background.
    options.pop("masks")
    first, second = (
        run(models, **options, **change)[1]["loss"]
        for change in ({}, {"background_target": "class word"})
    )
    assert first == second


def test_the_loss_has_another_target_outside_the_face():
    generator = torch.Generator().manual_seed(1)
    output, target, background = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(3))
    face = torch.zeros(2, 1, 8, 8)
    face[:, :, :4] = 1
    inside = (output - target).square()[:, :, :2].mean()
    outside = (output - background).square()[:, :, 2:].mean()
    found = noise_loss(output, target, face, 1.0, background)
    torch.testing.assert_close(found, (inside + outside) / 2)
    found = noise_loss(output, target, face, 0.5, background)
    torch.testing.assert_close(found, (inside + 0.5 * outside) / 1.5)
    assert torch.equal(noise_loss(output, target, None, 1.0, background),
                       noise_loss(output, target))  # fmt: skip
