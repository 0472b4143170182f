"""What is special to a family: SDXL's two texts, sizes, kin and refiner; memory of a step."""

from __future__ import annotations

import logging

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from safetensors.torch import load_file, save_file
from sefi_ide.nodes.train_identity import SeFiTrainIdentity
from sefi_ide.sefi_core.comfyui.base_model import (
    cross_attention_layers,
    family_of,
    representative_layers,
)
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.learning.memory import is_checkpointing, memory_of_a_step
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.families import FAMILIES
from sefi_ide.sefi_core.learning.loop import Batch
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.tests.comfy import random_checkpoint
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    SIDE,
    TEXT,
    World,
    apply,
    check,
    identity,
    person,
)
from sefi_ide.tests.comfy.oracle import Prompt, Region, cfg, vector_of
from sefi_ide.tests.comfy.random_checkpoint import of_all_families, of_families
from sefi_ide.tests.comfy.training_runs import CHANNELS, load, photo_and_mask, run

of_sdxl = of_families("sdxl")


@of_all_families
def test_every_family_is_learned_and_drawn(mini_sd, family, folder):
    """No setting but the number of steps; what was learned fits its own family only."""
    model, clip, vae = mini_sd
    assert family_of(model) == family
    learned, losses, _ = run(mini_sd, masks=[photo_and_mask()[1]])
    assert learned.family == family and learned.widths == random_checkpoint.widths(family)
    assert set(learned.widths) == set(FAMILIES[family].encoders)
    assert len(losses["loss"]) == 3
    world = World(*apply(model, clip, learned), {})
    noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    drawn, word = (
        one.sample(one.encode(text), one.encode(NEGATIVE), noise)
        for one, text in ((world, TEXT), (World(model, clip), TEXT))
    )
    assert (drawn - word).abs().mean() > 0
    other = next(name for name in random_checkpoint.FAMILIES if name != family)
    with torch.inference_mode():
        path = folder.parent / "other.safetensors"
        path.parent.mkdir(parents=True)
        random_checkpoint.save(path, torch.float32, family=random_checkpoint.FAMILIES[other])
    with pytest.raises(SeFiError, match="does not fit this model"):
        apply(*load(path)[:2], learned)


@pytest.mark.usefixtures("inference_mode")
@of_sdxl
@pytest.mark.parametrize(
    ("text_g", "text_l"),
    [
        (TEXT, TEXT),
        (TEXT, "in a garden"),
        ("in a garden", TEXT),
        (TEXT, "<anna> in a garden, very red"),
        (TEXT, "<bob> in a garden"),
    ],
    ids=["both", "g", "l", "other-places", "two-people"],
)
def test_the_two_texts_of_sdxl(setting, text_g, text_l):
    def case(world, noise):
        words = world.people is None
        texts = [
            text.replace("<anna>", "person").replace("<bob>", "person") if words else text
            for text in (text_g, text_l)
        ]
        side = 8 * SIDE
        positive = CLIPTextEncodeSDXL.execute(world.clip, side, side, 0, 0, side, side, *texts)
        return world.sample(positive.result[0], world.encode(NEGATIVE), noise)

    people = {
        name: one for name, one in setting.applied.people.items() if f"<{name}>" in text_g + text_l
    }
    prompt = Prompt(setting.plain.clip, text_g, people, text_l)
    check(setting, case, cfg([Region(prompt)], [Region(setting.prompt(NEGATIVE))], SCALE))


