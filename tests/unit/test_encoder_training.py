"""Settings, data and loops of the training of face encoders, without a Stable Diffusion."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.networks import EncoderShape
from sefi_ide.sefi_core.face2diffusion.training.arcface import ArcFace, identification_auc
from sefi_ide.sefi_core.face2diffusion.training.data import (
    Faces,
    Record,
    prepared,
    read_picture,
    read_records,
)
from sefi_ide.sefi_core.face2diffusion.training.identification import Identification
from sefi_ide.sefi_core.face2diffusion.training.loops import Log, batch_of, fit
from sefi_ide.sefi_core.face2diffusion.training.settings import (
    PUBLISHED,
    EncoderTraining,
    read_settings,
)

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


def photo(folder, name, colour=(10, 20, 30)):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).save(file)
    return file


def faces(people=6, each=4):
    """People who differ in colour; each photo is a little different."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(people, 3, 1, 1, generator=generator)
    crops = [
        colours[person] + 0.1 * torch.randn(3, 112, 112, generator=generator)
        for person in range(people)
        for _ in range(each)
    ]
    records = [Record(f"p{number // each}", None) for number in range(people * each)]
    return Faces(records, {"crop": (torch.stack(crops).clamp(0, 1) * 255).to(torch.uint8)})


def test_arcface_adds_the_margin_to_the_own_angle():
    loss = ArcFace(2, 3, margin=0.5, scale=10.0)
    with torch.no_grad():
        angles = torch.tensor([0.0, 1.0, 2.0])
        loss.directions.copy_(torch.stack([angles.cos(), angles.sin()], 1) * 3)
    feature = torch.tensor([[math.cos(0.3), math.sin(0.3)]]) * 7
    logits = [10 * math.cos(0.3 + 0.5), 10 * math.cos(0.7), 10 * math.cos(1.7)]
    wanted = -logits[0] + math.log(sum(map(math.exp, logits)))
    assert loss(feature, torch.tensor([0])).item() == pytest.approx(wanted, rel=1e-5)


def test_arcface_falls_with_the_angle_all_the_way_round():
    """Where the cosine with the margin would turn, too."""
    loss = ArcFace(2, 2, margin=0.5, scale=1.0)
    with torch.no_grad():
        loss.directions.copy_(torch.tensor([[1.0, 0.0], [0.0, 1e-9]]))
    angles = torch.linspace(0.01, 3.13, 200)
    values = [
        loss(torch.tensor([[math.cos(a), math.sin(a)]]), torch.tensor([0])).item() for a in angles
    ]
    own = torch.tensor(values) - torch.tensor(
        [float(torch.logsumexp(torch.tensor([0.0, math.sin(a)]), 0)) for a in angles]
    )
    assert (own.diff() > -0.3).all() and own[-1] > own[0]


def test_the_auc_counts_pairs():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert identification_auc(features, torch.tensor([0, 0, 1, 1])) == 1.0
    assert identification_auc(features, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.25, abs=0.26)
    assert math.isnan(identification_auc(features, torch.tensor([0, 0, 0, 0])))


def test_photos_of_a_folder_and_of_lines(tmp_path):
    photo(tmp_path, "anna/1.png"), photo(tmp_path, "anna/deep/2.jpg"), photo(tmp_path, "bob.png")
    (tmp_path / "anna" / "notes.txt").write_text("no photo")
    found = [(record.person, record.file.name) for record in read_records(tmp_path)]
    assert found == [("anna", "1.png"), ("anna", "2.jpg"), ("bob", "bob.png")]

    lines = tmp_path / "faces.jsonl"
    told = {"person": "anna", "file": "anna/1.png", "caption": " on  the beach ",
            "mask": "bob.png", "expression": [0.5] * 64}  # fmt: skip
    lines.write_text(json.dumps(told) + "\n\n" + json.dumps({"person": 7, "file": "bob.png"}))
    first, second = read_records(lines)
    assert first == Record(
        "anna", tmp_path / "anna/1.png", tmp_path / "bob.png", "on the beach", (0.5,) * 64
    )
    assert second == Record("7", tmp_path / "bob.png")


