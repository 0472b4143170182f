"""Gradients through ComfyUI's real models, and that nothing of the models is touched."""

from __future__ import annotations

import json
from contextlib import contextmanager

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file
from sefi_ide.sefi_core.comfyui.clip.tokens import encoder_names
from sefi_ide.sefi_core.comfyui.learning import denoiser as denoiser_module
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.learning.differentiable import differentiable
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Batch
from sefi_ide.sefi_core.learning.losses import attention_loss, leak, noise_loss
from sefi_ide.sefi_core.learning.photos import pair_photos
from sefi_ide.sefi_core.learning.settings import TrainingSettings

from . import random_checkpoint
from .composition import family_of_encoders
from .random_checkpoint import of_all_families
from .training_runs import random_vectors, run, same, with_lora

SIDE = 64
CHANNELS = random_checkpoint.architecture.LATENT_CHANNELS
BATCH = Batch(samples=[0], templates=[0], timesteps=[300], noise_seed=7)


def identity(clip, stages: int = 5, seed: int = 0) -> Identity:
    """Random vectors for the text encoders of a CLIP."""
    family = family_of_encoders(tuple(encoder_names(clip)))
    keys, values = (random_vectors(family, stages, seed + n, scale=0.3) for n in (0, 100))
    return Identity("anna", "person", family, keys, values)


def denoiser(model, clip, dtype="auto", side=SIDE, **options) -> ComfyDenoiser:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, CHANNELS, side // 8, side // 8, generator=generator)
    masks = torch.zeros(2, 1, side, side)
    masks[..., 16:48, 16:48] = 1
    return ComfyDenoiser(
        model,
        clip,
        [identity(clip)],
        ["a photo of <name> on the beach"],
        latents,
        masks,
        dtype=dtype,
        **options,
    )


def vectors(clip, requires_grad: bool = True):
    start = identity(clip, seed=5)
    return tuple(
        {encoder: rows.clone().requires_grad_(requires_grad) for encoder, rows in part.items()}
        for part in (start.key_vectors, start.value_vectors)
    )


def total_loss(prediction, weight: float = 0.05) -> torch.Tensor:
    noise = noise_loss(prediction.output, prediction.target, prediction.face, 0.3)
    return noise + weight * attention_loss(prediction.layers)


@of_all_families
def test_the_attention_losses_pull_at_the_keys_only(mini_sd):
    """Through the queries they would reach the values, which say what the identity looks like."""
    model, clip, _ = mini_sd
    with torch.inference_mode(False), torch.enable_grad():
        predict = denoiser(model, clip)
        keys, values = vectors(clip)
        with differentiable(predict.model.model.diffusion_model, predict.clip.cond_stage_model):
            made = predict(keys, values, BATCH)
            leaked = leak(made.placeholder_maps(), made.face)
            assert leaked.shape == (len(BATCH.samples),)
            assert 0 < leaked.min() and leaked.max() < 1
            (encoder, *_) = keys
            for loss in (attention_loss(made.layers), leaked.mean()):
                in_keys, in_values = torch.autograd.grad(
                    loss, (keys[encoder], values[encoder]), retain_graph=True,
                    materialize_grads=True,
                )  # fmt: skip
                assert in_keys.abs().max() > 0 and in_values.abs().max() == 0
            noise = noise_loss(made.output, made.target, made.face)
            assert torch.autograd.grad(noise, values[encoder])[0].abs().max() > 0


def gradients(model, clip, dtype="auto", checkpointing=False, batch=BATCH, side=SIDE):
    """The loss, and its gradient in the K and V vectors."""
    with torch.inference_mode(False), torch.enable_grad():
        predict = denoiser(model, clip, dtype, side)
        keys, values = vectors(clip)
        modules = predict.model.model.diffusion_model, predict.clip.cond_stage_model
        with differentiable(*modules, gradient_checkpointing=checkpointing):
            loss = total_loss(predict(keys, values, batch))
            scale = 2.0**12
            (loss * scale).backward()
    found = (
        torch.cat([rows.grad.flatten(1) for rows in part.values()], dim=1) / scale
        for part in (keys, values)
    )
    return loss.item(), *found


def load(checkpoint, **options):
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), embedding_directory=None, **options
        )[:3]


@pytest.fixture
def model_and_clip_with_lora(mini_sd):
    """The random miniature with a LoRA on U-Net and text encoder, loaded by ComfyUI."""
    model, clip, vae = mini_sd
    return *with_lora(model, clip), vae