@of_sdxl
def test_training_tells_sdxl_how_large_the_photo_was(mini_sd):
    """A face of few pixels is not learned as a blurred person. Each sample has its own size."""
    model, clip, _ = mini_sd
    anna = identity(clip, "anna", 5, seed=1)
    latents = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    denoiser = ComfyDenoiser(
        model, clip, [anna], ["a photo of <name>"], latents, None, sides=[300, 2000]
    )
    seen = []
    hook = denoiser.model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["y"]), with_kwargs=True
    )
    try:
        with torch.inference_mode(False), torch.no_grad():
            denoiser(anna.key_vectors, anna.value_vectors, Batch([0, 1], [0, 0], [100, 900], 1))
    finally:
        hook.remove()
    prompt = Prompt(clip, "a photo of <anna>", {"anna": person(anna)})
    for row, (side, timestep) in enumerate(((300, 100), (2000, 900))):
        expected = vector_of(prompt.contexts(timestep).pooled, side, side, (8 * SIDE, 8 * SIDE))
        torch.testing.assert_close(seen[0][row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("inference_mode")
@of_sdxl
def test_to_the_refiner_a_placeholder_is_its_class_word(mini_sd, tmp_path, caplog):
    anna = identity(mini_sd[1], "anna", 5, seed=1)
    path = tmp_path / "refiner.safetensors"
    random_checkpoint.save(path, torch.float32, family=random_checkpoint.REFINER)
    model, clip, _ = load(path)
    with caplog.at_level(logging.INFO):
        applied = World(*apply(model, clip, anna), {})
    assert [r.getMessage() for r in caplog.records if "refiner" in r.getMessage()] == [
        "SeFi Apply Identity: <anna> is its class word to SDXL's refiner."
    ]
    noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    drawn, word = (
        world.sample(world.encode(TEXT), world.encode(NEGATIVE), noise)
        for world in (applied, World(model, clip))
    )
    assert torch.equal(drawn, word)


@of_sdxl
def test_maps_are_taken_of_one_layer_in_each_row(mini_sd):
    unet = mini_sd[0].model.diffusion_model
    every, some = cross_attention_layers(unet), representative_layers(unet)
    assert len(every) > len(some) == len({block[:2] for block in every})
    assert all(every[block] is layer for block, layer in some.items())


@of_all_families
def test_checkpointing_is_chosen_by_the_memory_that_is_free(mini_sd, family, monkeypatch, caplog):
    model, clip, _ = mini_sd
    patchers, shape = [model, clip.patcher], (2, CHANNELS, 64, 64)
    needed = memory_of_a_step(model, shape, False)
    assert needed > 2 * memory_of_a_step(model, shape, True) > 0
    assert needed == 2 * memory_of_a_step(model, (1, *shape[1:]), False)
    for free, expected in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda _, free=free: free)
        with caplog.at_level(logging.INFO):
            assert is_checkpointing("auto", patchers, shape) is expected
        said = caplog.records[-1].getMessage()
        assert ("is on" in said) is expected and "GB" in said
        assert is_checkpointing("on", patchers, shape) and not is_checkpointing(
            "off", patchers, shape
        )


@pytest.mark.parametrize("given", [True, False, "auto", "on", "off", None])
def test_workflows_of_before_the_choice_still_run(given):
    assert SeFiTrainIdentity.validate_inputs(gradient_checkpointing=[given]) is True
    if isinstance(given, bool):
        settings = TrainingSettings(gradient_checkpointing=given)  # pyright: ignore
        assert settings.gradient_checkpointing == ("on" if given else "off")
    refused = SeFiTrainIdentity.validate_inputs(gradient_checkpointing=["sometimes"])
    assert "choose one of auto, on, off" in refused


def test_resolution_zero_is_the_familys_own():
    assert TrainingSettings().resolution == 0
    with pytest.raises(SeFiError, match="resolution is 32: .* 64 pixels or more, or to 0"):
        TrainingSettings(resolution=32)
    assert {name: family.resolution for name, family in FAMILIES.items()} == {
        "sd1": 512,
        "sd2": 768,
        "sdxl": 1024,
    }


@of_sdxl
def test_kin_with_less_attention(mini_checkpoint, tmp_path):
    """As KOALA and Vega: no middle block. They are SDXL to an identity."""
    weights = load_file(mini_checkpoint)
    middle = "model.diffusion_model.middle_block."
    save_file(
        {key: weight for key, weight in weights.items() if not key.startswith(middle)},
        tmp_path / "kin.safetensors",
    )
    models = load(tmp_path / "kin.safetensors")
    assert family_of(models[0]) == "sdxl"
    learned = run(models, masks=[photo_and_mask()[1]])[0]
    assert learned.widths == random_checkpoint.widths("sdxl")
    assert apply(*models[:2], learned)


SAMPLINGS = {
    "noise": (ModelSamplingDiscrete, "eps", False),
    "velocity": (ModelSamplingDiscrete, "v_prediction", False),
    "zero terminal SNR": (ModelSamplingDiscrete, "v_prediction", True),
    "LCM": (ModelSamplingDiscrete, "lcm", False),
    "EDM": (ModelSamplingContinuousEDM, "edm", 80.0, 0.002),
    "Playground": (ModelSamplingContinuousEDM, "edm_playground_v2.5", 80.0, 0.002),
    "CosXL": (ModelSamplingContinuousEDM, "v_prediction", 120.0, 0.002),
}


@of_sdxl
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_target_is_the_output_that_denoises_to_the_picture(mini_sd, sampling):
    """Whatever the checkpoint predicts: NoobAI's velocity, Playground's EDM, distilled ones."""
    node, *arguments = sampling
    model, clip, _ = mini_sd
    with torch.inference_mode():
        model = node().patch(model, *arguments)[0]
    anna = identity(clip, "anna", 5, seed=1)
    latents = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    denoiser = ComfyDenoiser(model, clip, [anna], ["a photo of <name>"], latents, None)
    batch = Batch([0, 1], [0, 0], [50, 900], 3)
    with torch.inference_mode(False), torch.no_grad():
        made = denoiser(anna.key_vectors, anna.value_vectors, batch)
    sigma = denoiser.sigmas[batch.timesteps]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    noised = denoiser.sampling.noise_scaling(sigma, noise, latents)
    denoised = denoiser.sampling.calculate_denoised(sigma, made.target, noised)
    torch.testing.assert_close(denoised, latents, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(made.output).all() and made.target.abs().mean() < 10
