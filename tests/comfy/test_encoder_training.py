"""Training a mapping against ComfyUI's loaded model, on random miniatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.encoder_training import MappingTask, preparation
from sefi_ide.sefi_core.comfyui.learning import denoiser
from sefi_ide.sefi_core.comfyui.learning.differentiable import differentiable
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import read_face_encoder
from sefi_ide.sefi_core.face2diffusion.training.data import prepared, read_records
from sefi_ide.sefi_core.face2diffusion.training.loops import Log, fit
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tools.comfyui import REPOSITORY, comfyui_path

from . import encoder_runs
from .encoder_runs import SMALL, changed
from .random_checkpoint import of_all_families, of_families

photos, checkpoint = encoder_runs.photos, encoder_runs.checkpoint


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
    validated = [figure for figure in figures if "validation_loss" in figure]
    assert [figure["step"] for figure in validated] == [2, 4, 6]
    assert all(0.5 < figure["vector_length"] < 5 for figure in validated)

    encoder = task.face_encoder()
    keys, values = encoder.predict(torch.zeros(1, 3, 112, 112))
    stages = settings.stages
    word = class_word_embedding(checkpoint.clip, "person")
    assert {name: tuple(rows.shape) for name, rows in keys.items()} == {
        name: (stages, 2, rows.shape[1]) for name, rows in word.items()
    }
    assert settings.keys_apart != all(torch.equal(keys[n], values[n]) for n in keys)
    Identity("anna", "person", family, keys, values, position_free=encoder.position_free)


def test_vectors_that_grow_out_of_reach_are_told(checkpoint, photos, tmp_path, gradients, caplog):
    """Their direction hardly changes any more, in the training nor in what refines them."""
    task = task_of(checkpoint, photos, tmp_path)
    with torch.no_grad():
        for output in task.mapping.outputs:
            task.mapping.get_submodule(output.name).fc_out.bias.mul_(40)
    train(task, tmp_path, 2)
    assert "times as long as the class word's" in caplog.text
    assert "lower mapping_learning_rate" in caplog.text


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