@of_all_families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_the_same_gradient(tmp_path, family, dtype):
    path = tmp_path / "half.safetensors"
    random_checkpoint.save(path, dtype, family=random_checkpoint.FAMILIES[family])
    half = {"model_options": {"dtype": dtype}}
    exact = gradients(*load(path, model_options={"dtype": torch.float32})[:2])
    model, clip, _ = load(path, **half)
    assert next(model.model.diffusion_model.parameters()).dtype == dtype
    for compute in ("fp32", {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]):
        loss, *found = gradients(model, clip, compute)
        for gradient, expected in zip(found, exact[1:], strict=True):
            cosine = torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
            assert cosine > (0.99 if dtype == torch.float16 else 0.97), compute


def quantised(path, source):
    """A checkpoint as ComfyUI's own quantisation of the U-Net's attention leaves it, in fp8."""
    weights = {}
    for key, weight in load_file(source).items():
        attends = key.startswith("model.diffusion_model.") and "attn" in key
        if not attends or weight.ndim != 2:
            weights[key] = weight
            continue
        scale = weight.abs().max() / 448
        name = key.removesuffix("weight")
        weights[key] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{name}weight_scale"] = scale.float().reshape(())
        kind = json.dumps({"format": "float8_e4m3fn"}).encode()
        weights[f"{name}comfy_quant"] = torch.tensor(list(kind), dtype=torch.uint8)
    save_file(weights, path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantised_checkpoints_can_be_trained_on(mini_checkpoint, tmp_path, checkpointing):
    """Their linear layers are no ``nn.Linear``."""
    quantised(tmp_path / "fp8.safetensors", mini_checkpoint)
    _, *expected = gradients(*load(mini_checkpoint)[:2])
    model, clip, _ = load(tmp_path / "fp8.safetensors")
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k
    assert not isinstance(layer, torch.nn.Linear)
    _, *found = gradients(model, clip, checkpointing=checkpointing)
    for gradient, exact in zip(found, expected, strict=True):
        assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.95


def test_layers_that_unpack_their_own_weights(mini_sd, monkeypatch):
    """As those of GGUF files do, in a method of the name of ComfyUI's function."""

    class Packed(comfy.ops.manual_cast.Linear):
        def cast_bias_weight(self, like):
            bias = None if self.bias is None else self.bias.to(like.dtype)
            return self.weight.to(like.dtype) / 2, bias

    model, clip, _ = mini_sd
    _, *expected = gradients(model, clip)
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            with torch.inference_mode():
                packed = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
            monkeypatch.setattr(layer, "weight", packed)
            monkeypatch.setattr(layer, "weight_function", [lambda weight: weight])
            monkeypatch.setattr(layer, "__class__", Packed)
    _, *found = gradients(model, clip)
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact)


@of_all_families
def test_a_unet_without_a_middle_block(mini_checkpoint, tmp_path):
    """As distilled ones have."""
    weights = load_file(mini_checkpoint)
    middle = "model.diffusion_model.middle_block."
    kept = {key: weight for key, weight in weights.items() if not key.startswith(middle)}
    save_file(kept, tmp_path / "small.safetensors")
    model, clip, _ = load(tmp_path / "small.safetensors")
    assert model.model.diffusion_model.middle_block is None
    for gradient in gradients(model, clip)[1:]:
        assert gradient.norm() > 0


