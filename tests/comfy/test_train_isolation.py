"""A training and the models: foreign patches stay out, stops in mid-step leave nothing behind."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.sd import CLIP
from sefi_ide.sefi_core.comfyui.learning import pace, showing
from sefi_ide.sefi_core.comfyui.learning.differentiable import differentiable
from sefi_ide.sefi_core.comfyui.learning.pictures import LOSS_TIMESTEPS
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.learning.photos import pair_photos
from sefi_ide.sefi_core.learning.settings import TrainingSettings

from .random_checkpoint import of_all_families
from .training_runs import photo_and_mask, run, same, with_lora


def contents(*modules):
    """All bits and attributes of modules that could tell that somebody was there."""
    bits = [
        {name: tensor.detach().clone().view(torch.uint8) if tensor.ndim else tensor.clone()
         for name, tensor in module.state_dict().items()}
        for module in modules
    ]  # fmt: skip
    attributes = [
        [(name, sorted(vars(layer))) for name, layer in named]
        for named in (module.named_modules() for module in modules)
    ]
    gradients = [
        (parameter.requires_grad, parameter.grad)
        for module in modules
        for parameter in module.parameters()
    ]
    return bits, attributes, gradients


def assert_same_contents(before, after):
    for one, other in zip(before[1], after[1], strict=True):
        for layer, again in zip(one, other, strict=True):
            assert layer == again
    assert before[2] == after[2]
    for one, other in zip(before[0], after[0], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


class Boom(Exception):
    pass


SECOND_STEP = len(LOSS_TIMESTEPS) + 2
"""Of the passes of the U-Net: those that look at the photo come first."""


@of_all_families
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("what", ["cancel", "exception", "unload"])
def test_a_stop_in_the_middle_of_a_step_harms_nothing(mini_sd, what, where):
    base, base_clip, vae = mini_sd
    model, clip = with_lora(base, base_clip)
    modules = model.model.diffusion_model, clip.cond_stage_model
    with torch.inference_mode():  # ComfyUI marks the layers when it loads a model
        comfy.model_management.load_models_gpu([model, clip.patcher])
    comfy.model_management.unload_all_models()
    before = contents(*modules)
    patches = dict(model.patches), dict(clip.patcher.patches)
    middle = model.model.diffusion_model.middle_block[1]
    calls = []

    def strike(*_):
        calls.append(what)
        if len(calls) != SECOND_STEP:
            return
        if what == "cancel":
            comfy.model_management.interrupt_current_processing()
        elif what == "unload":
            comfy.model_management.unload_all_models()
        else:
            raise Boom

    def on_forward(module, args, output):
        if where == "forward":
            strike()
        elif output.requires_grad:
            output.register_hook(strike)
        else:
            calls.append("look")

    hook = middle.register_forward_hook(on_forward)
    expected = {"cancel": comfy.model_management.InterruptProcessingException, "exception": Boom}
    try:
        if what in expected:
            with pytest.raises(expected[what]):
                run((model, clip, vae), steps=5, seed=1)
        else:
            run((model, clip, vae), steps=5, seed=1)
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == SECOND_STEP or what == "unload"
    comfy.model_management.unload_all_models()
    assert_same_contents(before, contents(*modules))
    assert patches == (dict(model.patches), dict(clip.patcher.patches))


def test_patches_of_other_nodes_are_left_out_and_left_alone(mini_sd):
    model, clip, vae = mini_sd
    plain = run((model, clip, vae), steps=2, preview_every=0)[0]
    patched = model.clone()

    calls = []

    def foreign(*args):
        calls.append(args)
        return args[0]

    patched.set_model_attn2_output_patch(foreign)
    patched.set_model_attn2_replace(lambda q, k, v, extra: calls.append(q) or q, "middle", 0)
    patched.set_model_unet_function_wrapper(
        lambda apply_model, options: (
            calls.append(options)
            or apply_model(options["input"], options["timestep"], **options["c"])
        )
    )
    before = repr(patched.model_options)
    steps = []

    def on_step(step):
        steps.append(step)
        assert not calls  # in the training; the sample at the end may use them

    settings = TrainingSettings(
        steps=2,
        stages=5,
        resolution=64,
        preview_every=0,
        templates=("a photo of <name>",),
        captions=(),
    )
    photos = pair_photos([photo_and_mask()[0]], None)
    result = train_identity(patched, clip, vae, photos, "anna", "person", settings, on_step=on_step)
    assert len(steps) == 2
    assert repr(patched.model_options) == before
    assert same(result.identity, plain)


def test_ten_runs_leave_no_more_behind_than_one(mini_sd):
    model, clip, vae = mini_sd
    run(mini_sd, steps=1)

    def traces():
        return (
            repr(model.model_options),
            {kind: len(one) for kind, one in model.wrappers.items()},
            {kind: len(one) for kind, one in model.callbacks.items()},
            sorted(model.object_patches),
            sorted(clip.patcher.object_patches),
            len(comfy.model_management.current_loaded_models),
        )

    once = traces()
    for _ in range(3):
        run(mini_sd, steps=1)
    assert traces() == once


def test_steps_leave_nothing_with_a_lora(mini_sd):
    """ComfyUI keeps objects for each time that a clone of a clone is loaded."""
    model, clip, vae = mini_sd
    models = *with_lora(model, clip), vae

    def kept(steps):
        run(models, steps=steps)
        gc.collect()
        return sum(isinstance(one, weakref.finalize) for one in gc.get_objects())

    kept(2)  # what the first run leaves for good
    one = kept(2)
    few = kept(2) - one
    many = kept(22) - one - few
    assert many <= few


def test_the_differentiable_view_ends_with_its_block(mini_sd):
    model, _, _ = mini_sd
    with torch.inference_mode(False), pytest.raises(Boom), differentiable(model.model):
        raise Boom
    assert not [name for name, layer in model.model.named_modules() if "forward" in vars(layer)]


def test_models_that_are_unloaded_for_one_another(mini_sd, monkeypatch):
    """As with --disable-smart-memory, where loading the text encoder unloads the U-Net."""
    base, base_clip, vae = mini_sd
    models = (*with_lora(base, base_clip), vae)
    expected = run(models, steps=3, seed=2)[0]
    load = CLIP.load_model

    def unload_others_and_load(clip, *args):
        comfy.model_management.unload_all_models()
        return load(clip, *args)

    monkeypatch.setattr(CLIP, "load_model", unload_others_and_load)
    assert same(run(models, steps=3, seed=2)[0], expected)


@pytest.mark.parametrize("where", ["decode", "sample", "map"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("\udce9 of a VAE"),
        SeFiError("vae is broken"),
        comfy.model_management.InterruptProcessingException(),
    ],
    ids=["memory", "value", "sentence", "cancel"],
)
def test_what_was_learned_comes_out_whatever_happens_to_its_report(
    mini_sd, monkeypatch, where, error
):
    expected = run(mini_sd)[0]
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise error

    model, clip, vae = mini_sd
    if where == "decode":
        monkeypatch.setattr(vae, "decode", fail)
    elif where == "sample":
        monkeypatch.setattr(comfy.sample, "sample", fail)
    else:
        whole = showing.look
        answers = iter([whole])  # before the first step; after the last it fails
        monkeypatch.setattr(showing, "look", lambda *a: next(answers, fail)(*a))
    try:
        identity, losses, report = run((model, clip, vae))
        cancelled = comfy.model_management.processing_interrupted()
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert calls and same(identity, expected) and len(losses["loss"]) == 3
    assert report.ndim == 4 and torch.isfinite(report).all() and report.std() > 0
    # What comes after the training is not begun.
    assert cancelled is isinstance(error, comfy.model_management.InterruptProcessingException)


def test_a_preview_that_fails_stops_nothing(mini_sd, monkeypatch):
    monkeypatch.setattr(pace, "PREVIEW_SHARE", 1e9)  # previews may take as long as they like
    expected = run(mini_sd, steps=5)[0]
    model, clip, vae = mini_sd
    decode, pictures = vae.decode, iter([True])

    def fail_once(samples):
        if next(pictures, False):
            raise RuntimeError("CUDA out of memory")
        return decode(samples)

    monkeypatch.setattr(vae, "decode", fail_once)
    identity, _, report = run((model, clip, vae), steps=5, preview_every=1)
    assert next(pictures, None) is None
    assert same(identity, expected) and torch.isfinite(report).all()


def test_numbers_that_are_none_do_not_reach_a_picture(mini_sd, monkeypatch):
    monkeypatch.setattr(pace, "PREVIEW_SHARE", 1e9)
    model, clip, vae = mini_sd
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda samples: decode(samples) * float("nan"))
    identity, _, report = run((model, clip, vae), steps=5, preview_every=1)
    assert same(identity, run(mini_sd, steps=5)[0]) and torch.isfinite(report).all()
