"""Photos, caches, states and checkpoints of the training of face encoders."""

from __future__ import annotations

import json
import logging

import comfy.utils
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sefi_ide.sefi_core.comfyui.encoder_training import Checkpoint, load_checkpoint, preparation
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import write_face_encoder
from sefi_ide.sefi_core.face2diffusion.training.data import Record, prepared, read_records
from sefi_ide.tests.unit.face2diffusion_files import encoder_for
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tools import train_encoder

from . import encoder_runs
from .encoder_runs import SMALL, changed
from .random_checkpoint import of_families
from .training_runs import load

photos, checkpoint = encoder_runs.photos, encoder_runs.checkpoint


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


def test_an_encoder_that_looks_at_something_else_is_refused(checkpoint, photos, tmp_path):
    path = tmp_path / "own.safetensors"
    write_face_encoder(encoder_for("sd1", {"l": 8}), path)
    said = "own.safetensors looks at a crop of the kind aligned, and head is set: give --set"
    with pytest.raises(SeFiError, match=said):
        train_encoder.train_mapping(photos, tmp_path, SMALL, checkpoint, path)


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