@of_all_families
def test_gradient_checkpointing_changes_nothing(mini_sd):
    model, clip, _ = mini_sd
    plain, saved = gradients(model, clip), gradients(model, clip, checkpointing=True)
    assert plain[0] == saved[0]
    for a, b in zip(plain[1:], saved[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_lora_reaches_the_gradient(mini_sd, model_and_clip_with_lora):
    model, clip, _ = mini_sd
    plain = gradients(model, clip)
    lora = gradients(*model_and_clip_with_lora[:2])
    assert abs(plain[0] - lora[0]) > 1e-4
    assert not torch.allclose(plain[1], lora[1])


@contextmanager
def prepared(*models):
    """Weights as ComfyUI has them in little memory: a function makes each one when it is used."""
    layers = [layer for model in models for layer in model.modules()]
    layers = [layer for layer in layers if hasattr(layer, "weight_function")]
    for layer in layers:
        layer.weight_function.append(torch.clone)
    yield
    for layer in layers:
        layer.weight_function.remove(torch.clone)


@of_all_families
@pytest.mark.parametrize("side", [SIDE, 88])
def test_weights_that_are_prepared_for_each_use_give_the_same_gradient(mini_sd, side):
    """88 pixels are 11, 6 and 3 cells: strided convolutions leave out a row or do not."""
    model, clip, _ = mini_sd
    ordinary = gradients(model, clip, side=side)
    with prepared(model.model.diffusion_model, clip.cond_stage_model):
        made = gradients(model, clip, side=side)
    assert ordinary[0] == pytest.approx(made[0], rel=1e-5)
    for a, b in zip(ordinary[1:], made[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("way", ["ordinary", "prepared"])
def test_no_copy_of_a_weight_is_saved_for_the_backward_pass(mini_sd, way):
    model, clip, _ = mini_sd
    with torch.inference_mode(False), torch.enable_grad():
        predict = denoiser(model, clip)
        modules = predict.model.model.diffusion_model, predict.clip.cond_stage_model
        weights = [p for module in modules for p in module.parameters() if p.ndim > 1]
        shapes = {tuple(p.shape)[::way] for p in weights for way in (1, -1)}
        storages = {p.untyped_storage().data_ptr() for p in weights}
        saved = []
        with (
            prepared(*(modules if way == "prepared" else ())),
            differentiable(*modules),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            total_loss(predict(*vectors(clip), BATCH)).backward()
    of_weights = [t for t in saved if tuple(t.shape) in shapes]
    if way == "prepared":
        assert saved and not of_weights
    else:
        assert of_weights
        assert all(t.untyped_storage().data_ptr() in storages for t in of_weights)


@of_all_families
def test_maps_and_batches_line_up(mini_sd):
    """Two samples in one batch are what they are alone, each at its own stage."""
    model, clip, _ = mini_sd
    with torch.inference_mode(False), torch.no_grad():
        predict = denoiser(model, clip)
        keys, values = vectors(clip, False)
        both = predict(keys, values, Batch([0, 1], [0, 0], [100, 900], 5))
        with differentiable():
            for row, timestep in enumerate((100, 900)):
                alone = Batch([row], [0], [timestep], 5)
                target = both.target[row : row + 1]
                again = predict(keys, values, alone)
                if row == 0:
                    torch.testing.assert_close(again.target, target)
                    torch.testing.assert_close(again.output, both.output[:1], rtol=1e-3, atol=1e-4)
        at_a_quarter = [layer.size for layer in both.layers].count((4, 4))
        assert at_a_quarter == 3
        assert both.placeholder.tolist() == [[0.0] * 4 + [1.0] + [0.0] * 72] * 2
        for layer in both.layers:
            torch.testing.assert_close(
                layer.target.sum(dim=-1), torch.ones_like(layer.target.sum(dim=-1))
            )


@of_all_families
def test_with_the_class_words_own_vectors_both_maps_are_equal(mini_sd):
    model, clip, _ = mini_sd
    with torch.inference_mode(False), torch.no_grad():
        predict = denoiser(model, clip)
        from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding

        words = class_word_embedding(clip, "person")
        same = {encoder: rows.expand(5, -1, -1) for encoder, rows in words.items()}
        prediction = predict(same, same, BATCH)
    assert prediction.layers
    for layer in prediction.layers:
        torch.testing.assert_close(layer.target, layer.reference, rtol=1e-4, atol=1e-6)


# --- nothing is left behind -----------------------------------------------------------------


def snapshot(*models):
    """Weights byte by byte (what a checkpoint lacks may hold NaN), and who asks for gradients."""
    return [
        (
            {name: _bytes(tensor).clone() for name, tensor in model.state_dict().items()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        )
        for model in models
    ]


def _bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def assert_untouched(before, *models):
    for (weights, asking), model in zip(before, models, strict=True):
        after = model.state_dict()
        assert weights.keys() == after.keys()
        for name, stored in weights.items():
            assert torch.equal(stored, _bytes(after[name])), name
        for name, parameter in model.named_parameters():
            assert parameter.grad is None, name
            assert parameter.requires_grad == asking[name], name
        for name, module in model.named_modules():
            assert "forward" not in vars(module), name


class Stop(Exception):
    pass


def run_training(model, clip, vae, on_step=None, **settings):
    generator = torch.Generator().manual_seed(0)
    photos = pair_photos([torch.rand(1, 80, 72, 3, generator=generator)], None)
    chosen = TrainingSettings(
        **{
            "steps": 3,
            "resolution": SIDE,
            "preview_every": 2,
            "captions": (),
            "stages": 2,
            **settings,
        }
    )
    with torch.inference_mode():
        return train_identity(model, clip, vae, photos, "anna", "person", chosen, on_step=on_step)


@of_all_families
@pytest.mark.parametrize("ending", ["end", "exception", "cancel", "unload"])
def test_training_leaves_the_models_as_they_were(model_and_clip_with_lora, ending):
    model, clip, vae = model_and_clip_with_lora
    modules = model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model
    comfy.model_management.unload_all_models()
    before = snapshot(*modules)
    patches = len(model.patches), len(clip.patcher.patches)

    def on_step(step):
        if step.number == 2:
            if ending == "exception":
                raise Stop
            if ending == "cancel":  # noticed by the first layer of the next step
                comfy.model_management.interrupt_current_processing()
            if ending == "unload":
                comfy.model_management.unload_all_models()

    if ending == "exception":
        with pytest.raises(Stop):
            run_training(model, clip, vae, on_step)
    elif ending == "cancel":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run_training(model, clip, vae, on_step)
    else:
        run_training(model, clip, vae, on_step)
    comfy.model_management.unload_all_models()
    assert_untouched(before, *modules)
    assert (len(model.patches), len(clip.patcher.patches)) == patches
    assert not model.model_options["transformer_options"]


def test_an_unload_in_mid_training_changes_nothing(model_and_clip_with_lora):
    model, clip, vae = model_and_clip_with_lora
    plain = run_training(model, clip, vae)
    unloaded = run_training(
        model, clip, vae, lambda step: comfy.model_management.unload_all_models()
    )
    for part in ("key_vectors", "value_vectors"):
        torch.testing.assert_close(getattr(plain.identity, part), getattr(unloaded.identity, part))


def test_memory_is_asked_for_what_a_step_computes(mini_sd, monkeypatch):
    """Not for all photos: ComfyUI would make room that nobody uses, at every step."""
    model, clip, _ = mini_sd
    asked = []
    required = denoiser_module.memory_of_a_step
    monkeypatch.setattr(
        denoiser_module,
        "memory_of_a_step",
        lambda patcher, shape, again: asked.append(shape) or required(patcher, shape, again),
    )
    predict = denoiser(model, clip)
    with torch.inference_mode(False), torch.no_grad():
        predict(*vectors(clip, False), Batch([0, 1, 0], [0] * 3, [300] * 3, 7))
        predict(*vectors(clip, False), BATCH)
    assert [shape[0] for shape in asked] == [1, 3, 1]


def test_in_dynamic_vram_a_model_is_prepared_once(mini_sd, monkeypatch):
    """Loading it again would go through every module; a CPU only pretends to have it."""
    model, clip, _ = mini_sd
    predict = denoiser(model, clip)
    loads = []
    monkeypatch.setattr(type(model), "is_dynamic", lambda _: True)
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda models, **_: loads.append(models)
    )
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(2):
            predict(*vectors(clip, False), BATCH)
    assert all(models == [predict.clip.patcher] for models in loads)  # by ComfyUI, to encode
    monkeypatch.setattr(comfy.model_management, "loaded_models", lambda: [predict.clip.patcher])
    predict.load(1)
    assert loads[-1] == [predict.model, predict.clip.patcher]


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "GroupNorm", "LayerNorm"])
def test_cast_buffers_of_a_sampler_can_be_used(kind, monkeypatch):
    """ComfyUI keeps the buffers that it casts offloaded weights into; samplers make them."""
    arguments = {"Linear": (4, 4), "Conv2d": (4, 4, 1), "GroupNorm": (2, 4), "LayerNorm": (4,)}
    layer = getattr(comfy.ops.manual_cast, kind)(*arguments[kind])
    layer.requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.rand(2, 4, *((3, 4) if kind != "Linear" else ()))
    wanted = x.clone().requires_grad_()
    layer(wanted).square().sum().backward()
    with torch.inference_mode():
        buffers = [torch.empty_like(parameter) for parameter in layer.parameters()]

    def cast(layer, like, **_):
        for buffer, tensor in zip(buffers, (layer.weight, layer.bias), strict=True):
            buffer.copy_(tensor)
        return *buffers, None

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    layer.weight_function = [lambda weight: weight]  # as a layer with a LoRA or offloaded weights
    found = x.clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad(), differentiable(layer):
        layer(found).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def test_a_training_shares_all_cast_buffers_with_samplers(mini_sd, monkeypatch):
    """Of text encoder, autoencoder and U-Net; expressions and samples go through them too."""
    expected = run(mini_sd, steps=1, captions="auto")
    buffers = {}
    real = comfy.ops.cast_bias_weight

    def cast(layer, *args, offloadable=False, **options):
        found = real(layer, *args, **options)
        with torch.inference_mode():
            made = [None if one is None else torch.empty_like(one) for one in found]
        kept = buffers.setdefault((layer, *(one.dtype for one in made if one is not None)), made)
        for buffer, tensor in zip(kept, found, strict=True):
            if buffer is not None:
                buffer.copy_(tensor)
        return (*kept, None) if offloadable else tuple(kept)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    model, clip, vae = mini_sd
    for module in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model):
        for layer in module.modules():
            if hasattr(layer, "weight_function"):  # as one whose weights are offloaded
                monkeypatch.setattr(layer, "weight_function", [lambda weight: weight])
    found = run(mini_sd, steps=1, captions="auto")
    assert same(found[0], expected[0]) and found[1] == expected[1]
    kinds = {type(layer).__name__ for layer, *_ in buffers}
    assert kinds >= {"Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding"}
