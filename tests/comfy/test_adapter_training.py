"""Training a face adapter against ComfyUI's loaded model, on random miniatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import comfy.sample
import numpy as np
import pytest
import torch
from PIL import Image
from sefi_ide.sefi_core.comfyui.adapter_training import AdapterTask, Recogniser, preparation
from sefi_ide.sefi_core.comfyui.encoder_training import Checkpoint
from sefi_ide.sefi_core.comfyui.face_embedding import open_embedder
from sefi_ide.sefi_core.comfyui.learning.differentiable import differentiable
from sefi_ide.sefi_core.comfyui.unet.adapter import add_beside
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import write_face_encoder
from sefi_ide.sefi_core.face2diffusion.training.data import Faces, Record, prepared, read_records
from sefi_ide.sefi_core.face2diffusion.training.loops import Log, fit
from sefi_ide.sefi_core.face2diffusion.training.settings import parse_changes, settings_of
from sefi_ide.sefi_core.face_adapter.files import (
    FACEID,
    INFINITE_ID,
    PLUS_V2,
    read_face_adapter,
    write_face_adapter,
)
from sefi_ide.sefi_core.face_adapter.training.pairs import partners, with_partners
from sefi_ide.sefi_core.face_adapter.training.settings import PUBLISHED, AdapterTraining
from sefi_ide.sefi_core.injection import Beside
from sefi_ide.tests.comfy.vision import vision_model
from sefi_ide.tests.unit.face2diffusion_files import encoder_for
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tools import train_adapter
from sefi_ide.tools.comfyui import REPOSITORY, comfyui_path

from .random_checkpoint import of_all_families, of_families
from .training_runs import load

SMALL = AdapterTraining(
    resolution=64, steps=3, batch=4, learning_rate=0.01, validate_every=2, validation_people=1,
    depth=1,
)  # fmt: skip


def changed(**changes):
    return AdapterTraining(**{**SMALL.as_json(), **changes})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Drawn people with masks, and captions, as JSON lines; the last has one photo only."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    lines = []
    for person in range(7):
        tint = rng.uniform(0.5, 1.0, 3)
        for number in range(2 if person < 6 else 1):
            name = f"{person}_{number}"
            pixels = np.roll(drawn(96), 3 * number, axis=1) * tint
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
            mask = np.zeros((96, 96), np.uint8)
            mask[10:90, 10:90] = 255
            Image.fromarray(mask).save(folder / f"{name}_mask.png")
            told = {"person": str(person), "file": f"{name}.png", "mask": f"{name}_mask.png"}
            lines.append({**told, "caption": ["", "smiling"][number]})
    (folder / "faces.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "faces.jsonl"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "faces.safetensors"
    write_face_encoder(encoder_for("sd1", {"l": 8}, crop="head"), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(mini_checkpoint):
    return Checkpoint(*load(mini_checkpoint))


@pytest.fixture
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


def task_of(checkpoint, photos, encoder, folder, settings=SMALL) -> AdapterTask:
    vision = vision_model() if settings.variant != FACEID else None
    recogniser = Recogniser(*open_embedder(encoder), vision)
    prepare = preparation(settings, checkpoint, recogniser)
    kept = {"family": checkpoint.family, "variant": settings.variant}
    faces = with_partners(prepared(read_records(photos), prepare, folder / "cache", kept))
    learn, test = faces.split(settings.validation_people, settings.seed)
    return AdapterTask(checkpoint, recogniser, learn, test, settings)


def train(task, folder, steps=3, **options):
    with differentiable(*task.frozen_modules):
        return fit(
            task, steps, task.settings.batch, 0, folder / "state.safetensors",
            Log(folder), task.settings.validate_every, **options,
        )  # fmt: skip


@of_all_families
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": False},
        {"variant": PLUS_V2, "captions": False},
        {"variant": INFINITE_ID, "text": False},
    ],
    ids=str,
)
def test_it_learns_and_changes_nothing_else(
    checkpoint, photos, encoder, tmp_path, family, changes, gradients
):
    settings = changed(**changes)
    task = task_of(checkpoint, photos, encoder, tmp_path, settings)
    frozen = [
        {name: value.clone() for name, value in module.state_dict().items()}
        for module in task.frozen_modules
    ]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    assert all(name.startswith(("projection.", "to_k.", "to_v.")) for name in before)
    unet = checkpoint.model.model.diffusion_model.state_dict()
    key = "middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    assert torch.equal(before[f"to_v.{len(task.to_v) - 1}.weight"], unet[key].float())
    with differentiable(*task.frozen_modules), torch.no_grad():
        first = float(task.eval()([0, 1, 2, 3], [1, 2, 3, 4]))
        task.train()
    losses = train(task, tmp_path, 8)
    with differentiable(*task.frozen_modules), torch.no_grad():
        last = float(task.eval()([0, 1, 2, 3], [1, 2, 3, 4]))
    assert len(losses) == 8 and last < first
    for name, value in task.state_dict().items():
        assert not torch.equal(before[name], value), name
    for module, values in zip(task.frozen_modules, frozen, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value.nan_to_num(), values[name].nan_to_num()), name
        assert all(parameter.grad is None for parameter in module.parameters())
    figures = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    validated = [figure for figure in figures if "validation_loss" in figure]
    assert [figure["step"] for figure in validated] == [2, 4, 6, 8]
    for figure in validated:
        assert figure["validation_loss"] != figure["validation_loss_without_face"]

    write_face_adapter(task.face_adapter(), tmp_path / "a.safetensors", settings.as_json())
    again = read_face_adapter(tmp_path / "a.safetensors")
    assert (again.variant, again.family, again.with_text) == (
        settings.variant, family, settings.text,
    )  # fmt: skip
    assert again.embedder.file == encoder.name and len(again.layers) == len(task.blocks)


@of_all_families
@pytest.mark.parametrize("text", [True, False])
def test_the_trained_prediction_is_the_sampled_one(
    checkpoint, photos, encoder, tmp_path, text, gradients
):
    """One step of a sampler with the adapter predicts what the loss was taken of."""
    task = task_of(checkpoint, photos, encoder, tmp_path, changed(text=text, captions=False))
    data = task._data[0]
    assert data is not None
    with torch.no_grad():
        tokens = task.tokens(data, [1, 1], [True, False])
        keys, values = ([layer(tokens) for layer in layers] for layers in (task.to_k, task.to_v))
    patches = {block: task._attend(tokens[:1], n) for n, block in enumerate(task.blocks)}
    from sefi_ide.sefi_core.learning.loop import Batch

    with differentiable(*task.frozen_modules), torch.no_grad():
        output, target = data.denoiser.predict_class_word(
            {"patches_replace": {"attn2": patches}}, Batch([0], [0], [600], 5)
        )
        noised = data.denoiser._noised([0], [Batch([0], [0], [600], 5)])
        sampling = data.denoiser.sampling
        trained = sampling.calculate_denoised(noised.sigma, output, noised.x)
    assert output.shape == target.shape
    beside = Beside(
        {block: (k, v) for block, k, v in zip(task.blocks, keys, values, strict=True)},
        with_text=text,
    )
    seen = []
    with torch.inference_mode():
        model = add_beside(checkpoint.model, beside)
        clip = checkpoint.clip
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of person"))
        format_ = model.get_model_object("latent_format")
        sigma = float(noised.sigma[0])
        x = noised.x
        noise = (x - 0) / 1  # handed over as it is
        model.set_model_sampler_post_cfg_function(
            lambda arguments: seen.append(arguments["denoised"]) or arguments["denoised"]
        )
        sampler = comfy.samplers.KSAMPLER(_once(x))
        comfy.sample.sample_custom(
            model, noise, 1.0, sampler, torch.tensor([sigma, 0.0]), positive, positive,
            torch.zeros_like(x) / format_.scale_factor, disable_pbar=True,
        )  # fmt: skip
    torch.testing.assert_close(seen[0], trained, atol=2e-4, rtol=2e-4)


def _once(x):
    def sample(model, noised, sigmas, extra_args=None, callback=None, disable=None):
        return model(x, sigmas[:1].expand(len(x)), **(extra_args or {}))

    return sample


def test_a_face_comes_from_another_photo(caplog):
    records = [Record(name, None) for name in ("a", "b", "a", "c", "a", "b")]
    faces = Faces(records, {"latent": torch.arange(6)})
    kept = with_partners(faces)
    assert [record.person for record in kept.records] == ["a", "b", "a", "a", "b"]
    assert kept.tensors["latent"].tolist() == [0, 1, 2, 4, 5]
    assert "1 photos are left out" in caplog.text
    assert partners(kept.people) == [[2, 3], [4], [0, 3], [0, 2], [1]]
    with pytest.raises(SeFiError, match="nobody has two photos or more: give"):
        with_partners(faces.of([0, 1, 3]))


def test_settings(tmp_path):
    published = settings_of(AdapterTraining, PUBLISHED, {})
    assert (published.variant, published.text, published.steps) == (INFINITE_ID, False, 10**6)
    assert (published.batch, published.learning_rate, published.weight_decay) == (64, 1e-4, 0.01)
    changes = parse_changes(["steps=5", "variant=plus", "text=false"])
    assert settings_of(AdapterTraining, None, changes) == AdapterTraining(
        steps=5, variant="plus", text=False
    )
    for change, said in (
        ({"variant": "portrait"}, "variant is 'portrait': choose one of faceid"),
        ({"text": "yes"}, "text is 'yes'"),
        ({"drop": 2.0}, "drop is 2.0"),
        ({"speed": 1}, "there is no setting speed: choose from"),
        ({"batch": 0}, "batch is 0"),
        ({"template": "a photo"}, "has the placeholder 0 times"),
        ({"template": None}, "template is 'None': write a text"),
        ({"validation_prompt": 3}, "validation_prompt is '3': write a text"),
        ({"class_word": ""}, "the class word '' is no word"),
        ({"class_word": ["person"]}, "is no word"),
    ):
        with pytest.raises(SeFiError, match=said):
            settings_of(AdapterTraining, None, change)


@of_families("sd1")
def test_a_variant_that_looks_at_pictures_needs_a_clip(checkpoint, encoder):
    with pytest.raises(SeFiError, match="the variant plus v2 looks at pictures: give a CLIP"):
        preparation(changed(variant=PLUS_V2), checkpoint, Recogniser(*open_embedder(encoder)))
    with pytest.raises(SeFiError, match="is no face recogniser that is known by its name: give"):
        open_embedder(encoder.with_name("other.onnx"))


@of_families("sd1")
def test_it_goes_on_as_if_it_had_never_stopped(
    checkpoint, photos, encoder, tmp_path, gradients, monkeypatch
):
    from sefi_ide.sefi_core.face2diffusion.training import loops

    whole = task_of(checkpoint, photos, encoder, tmp_path)
    losses = train(whole, tmp_path / "whole", 4)
    monkeypatch.setattr(loops, "SAVE_SECONDS", -1.0)

    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task_of(checkpoint, photos, encoder, tmp_path), tmp_path / "parts", 4, on_step=stop)
    rest = task_of(checkpoint, photos, encoder, tmp_path)
    assert train(rest, tmp_path / "parts", 4) == losses[2:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def recogniser_of(path, clip=None):
    return Recogniser(*open_embedder(path), clip)


@of_families("sd1")
def test_an_adapter_does_not_go_on_for_another_recogniser_or_clip(
    checkpoint, photos, encoder, tmp_path, gradients
):
    other = tmp_path / "other.safetensors"
    write_face_encoder(encoder_for("sd1", {"l": 8}, crop="head", seed=6), other)
    plus = changed(variant=PLUS_V2)

    def task(path, settings=SMALL, seed=0):
        clip = vision_model(seed=seed) if settings.looks_at_pictures else None
        recogniser = recogniser_of(path, clip)
        prepare = preparation(settings, checkpoint, recogniser)
        faces = prepared(read_records(photos), prepare, tmp_path / str(seed) / path.stem, {})
        learn, test = with_partners(faces).split(settings.validation_people, settings.seed)
        return AdapterTask(checkpoint, recogniser, learn, test, settings)

    assert len(train(task(encoder), tmp_path)) == 3
    assert train(task(encoder), tmp_path) == []
    with pytest.raises(SeFiError, match="state.safetensors .* with another face recogniser: rem"):
        train(task(other), tmp_path)
    with pytest.raises(SeFiError, match="with another list of people: remove it"):
        train(task(encoder, changed(validation_people=0)), tmp_path)
    (tmp_path / "plus").mkdir()
    assert len(train(task(encoder, plus, 1), tmp_path / "plus")) == 3
    assert train(task(encoder, plus, 1), tmp_path / "plus") == []
    with pytest.raises(SeFiError, match="with another CLIP vision model: remove it"):
        train(task(encoder, plus, 2), tmp_path / "plus")


@of_families("sd1")
def test_what_another_clip_sees_is_kept_apart(checkpoint, photos, encoder, tmp_path):
    def kept(seed, variant):
        recogniser = recogniser_of(encoder, vision_model(seed=seed))
        settings = changed(variant=variant)
        with torch.inference_mode(False):
            faces = train_adapter.faces_of(photos, tmp_path, settings, checkpoint, recogniser)
        return faces.tensors.get("states"), {file.name for file in (tmp_path / "cache").iterdir()}

    one, first = kept(0, PLUS_V2)
    again, files = kept(0, PLUS_V2)
    assert torch.equal(one, again) and files == first
    other, files = kept(1, PLUS_V2)
    assert not torch.equal(one, other) and len(files) == 2
    kept(0, FACEID)
    assert len(kept(1, FACEID)[1]) == 3  # which no CLIP has to do with


def test_a_recogniser_that_is_not_there_is_one_sentence(tmp_path):
    for name in ("missing.safetensors", "w600k_r50.onnx", "missing.onnx"):
        with pytest.raises(SeFiError, match=f"{name} .*: give the path"):
            train_adapter.open_recogniser(tmp_path / name)
    (tmp_path / "damaged.safetensors").write_text("damaged")
    with pytest.raises(SeFiError, match="damaged.safetensors cannot be used as a face encoder"):
        train_adapter.open_recogniser(tmp_path / "damaged.safetensors")


PROGRAM = """
import runpy, sys, torch, json
start = runpy.run_path({tool!r})
start["start"](cpu=True, prefix="sefi-test-")
from pathlib import Path
from sefi_ide.tests.comfy import random_checkpoint
random_checkpoint.register()
from sefi_ide.tools import train_adapter
from sefi_ide.sefi_core.face_adapter.training.settings import AdapterTraining
settings = AdapterTraining(**json.loads({settings!r}))
checkpoint = train_adapter.load_checkpoint(Path({checkpoint!r}))
recogniser = train_adapter.open_recogniser(Path({encoder!r}))
output = Path({output!r})
with torch.inference_mode(False):
    faces = train_adapter.faces_of(Path({photos!r}), output, settings, checkpoint, recogniser)
losses = train_adapter.train_adapter(faces, output, settings, checkpoint, recogniser)
Path({losses!r}).write_text(json.dumps(losses))
"""


@of_families("sd1")
def test_two_processes_have_the_losses_of_one(mini_checkpoint, photos, encoder, tmp_path):
    pytest.importorskip("accelerate")
    found = {}
    for count in (1, 2):
        output = tmp_path / f"of {count}"
        output.mkdir()
        program = tmp_path / f"program{count}.py"
        program.write_text(
            PROGRAM.format(
                tool=str(REPOSITORY / "tools" / "comfyui.py"),
                settings=json.dumps(changed(validate_every=100).as_json()),
                photos=str(photos),
                output=str(output),
                checkpoint=mini_checkpoint,
                encoder=str(encoder),
                losses=str(output / "losses.json"),
            )
        )
        launch = [sys.executable, str(program)]
        if count > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                      "--nproc_per_node", "2", str(program)]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                       "COMFYUI_PATH": str(comfyui_path())}  # fmt: skip
        ended = subprocess.run(launch, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found[count] = json.loads((output / "losses.json").read_text())
        read_face_adapter(output / "face_adapter.safetensors")
    assert len(found[1]) == 3
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5)
    assert found[1][0] != found[1][1]
