"""Photos that face encoders are trained with, and the caches of what was made of them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.training.data import (
    Faces,
    Record,
    prepared,
    read_picture,
    read_records,
)
from sefi_ide.tests.unit.coloured_faces import faces


def photo(folder, name, colour=(10, 20, 30)):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).save(file)
    return file


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
