"""SeFi Train Identities as ComfyUI runs it: photos and folders of many people."""

from __future__ import annotations

import folder_paths
import numpy as np
import pytest
import skimage.data
import torch
from comfy_api.latest import io
from PIL import Image
from sefi_ide.nodes.train_identities import SeFiTrainIdentities
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity

from .training_runs import HIDDEN, load, photo_and_mask

NODE = SeFiTrainIdentities


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


@pytest.fixture
def inputs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    return tmp_path


def run(models, **changes):
    inputs = dict(zip(("model", "clip", "vae"), models, strict=True))
    for widget in NODE.GET_SCHEMA().inputs:
        if getattr(widget, "default", None) is not None:
            inputs[widget.id] = widget.default
    inputs |= {"steps": 2, "resolution": 64, "captions": "", "find_heads": False, **changes}
    inputs = {key: value if isinstance(value, list) else [value] for key, value in inputs.items()}
    node = NODE.PREPARE_CLASS_CLONE(HIDDEN)
    with torch.inference_mode():
        identities, report = node.EXECUTE_NORMALIZED(**inputs).result
    return identities, report.split("\n")


def saved(folder, name, shade=1.0):
    picture = (photo_and_mask()[0][0].numpy() * 255 * shade).astype(np.uint8)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)


def test_photos_are_people_with_their_names(models):
    picture, mask = photo_and_mask()
    found, report = run(
        models,
        photos=[torch.cat([picture, picture * 0.5]), picture * 0.2],
        masks=[mask, mask, mask],
        names="anna\nben\ncarla",
        captions="smiling\n\nin the snow",
        together=2,
    )
    assert [one.name for one in found] == ["anna", "ben", "carla"]
    assert [one.training["captions"] for one in found] == [["smiling"], [""], ["in the snow"]]
    assert report == ["<anna>: learned", "<ben>: learned", "<carla>: learned"]
    assert all(isinstance(one, Identity) and one.thumbnail for one in found)
    assert not torch.equal(found[0].key_vectors["l"], found[2].key_vectors["l"])


def test_without_names_they_are_numbered(models):
    found, _ = run(models, photos=[photo_and_mask()[0].repeat(2, 1, 1, 1)])
    assert [one.name for one in found] == ["person_1", "person_2"]


def test_a_folder_has_files_and_subfolders_of_people(models, inputs_folder):
    saved(inputs_folder, "people/ben.png", 0.6)
    saved(inputs_folder, "people/anna/1.png"), saved(inputs_folder, "people/anna/2.jpg", 0.8)
    saved(inputs_folder, "people/no name.png")
    (inputs_folder / "people" / "notes.txt").write_text("")
    (inputs_folder / "people" / "broken.png").write_bytes(b"no picture")
    (inputs_folder / "people" / "empty").mkdir()
    found, report = run(models, folder="people")
    assert [(one.name, one.training["photos"]) for one in found] == [("anna", 2), ("ben", 1)]
    assert report[0] == "<anna>: learned"
    assert report[1] == "<ben>: learned"
    assert report[2].startswith("<broken>: ") and "cannot be read as a picture" in report[2]
    assert report[3].startswith("<no name>: the name 'no name' cannot be used")
    state = NODE.fingerprint_inputs(folder=["people"])
    assert state == NODE.fingerprint_inputs(folder=["people"])
    saved(inputs_folder, "people/ben.png", 0.1)
    assert state != NODE.fingerprint_inputs(folder=["people"])


def test_two_of_one_name_in_a_folder_are_told(models, inputs_folder):
    for name in ("anna.png", "anna.jpg", "ben/1.png", "ben.png", "carla.png"):
        saved(inputs_folder, f"people/{name}")
    found, report = run(models, folder="people", captions="smiling\n")
    assert [(one.name, one.training["captions"]) for one in found] == [("carla", ["smiling"])]
    assert "<anna>: anna.jpg and anna.png would be one name: put photos of one" in report[0]
    assert "<ben>: ben and ben.png would be one name" in report[1]


def test_an_empty_line_at_the_end_of_captions_is_none(models):
    found, _ = run(
        models, photos=[photo_and_mask()[0].repeat(2, 1, 1, 1)], captions="smiling\nsad\n\n"
    )
    assert [one.training["captions"] for one in found] == [["smiling"], ["sad"]]


def test_heads_are_found_and_who_has_none_is_told(models):
    astronaut = torch.from_numpy(skimage.data.astronaut().copy())[None].float() / 255
    found, report = run(
        models,
        photos=[astronaut, torch.zeros(1, 64, 64, 3)],
        names="eileen\nnobody",
        find_heads=True,
    )
    assert [one.name for one in found] == ["eileen"]
    assert report[1].startswith("<nobody>: no face was found")


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({}, "there are no photos: connect photos, or name a folder"),
        ({"folder": "../out"}, "is no folder in"),
        ({"folder": "nothing"}, "is no folder in"),
        ({"folder": "a\0b"}, "is no folder in"),
        ({"folder": 5000 * "a"}, "is no folder in"),
        ({"folder": "void"}, "has no photos"),
        ({"photos": True, "folder": "void"}, "photos and folder are both given"),
        ({"photos": True, "names": "a\nb"}, "names has 2 lines for 1 photos"),
        ({"photos": True, "captions": "a\nb"}, "captions has 2 lines for 1 photos"),
        ({"photos": True, "names": "a b"}, "nobody could be learned: <a b>: the name"),
        ({"photos": True, "together": 0}, "together"),
    ),
)
def test_a_mistake_is_one_sentence(models, inputs_folder, changes, said):
    (inputs_folder / "void").mkdir()
    if changes.get("photos"):
        changes = {**changes, "photos": photo_and_mask()[0]}
    with pytest.raises(SeFiError, match=f"^SeFi Train Identities: .*{said}"):
        run(models, **changes)


def test_a_folder_that_is_not_there_is_refused_before_the_run(inputs_folder):
    (inputs_folder / "people").mkdir()
    assert NODE.validate_inputs(folder=["people"]) is True
    assert NODE.validate_inputs(folder=[""]) is NODE.validate_inputs() is True
    for name in ("other", "a\0b", 5000 * "a"):
        assert "is no folder in" in NODE.validate_inputs(folder=[name])


def test_its_settings_are_those_of_train_identity():
    from sefi_ide.nodes.train_identity import SeFiTrainIdentity

    mine, its = (
        {one.id: one for one in node.GET_SCHEMA().inputs} for node in (NODE, SeFiTrainIdentity)
    )
    shared = set(mine) & set(its)
    assert {"steps", "seed", "stages", "learning_rate", "templates", "dtype"} <= shared
    for name in shared - {"model", "clip", "vae", "photos", "masks", "class_word", "captions"}:
        assert mine[name].as_dict() == its[name].as_dict()
    assert isinstance(mine["folder"], io.String.Input)
