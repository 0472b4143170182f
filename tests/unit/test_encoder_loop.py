"""The loop that trains face encoders, its states and its precision, without a Stable Diffusion."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.networks import EncoderShape
from sefi_ide.sefi_core.face2diffusion.training.data import Faces
from sefi_ide.sefi_core.face2diffusion.training.identification import Identification
from sefi_ide.sefi_core.face2diffusion.training.loops import Log, batch_of, fit
from sefi_ide.sefi_core.face2diffusion.training.settings import EncoderTraining
from sefi_ide.tests.unit.coloured_faces import faces
from sefi_ide.tests.unit.half_gradients import ThroughHalf

SMALL = EncoderTraining(
    shape=EncoderShape("cnn", widths=(4, 6)),
    encoder_steps=6,
    encoder_batch=8,
    encoder_learning_rate=0.05,
    margin=0.2,
    scale=8.0,
    validate_every=3,
    validation_people=2,
)


def task(seed=0):
    torch.manual_seed(seed)
    learn, test = faces(people=10).split(SMALL.validation_people, SMALL.seed)
    return Identification(SMALL.shape.build(), learn, test, SMALL)


def train(folder, steps, stop_at=None):
    def on_step(step, loss):
        if step == stop_at:
            raise KeyboardInterrupt

    one = task()
    losses = fit(
        one, steps, SMALL.encoder_batch, 0, folder / "state.safetensors", Log(folder), 3, on_step
    )
    return one, losses


def test_an_encoder_learns_to_tell_people_apart(tmp_path):
    _, losses = train(tmp_path, 40)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    figures = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [f["step"] for f in figures if "loss" in f] == [10, 20, 30, 40]
    auc = [figure["identification_auc"] for figure in figures if "identification_auc" in figure]
    assert len(auc) == 14 and auc[-1] > 0.9  # every third step, and the last


def test_it_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    from sefi_ide.sefi_core.face2diffusion.training import loops

    whole, losses = train(tmp_path / "whole", 6)
    monkeypatch.setattr(loops, "SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 6, stop_at=4)
    rest, more = train(tmp_path / "parts", 6)
    assert more == losses[4:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_a_state_of_another_training_is_refused(tmp_path):
    train(tmp_path, 2)
    other = Identification(
        EncoderShape("cnn", widths=(5,)).build(), *faces(people=10).split(2, 0),
        EncoderTraining(shape=EncoderShape("cnn", widths=(5,))),
    )  # fmt: skip
    with pytest.raises(SeFiError, match="is no state of this training .*: remove it"):
        fit(other, 3, 8, 0, tmp_path / "state.safetensors", Log(tmp_path), 3)


def test_a_state_that_depended_on_something_else_is_refused(tmp_path):
    train(tmp_path, 2)
    state = tmp_path / "state.safetensors"
    one = task()
    one.faces = Faces(
        [replace(record, person=f"{record.person}!") for record in one.faces.records],
        one.faces.tensors,
    )
    said = "of a training with another list of people: remove it to begin anew, or choose another"
    with pytest.raises(SeFiError, match=said):
        fit(one, 3, 8, 0, state, Log(tmp_path), 3)
    one = task()
    one.settings = replace(SMALL, crop="head")
    with pytest.raises(SeFiError, match="with another crop: remove it"):
        fit(one, 3, 8, 0, state, Log(tmp_path), 3)
    # Those of earlier versions do not say it.
    with safe_open(state, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, state, {"step": "2", "loss_scale": "1.0"})
    assert len(fit(one, 3, 8, 0, state, Log(tmp_path), 3)) == 1


@pytest.mark.parametrize(("then", "now"), ((1.0, 2.0**16), (2.0**16, 1.0)))
def test_a_scale_of_another_precision_is_not_gone_on_with(tmp_path, then, now):
    trained_in_half(tmp_path, then)
    learn, test = faces(people=10).split(SMALL.validation_people, SMALL.seed)
    one = Half(SMALL.shape.build(), learn, test, SMALL)
    one.scale = now
    fit(one, 5, 8, 0, tmp_path / "state.safetensors", Log(tmp_path), 9)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert float(file.metadata()["loss_scale"]) == now


class Two:
    """As two processes, without starting any."""

    count, is_first, accelerator = 2, True, None

    def __init__(self, cpu):
        pass


def test_a_photo_for_each_process_is_refused_where_there_are_batch_norms(tmp_path, monkeypatch):
    from sefi_ide.sefi_core.face2diffusion.training import loops

    monkeypatch.setattr(loops, "Processes", Two)
    said = "a batch of 2 leaves each process one photo, and batch norms need two: set 4 or more"
    with pytest.raises(SeFiError, match=said):
        fit(task(), 3, 2, 0, tmp_path / "state.safetensors", Log(tmp_path), 3)


def test_accelerate_neither_scales_the_loss_nor_leaves_the_cpu(monkeypatch):
    """Whatever the user's default configuration of it says."""
    from sefi_ide.sefi_core.face2diffusion.training.loops import Processes

    class Accelerator:
        def __init__(self, **options):
            self.options = options

    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(Accelerator=Accelerator))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for cpu in (True, False):
        assert Processes(cpu).accelerator.options == {"mixed_precision": "no", "cpu": cpu}


