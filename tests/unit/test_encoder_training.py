"""Settings, data and loops of the training of face encoders, without a Stable Diffusion."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
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
    parse_changes,
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


def line(**changes):
    return json.dumps({"person": "a", "file": "b", **changes})


@pytest.mark.parametrize(
    ("line", "said"),
    (
        ("{", "Expecting"),
        ("[1]", "it is no JSON object"),
        ("3", "it is no JSON object"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"person": "a"}', "it has no file"),
        ('{"file": "a"}', "it has no person"),
        (line(person=None), "person is 'None'"),
        (line(person=""), "person is ''"),
        (line(person=True), "person is 'True'"),
        (line(person=["a"]), "person is"),
        (line(file=None), "file is 'None'"),
        (line(mask=3), "mask is '3'"),
        (line(caption=["a"]), "caption is"),
        (line(expression=[1]), "expression is no list of 64 numbers"),
        (line(expression="1" * 64), "expression is no list of 64 numbers"),
        (line(expression=[[1]] * 64), "float"),
        (line(expression=[math.nan] * 64), "too large, or NaN"),
        (line(expression=[1e300] + [0] * 63), "too large, or NaN"),
        (line(expression=[10**400] + [0] * 63), "too large"),
    ),
)
def test_a_line_that_is_no_photo_is_named(tmp_path, line, said):
    lines = tmp_path / "faces.jsonl"
    lines.write_text('{"person": "a", "file": "b"}\n' + line)
    with pytest.raises(SeFiError, match=rf"line 2 of .* is no photo \(.*{said}.*\): write"):
        read_records(lines)


def test_lines_end_where_json_lines_end_and_may_begin_with_a_mark(tmp_path):
    lines = tmp_path / "faces.jsonl"
    ends = "\u2028 \u2029 \x85 \x1c"
    told = json.dumps({"person": "a", "file": "b", "caption": f"on{ends}grass"}, ensure_ascii=False)
    for text, number in ((told, 1), (f"{told}\r\n{told}\n", 2)):
        lines.write_bytes(b"\xef\xbb\xbf" + text.encode())
        found = read_records(lines)
        assert [(one.person, one.caption) for one in found] == [("a", "on grass")] * number


@pytest.mark.parametrize("suffix", ("jpg", "png", "webp"))
def test_a_photo_is_read_upright(tmp_path, suffix):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8] = 200
    file = tmp_path / f"phone.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(file, exif=exif, quality=95)
    found = read_picture(file)
    assert found.shape == (24, 16, 3) and found[:6].mean() > 0.7 and found[10:].mean() < 0.1
    Image.fromarray(pixels).save(file, quality=95)
    with Image.open(file) as plain:
        wanted = torch.from_numpy(np.array(plain.convert("RGB"))).float() / 255
    assert torch.equal(read_picture(file), wanted)


def test_caches_of_ordinary_photos_stay_and_those_of_turned_ones_do_not(tmp_path):
    """The key of an earlier version: settings, then the content of photos and masks."""
    exif = Image.Exif()

    def earlier(record):
        sha = hashlib.sha256(json.dumps({"crop": "head"}, sort_keys=True).encode())
        for file in (record.file, record.mask):
            sha.update(hashlib.sha256(file.read_bytes()).digest() if file else b"-")
        return sha.hexdigest()[:32]

    def stays(record):
        folder = tmp_path / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        prepared([record], lambda _: {"crop": torch.ones(1)}, folder, {"crop": "head"})
        return [file.stem for file in folder.iterdir()] == [earlier(record)]

    photo(tmp_path, "mask.png"), photo(tmp_path, "plain.jpg"), photo(tmp_path, "plain.png")
    small = tmp_path / "small.png"
    Image.new("L", (10, 8)).save(small)
    for orientation, name in ((1, "upright.jpg"), (8, "turned.jpg"), (3, "turned.png")):
        exif[0x0112] = orientation
        Image.new("RGB", (20, 16)).save(tmp_path / name, exif=exif)
    for name in ("plain.jpg", "plain.png", "upright.jpg"):
        assert stays(Record("a", tmp_path / name))
        assert stays(Record("a", tmp_path / name, tmp_path / "mask.png"))
        assert not stays(Record("a", tmp_path / name, small))
        assert not stays(Record("a", tmp_path / name, tmp_path / "turned.png"))
    for name in ("turned.jpg", "turned.png"):
        assert not stays(Record("a", tmp_path / name))


@pytest.mark.parametrize("left", (0, 100, -1))
def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path, caplog, left):
    records = [Record("a", photo(tmp_path, "a.png"))]

    def again():
        return prepared(
            records, lambda record: {"crop": read_picture(record.file)}, tmp_path / "cache", {}
        )

    first = again()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    assert torch.equal(again().tensors["crop"], first.tensors["crop"])
    assert "cannot be read" in caplog.text and file.read_bytes() == whole


def test_what_other_weights_made_is_made_anew_and_what_does_not_say_is_used(tmp_path):
    records = [Record("a", photo(tmp_path, "a.png"))]

    def value(now, made_with):
        made = {"crop": torch.full((1,), float(now))}
        found = prepared(records, lambda _: made, tmp_path / "cache", {}, made_with)
        return float(found.tensors["crop"])

    assert value(1, "") == 1.0
    assert value(2, "one") == 1.0  # of an earlier version
    next((tmp_path / "cache").iterdir()).unlink()
    assert value(3, "one") == 3.0
    assert value(4, "one") == 3.0
    assert value(5, "other") == 5.0


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
        ('{"another_photo": "no"}', "another_photo is 'no': set it to true or false"),
        ('{"shape": "cnn"}', "shape is 'cnn': write a JSON object"),
        ('{"shape": null}', "shape is 'None': write a JSON object"),
        ('{"template": "a photo"}', "has the placeholder 0 times"),
        ('{"template": "<name> and <name>"}', "has the placeholder 2 times"),
        ('{"template": 3}', "template is '3': write a text"),
        ('{"validation_prompt": null}', "validation_prompt is 'None': write a text"),
        ('{"class_word": ""}', "the class word '' is no word"),
        ('{"class_word": 3}', "the class word '3' is no word"),
        ("[" * 100_000, "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(SeFiError, match=said):
            read_settings(file, {})
    assert parse_changes(["template=" + "[" * 100_000])["template"].startswith("[[")
    file.write_bytes(b'\xef\xbb\xbf{"vectors": 3}')
    assert read_settings(file, {}).vectors == 3
