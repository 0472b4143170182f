"""Training a mapping against ComfyUI's loaded model, on random miniatures."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import comfy.utils
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.encoder_training import (
    Checkpoint,
    MappingTask,
    load_checkpoint,
    preparation,
)
from sefi_ide.sefi_core.comfyui.learning import denoiser
from sefi_ide.sefi_core.comfyui.learning.differentiable import differentiable
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import read_face_encoder
from sefi_ide.sefi_core.face2diffusion.networks import EncoderShape
from sefi_ide.sefi_core.face2diffusion.training.data import Record, prepared, read_records
from sefi_ide.sefi_core.face2diffusion.training.loops import Log, fit
from sefi_ide.sefi_core.face2diffusion.training.settings import EncoderTraining
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tools import train_encoder
from sefi_ide.tools.comfyui import REPOSITORY, comfyui_path

from .random_checkpoint import of_all_families, of_families
from .training_runs import load

SMALL = EncoderTraining(
    shape=EncoderShape("cnn", widths=(4, 6)),
    crop="head",
    resolution=64,
    encoder_steps=2,
    encoder_batch=4,
    mapping_steps=3,
    mapping_batch=4,
    mapping_learning_rate=0.01,
    dropout=0.0,
    validate_every=2,
    validation_people=1,
)


def changed(**changes):
    return EncoderTraining(**{**SMALL.as_json(), **changes})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Drawn people with masks, and captions, as JSON lines."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    lines = []
    for person in range(6):
        colour = rng.integers(0, 255, 3)
        for number in range(2):
            pixels = np.full((72, 64, 3), 40 * number, np.uint8)
            pixels[20:50, 16:46] = colour
            mask = np.zeros((72, 64), np.uint8)
            mask[20:50, 16:46] = 255
            name = f"{person}_{number}"
            Image.fromarray(pixels).save(folder / f"{name}.png")
            Image.fromarray(mask).save(folder / f"{name}_mask.png")
            told = {"person": str(person), "file": f"{name}.png", "mask": f"{name}_mask.png"}
            lines.append({**told, "caption": ["", "smiling"][number]})
    lines[0]["expression"] = [0.5] * 64
    (folder / "faces.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "faces.jsonl"


@pytest.fixture(scope="module")
def checkpoint(mini_checkpoint):
    return Checkpoint(*load(mini_checkpoint))


def task_of(checkpoint, photos, folder, settings=SMALL) -> MappingTask:
    faces = prepared(read_records(photos), preparation(settings, checkpoint), folder / "cache", {})
    learn, test = faces.split(settings.validation_people, settings.seed)
    torch.manual_seed(0)
    encoder = settings.shape.build().eval().requires_grad_(False)
    return MappingTask(checkpoint, encoder, settings.shape, learn, test, settings)


def train(task, folder, steps=3, **options):
    with differentiable(*task.frozen_modules):
        return fit(
            task, steps, task.settings.mapping_batch, 0, folder / "state.safetensors",
            Log(folder), task.settings.validate_every, **options,
        )  # fmt: skip


@pytest.fixture
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@of_all_families
@pytest.mark.parametrize("position_free", (True, False))
def test_before_the_first_step_it_predicts_the_class_word(
    checkpoint, photos, tmp_path, family, position_free, gradients
):
    """Applied, the prediction draws the prompt of the template as the class word does."""
    settings = changed(position_free=position_free)
    task = task_of(checkpoint, photos, tmp_path, settings)
    predicted = task._identity_of(task._data[1], 0)
    assert predicted.position_free == position_free and predicted.vectors == 2
    model, clip, _ = checkpoint
    with torch.inference_mode():
        _, applied = apply_identity(model, clip, AppliedIdentity(predicted))
        found = applied.encode_from_tokens(applied.tokenize("a photo of <name>"))
        plain = clip.encode_from_tokens(clip.tokenize("a photo of person person"))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_it_learns_in_half_precision_as_in_full(checkpoint, photos, tmp_path, gradients):
    losses = {}
    for dtype, scale in (("fp32", 1.0), ("bf16", 1.0), ("fp16", 2.0**16)):
        task = task_of(checkpoint, photos, tmp_path, changed(dtype=dtype))
        assert task.loss_scale == scale
        losses[dtype] = train(task, tmp_path / dtype, 4)
    assert losses["fp32"][-1] < losses["fp32"][0]
    for dtype in ("bf16", "fp16"):
        assert (
            losses[dtype] == pytest.approx(losses["fp32"], rel=0.05)
            and losses[dtype] != losses["fp32"]
        )


@of_all_families
@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"class_guided": True, "masked": False, "captions": False},
        {"keys_apart": True, "stages": 3, "position_free": False, "another_photo": True},
    ),
    ids=("masked", "published", "per stage"),
)
def test_it_learns_and_changes_nothing_else(
    checkpoint, photos, tmp_path, family, changes, gradients
):
    settings = changed(**changes)
    task = task_of(checkpoint, photos, tmp_path, settings)
    frozen = [
        {name: value.clone() for name, value in module.state_dict().items()}
        for module in task.frozen_modules
    ]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    assert all(name.startswith("mapping.") for name in before)
    with differentiable(*task.frozen_modules), torch.no_grad():
        first = float(task.eval()([0, 1, 2, 3], [1, 2, 3, 4]))
        task.train()
    train(task, tmp_path, 6)
    with differentiable(*task.frozen_modules), torch.no_grad():
        last = float(task.eval()([0, 1, 2, 3], [1, 2, 3, 4]))
    assert last < first
    for output in task.mapping.outputs:
        key = f"mapping.{output.name}.fc_out.bias"
        assert not torch.equal(before[key], task.state_dict()[key])
    for module, values in zip(task.frozen_modules, frozen, strict=True):
        for name, value in module.state_dict().items():
            # What no checkpoint fills may be anything, such as NaN.
            assert torch.equal(value.nan_to_num(), values[name].nan_to_num()), name
        assert all(parameter.grad is None for parameter in module.parameters())
    figures = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [f["step"] for f in figures if "validation_loss" in f] == [2, 4, 6]

    encoder = task.face_encoder()
    keys, values = encoder.predict(torch.zeros(1, 3, 112, 112))
    stages = settings.stages
    word = class_word_embedding(checkpoint.clip, "person")
    assert {name: tuple(rows.shape) for name, rows in keys.items()} == {
        name: (stages, 2, rows.shape[1]) for name, rows in word.items()
    }
    assert settings.keys_apart != all(torch.equal(keys[n], values[n]) for n in keys)
    Identity("anna", "person", family, keys, values, position_free=encoder.position_free)


def test_an_expression_tells_only_when_it_is_not_left_out(checkpoint, photos, tmp_path, gradients):
    never, always = (
        task_of(
            checkpoint, photos, tmp_path, changed(expression_dropout=share, validation_people=0)
        )
        for share in (0.0, 1.0)
    )
    for one in (never, always):
        with torch.no_grad():  # before the first step nothing tells
            one.mapping.get_submodule("l_both_0").fc_out.weight.fill_(0.01)
        one.train()
    with differentiable(*never.frozen_modules), torch.no_grad():
        told, silent = (float(one([0], [5])) for one in (never, always))
        assert told != silent
        assert float(never([1], [5])) == float(always([1], [5]))  # of which nothing is known


def test_it_goes_on_as_if_it_had_never_stopped(
    checkpoint, photos, tmp_path, gradients, monkeypatch
):
    from sefi_ide.sefi_core.face2diffusion.training import loops

    settings = changed(dropout=0.1)
    whole = task_of(checkpoint, photos, tmp_path, settings)
    losses = train(whole, tmp_path / "whole", 4)
    monkeypatch.setattr(loops, "SAVE_SECONDS", -1.0)

    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task_of(checkpoint, photos, tmp_path, settings), tmp_path / "parts", 4, on_step=stop)
    rest = task_of(checkpoint, photos, tmp_path, settings)
    assert train(rest, tmp_path / "parts", 4) == losses[2:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


@pytest.fixture
def portrait(tmp_path):
    """A photo with a face right of its middle, without a mask."""
    file = tmp_path / "portrait.png"
    Image.fromarray(drawn(320, 0.3, (0.5, 0.0))).save(file)
    return Record("a", file)


PUBLISHED_LOSS = {"masked": False, "class_guided": True, "crop": "aligned"}


@of_families("sd1")
def test_the_head_is_found_for_class_guided_regularisation_too(checkpoint, portrait):
    masked, guided, neither = (
        preparation(changed(**{**PUBLISHED_LOSS, **changes}), checkpoint)(portrait)
        for changes in (
            {"masked": True, "class_guided": False},
            {},
            {"class_guided": False},
        )
    )
    assert neither["mask"].float().mean() == 255
    assert 10 < guided["mask"].float().mean() < 200
    for name, value in masked.items():
        assert torch.equal(value, guided[name]), name
    assert not torch.equal(guided["latent"], neither["latent"])


@of_families("sd1")
def test_what_class_guided_regularisation_asks_for_is_kept_apart(checkpoint, portrait, tmp_path):
    """And where nothing else is asked for than by earlier versions, their caches are used."""
    lines = tmp_path / "faces.jsonl"
    lines.write_text(json.dumps({"person": "a", "file": portrait.file.name}))

    def kept(**changes):
        settings = changed(**{**PUBLISHED_LOSS, **changes})
        with torch.inference_mode(False):
            return train_encoder.faces_of(lines, tmp_path, settings, checkpoint)

    cache = tmp_path / "cache"
    earlier = {"crop": "aligned", "masked": False, "resolution": 64, "family": "sd1"}
    prepared(read_records(lines), preparation(changed(crop="aligned"), None), cache, earlier)
    assert kept().tensors["mask"].float().mean() < 200
    files = set(cache.iterdir())
    assert len(files) == 2
    kept(masked=True), kept(masked=True, class_guided=False)
    assert set(cache.iterdir()) == files
    kept(class_guided=False)
    assert set(cache.iterdir()) == files


@of_families("sd1")
def test_a_mask_is_put_into_its_photos_size_or_left_out_with_a_sentence(
    checkpoint, portrait, tmp_path, caplog
):
    whole = np.zeros((320, 320), np.uint8)
    whole[80:240, 200:320] = 255
    records = []
    for name, pixels in (
        ("whole", whole),
        ("half", whole[::2, ::2]),
        ("odd", whole[:319]),
        ("other", whole[:160]),
        ("black", np.zeros_like(whole)),
        ("faint", np.full_like(whole, 1)),
    ):
        file = tmp_path / f"mask_{name}.png"
        Image.fromarray(pixels).save(file)
        records.append(Record(name, portrait.file, file))
    for settings in (SMALL, changed(crop="aligned")):
        caplog.clear()
        prepare = preparation(settings, checkpoint)
        faces = prepared(records, prepare, tmp_path / settings.crop, {})
        assert [record.person for record in faces.records] == ["whole", "half", "odd"]
        first, *others = faces.tensors["mask"].float()
        for other in others:
            assert (first - other).abs().mean() < 8
        assert "mask_other.png is 320 x 160 pixels and the photo 320 x 320: give" in caplog.text
        for name in ("black", "faint"):
            assert f"mask_{name}.png marks nothing: make the head white" in caplog.text


@of_families("sd1")
def test_a_mapping_does_not_go_on_for_another_encoder(
    mini_checkpoint, photos, tmp_path, monkeypatch
):
    """Which it would without a step, to write the wrong file."""
    checkpoint = load_checkpoint(mini_checkpoint)

    def train(**changes):
        settings = changed(**changes)
        with torch.inference_mode(False), torch.enable_grad():
            train_encoder.train_encoder(photos, tmp_path, settings)
        return train_encoder.train_mapping(photos, tmp_path, settings, checkpoint)

    assert len(train()) == 3
    assert train() == []
    assert len(train(mapping_steps=4)) == 1
    with pytest.raises(SeFiError, match="mapping_state.* with another face encoder: remove it"):
        train(encoder_steps=3, mapping_steps=4)
    (tmp_path / "mapping_state.safetensors").unlink()
    assert len(train(encoder_steps=3)) == 3
    with pytest.raises(SeFiError, match="with another position_free: remove it"):
        train(encoder_steps=3, position_free=False)
    with pytest.raises(SeFiError, match="encoder_state.* with another list of people: remove it"):
        train(validation_people=0)


def test_only_the_first_process_writes_the_log(photos, tmp_path, monkeypatch):
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        train_encoder.train_encoder(photos, tmp_path / rank, SMALL)
        assert (tmp_path / rank / "encoder" / "log.jsonl").exists() == written


@of_families("sd1")
def test_a_file_that_is_no_checkpoint_is_one_sentence(mini_checkpoint, tmp_path):
    weights = comfy.utils.load_torch_file(mini_checkpoint)
    vae = {name: value for name, value in weights.items() if not name.startswith("first_stage")}
    assert len(vae) < len(weights)
    damaged = (tmp_path / "damaged.safetensors", tmp_path / "text.safetensors")
    with open(mini_checkpoint, "rb") as file:
        damaged[0].write_bytes(file.read(100_000))
    damaged[1].write_text("no checkpoint")
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, foreign)
    for file in (tmp_path / "missing.safetensors", *damaged, foreign):
        with pytest.raises(SeFiError, match=f"{file.name} cannot be loaded as a checkpoint .*give"):
            load_checkpoint(file)
    safetensors.torch.save_file(vae, tmp_path / "no_vae.safetensors")
    with pytest.raises(SeFiError, match="lacks U-Net, text encoder or VAE: give a whole"):
        load_checkpoint(tmp_path / "no_vae.safetensors")


def test_a_family_that_is_not_known_is_one_sentence(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "comfy.sd.load_checkpoint_guess_config", lambda *_, **__: (*checkpoint, None)
    )
    monkeypatch.setattr(Checkpoint, "family", "SDXLRefiner")
    with pytest.raises(SeFiError, match="is a SDXLRefiner: give a checkpoint of one of sd1, sd2"):
        load_checkpoint(tmp_path / "refiner.safetensors")


def test_a_mapping_without_an_encoder_is_one_sentence(photos, tmp_path):
    with pytest.raises(SeFiError, match="encoder_state.safetensors is not there: train an encoder"):
        train_encoder.trained_encoder(tmp_path, SMALL)
    train_encoder.train_encoder(photos, tmp_path, SMALL)
    train_encoder.trained_encoder(tmp_path, SMALL)
    other = changed(shape={"kind": "cnn", "widths": [5]})
    with pytest.raises(SeFiError, match="holds no encoder of the shape that is set .*: give the"):
        train_encoder.trained_encoder(tmp_path, other)
    (tmp_path / "encoder_state.safetensors").write_text("damaged")
    with pytest.raises(SeFiError, match="holds no encoder of the shape that is set .*: give the"):
        train_encoder.trained_encoder(tmp_path, SMALL)


@of_families("sd1")
def test_features_come_from_another_photo_and_from_the_own_where_there_is_no_other(
    checkpoint, photos, tmp_path, gradients
):
    settings = changed(another_photo=True, validation_people=0, mapping_batch=1)
    prepare = preparation(settings, checkpoint)
    faces = prepared(read_records(photos), prepare, tmp_path / "cache", {})
    faces = faces.of(range(len(faces) - 1))  # the last person has one photo
    encoder = settings.shape.build().eval().requires_grad_(False)
    task = MappingTask(checkpoint, encoder, settings.shape, faces, faces.of([]), settings)
    rows = torch.arange(len(faces)).float()[:, None].expand(-1, settings.shape.features)
    task._data[0] = task._data[0]._replace(features=rows.contiguous())
    seen = []
    task.mapping.register_forward_pre_hook(lambda _, given: seen.append(int(given[0][0, 0])))
    with differentiable(*task.frozen_modules), torch.no_grad():
        for row in (0, 3, len(faces) - 1):
            for seed in range(6):
                task.train()([row], [seed])
    assert seen == [1] * 6 + [2] * 6 + [len(faces) - 1] * 6


@of_families("sd1")
def test_a_class_word_of_more_tokens_than_vectors_is_refused(
    checkpoint, photos, tmp_path, gradients
):
    said = "the class word 'young woman' has 2 tokens and there are 1 vectors .*: set vectors to 2"
    with pytest.raises(SeFiError, match=said):
        task_of(checkpoint, photos, tmp_path, changed(class_word="young woman", vectors=1))
    task = task_of(checkpoint, photos, tmp_path, changed(class_word="young woman", vectors=2))
    assert task.plain.vectors == 2


@of_families("sd1")
def test_prompts_with_the_class_word_are_forgotten_where_they_take_too_much_room(
    checkpoint, photos, tmp_path, gradients, monkeypatch
):
    settings = changed(class_guided=True, validation_people=0)
    found = {}
    for room in (2**30, 0):
        monkeypatch.setattr(denoiser, "REFERENCE_BYTES", room)
        task = task_of(checkpoint, photos, tmp_path, settings)
        with differentiable(*task.frozen_modules), torch.no_grad():
            losses = [float(task.eval()([row], [row])) for row in (0, 1, 2, 3)]
        found[room] = losses, len(task._data[0].denoiser.references)
    assert found[0][0] == found[2**30][0]
    assert (found[2**30][1], found[0][1]) == (2, 1)


@of_families("sd1")
def test_latents_of_another_vae_are_made_anew(mini_checkpoint, photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    checkpoint = Checkpoint(*load(mini_checkpoint))
    first = checkpoint.vae_digest
    weights = checkpoint.vae.first_stage_model.state_dict()
    decoder, encoder = (
        next(value for name, value in weights.items() if f"{part}." in name)
        for part in ("decoder", "encoder")
    )
    with torch.inference_mode():
        decoder.add_(0.1)
        assert checkpoint.vae_digest == first
        train_encoder.faces_of(photos, tmp_path, SMALL, checkpoint)
        train_encoder.faces_of(photos, tmp_path, SMALL, checkpoint)
        assert caplog.text.count("photos are prepared.") == 1
        encoder.add_(0.1)
        train_encoder.faces_of(photos, tmp_path, SMALL, checkpoint)
    assert caplog.text.count("photos are prepared.") == 2


PROGRAM = """
import runpy, sys, torch, json
start = runpy.run_path({tool!r})
start["start"](cpu=True, prefix="sefi-test-")
from pathlib import Path
from sefi_ide.tests.comfy import random_checkpoint
random_checkpoint.register()
from sefi_ide.tools.train_encoder import train_mapping
from sefi_ide.sefi_core.comfyui.encoder_training import load_checkpoint
from sefi_ide.sefi_core.face2diffusion.training.settings import EncoderTraining
settings = EncoderTraining(**json.loads({settings!r}))
losses = train_mapping(
    Path({photos!r}), Path({output!r}), settings, load_checkpoint(Path({checkpoint!r})),
    Path({encoder!r}),
)
Path({losses!r}).write_text(json.dumps(losses))
"""


@of_families("sd1")
def test_two_processes_have_the_losses_of_one(
    checkpoint, mini_checkpoint, photos, tmp_path, family, gradients
):
    pytest.importorskip("accelerate")
    task = task_of(checkpoint, photos, tmp_path)
    from sefi_ide.sefi_core.face2diffusion.files import write_face_encoder

    write_face_encoder(task.face_encoder(), tmp_path / "encoder.safetensors")
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
                encoder=str(tmp_path / "encoder.safetensors"),
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
        read_face_encoder(output / "face_encoder.safetensors")
    assert len(found[1]) == 3
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5)
    assert found[1][0] != found[1][1]