@pytest.mark.parametrize(
    "line",
    ("{", "[1]", '{"person": "a"}', '{"person": "a", "file": "b", "expression": [1]}', "3"),
)
def test_a_line_that_is_no_photo_is_named(tmp_path, line):
    lines = tmp_path / "faces.jsonl"
    lines.write_text('{"person": "a", "file": "b"}\n' + line)
    with pytest.raises(SeFiError, match=r"line 2 of .* is no photo .*: write"):
        read_records(lines)


def test_an_empty_source_is_one_sentence(tmp_path):
    for source in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(SeFiError, match="give a folder of photos"):
            read_records(source)


def test_what_was_prepared_is_kept_until_a_photo_or_a_setting_changes(tmp_path, caplog):
    records = [Record(name, photo(tmp_path, f"{name}.png")) for name in ("a", "b", "c")]
    asked = []

    def prepare(record):
        asked.append(record.person)
        if record.person == "b":
            raise SeFiError("no face was found")
        return {"crop": read_picture(record.file)}

    def again(settings):
        asked.clear()
        found = prepared(records, prepare, tmp_path / "cache", settings)
        assert [record.person for record in found.records] == ["a", "c"]
        assert len(found) == len(found.tensors["crop"]) == 2
        return list(asked)

    assert again({"crop": "head"}) == ["a", "b", "c"]
    assert "b.png is left out: no face was found" in caplog.text
    assert again({"crop": "head"}) == []
    assert again({"crop": "aligned"}) == ["a", "b", "c"]
    photo(tmp_path, "c.png", (90, 80, 70))
    assert again({"crop": "head"}) == ["a", "b", "c"]
    with pytest.raises(SeFiError, match="none of the photos"):
        prepared(records[1:2], prepare, tmp_path / "cache", {})


def test_people_are_kept_out_whole():
    learn, test = faces(people=10, each=3).split(16, seed=3)
    assert len(test.names) == 2 and len(learn.names) == 8  # at most a fifth
    assert not set(learn.names) & set(test.names)
    assert learn.people.tolist() == [number // 3 for number in range(24)]


def test_expressions_are_not_numbers_where_nothing_is_known():
    told = Faces([Record("a", None, expression=(1.0,) * 64), Record("a", None)], {})
    assert told.expressions[0].tolist() == [1.0] * 64 and told.expressions[1].isnan().all()


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
        EncoderShape("cnn", widths=(5,)).build(), *faces().split(2, 0),
        EncoderTraining(shape=EncoderShape("cnn", widths=(5,))),
    )  # fmt: skip
    with pytest.raises(SeFiError, match="is no state of this training .*: remove it"):
        fit(other, 3, 8, 0, tmp_path / "state.safetensors", Log(tmp_path), 3)


class ThroughHalf(torch.autograd.Function):
    """Gradients that pass through half precision: small ones vanish."""

    gain = 1e-8

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return ((gradient * ThroughHalf.gain).half() / ThroughHalf.gain).float()


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


def test_settings_come_from_a_file_and_from_changes(tmp_path):
    published = read_settings(PUBLISHED, {})
    assert published.shape == EncoderShape() and published.class_guided and not published.masked
    assert (published.margin, published.vectors, published.expression_dropout) == (0.5, 2, 0.2)
    assert read_settings(PUBLISHED, {"vectors": 3}).vectors == 3
    assert read_settings(None, json.loads(json.dumps(published.as_json()))) == published
    file = tmp_path / "settings.json"
    for text, said in (
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ('{"vectors": 0}', "vectors"),
        ('{"speed": 3}', "there is no setting speed: choose from"),
        ('{"shape": {"kind": "rnn"}}', "shape is no shape"),
        ('{"masked": "yes"}', "masked"),
    ):
        file.write_text(text)
        with pytest.raises(SeFiError, match=said):
            read_settings(file, {})