class Half(Identification):
    """As one whose model is in half precision."""

    scale = 1.0
    calls = 0

    @property
    def loss_scale(self):
        return self.scale

    def forward(self, rows, seeds):
        self.calls += 1
        return ThroughHalf.apply(super().forward(rows, seeds))


def trained_in_half(folder, scale):
    torch.manual_seed(0)
    learn, test = faces(people=10).split(SMALL.validation_people, SMALL.seed)
    one = Half(SMALL.shape.build(), learn, test, SMALL)
    one.scale = scale
    losses = fit(one, 4, 8, 0, folder / "state.safetensors", Log(folder), 9)
    return one, losses


def test_the_loss_scale_saves_small_gradients_and_changes_no_step(tmp_path):
    _, exact = train(tmp_path / "exact", 4)
    _, lost = trained_in_half(tmp_path / "lost", 1.0)
    _, scaled = trained_in_half(tmp_path / "scaled", 2.0**16)
    assert scaled == pytest.approx(exact, rel=5e-3)
    assert lost[0] == exact[0] and abs(lost[-1] - exact[-1]) > 10 * abs(scaled[-1] - exact[-1])


def test_an_overflow_halves_the_scale_and_repeats_the_step(tmp_path):
    _, exact = train(tmp_path / "exact", 4)
    one, losses = trained_in_half(tmp_path / "high", 2.0**46)
    assert losses == pytest.approx(exact, rel=5e-3)
    assert one.calls > 4
    with safe_open(tmp_path / "high" / "state.safetensors", "pt") as file:
        assert 1 < float(file.metadata()["loss_scale"]) < 2.0**46
    again = one.calls
    fit(one, 5, 8, 0, tmp_path / "high" / "state.safetensors", Log(tmp_path), 9)
    assert one.calls == again + 1  # with the scale that was found


@pytest.mark.parametrize(("dtype", "scale"), [("bf16", 1.0), ("fp16", 2.0**16)])
def test_an_encoder_learns_in_half_precision_as_in_full(tmp_path, dtype, scale):
    slowly = replace(SMALL, encoder_learning_rate=1e-3)  # else rounding soon leads elsewhere
    losses = {}
    for chosen in ("fp32", dtype):
        one = task()
        one.settings = replace(slowly, dtype=chosen)
        state = tmp_path / f"{chosen}.safetensors"
        losses[chosen] = fit(one, 6, SMALL.encoder_batch, 0, state, Log(tmp_path), 9)
    assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses[dtype] != losses["fp32"] and one.loss_scale == scale
    assert {value.dtype for value in one.parameters()} == {torch.float32}


def test_batches_follow_from_the_step_alone():
    first = batch_of(5, 100, 8, seed=1)
    assert first == batch_of(5, 100, 8, seed=1)
    assert first != batch_of(6, 100, 8, seed=1) != batch_of(6, 100, 8, seed=2)
    assert all(0 <= row < 100 for row, _ in first)
