"""SeFi Load Face Encoder and SeFi Predict Identity: files, crops, predictions, errors."""

from __future__ import annotations

import hashlib
import os
import re

import folder_paths
import numpy as np
import pytest
import torch
from sefi_ide.nodes.predict_identity import SeFiLoadFaceEncoder, SeFiPredictIdentity
from sefi_ide.sefi_core.comfyui import face_encoders
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.faces import mask_faces
from sefi_ide.sefi_core.comfyui.methods import METHODS
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import write_face_encoder
from sefi_ide.sefi_core.faces.alignment import aligned
from sefi_ide.sefi_core.faces.crop import head_square
from sefi_ide.sefi_core.faces.extract import Selection
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.sefi_core.identity.file import from_bytes, to_bytes
from sefi_ide.sefi_core.identity.thumbnail import picture_in
from sefi_ide.tests.unit.face2diffusion_files import (
    encoder_for,
    save_expression,
    save_published,
)
from sefi_ide.tests.unit.face_drawing import WALL, drawn

from .random_checkpoint import of_families, widths
from .training_runs import HIDDEN, load

pytestmark = pytest.mark.usefixtures("inference_mode")

LEFT, RIGHT = (slice(0, 160), slice(160, 320))
"""Columns of :func:`two_faces`."""


@pytest.fixture
def folder(encoder_folder):
    return encoder_folder


def image(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures) / np.float32(255))


def two_faces() -> np.ndarray:
    """A smaller face on the left and a larger one on the right, (160, 320, 3)."""
    return np.concatenate([drawn(160, 0.7), drawn(160, 0.9)], axis=1)


def own(folder, name="faces.safetensors", **changes):
    """A small encoder of this pack, opened by the node."""
    made = {"family": "sd1", "widths": {"l": 8}, **changes}
    write_face_encoder(encoder_for(**made), folder / name)
    return opened(name)


def opened(file, **inputs):
    return SeFiLoadFaceEncoder.execute(file, **inputs).result[0]


def predict(encoder, photos, **inputs):
    """Execute the node as ComfyUI does, every input as a list."""
    given = {"face_encoder": encoder, "name": "anna", **inputs}
    given = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    given["photos"] = photos if isinstance(photos, list) else [photos]
    return SeFiPredictIdentity.PREPARE_CLASS_CLONE(HIDDEN).EXECUTE_NORMALIZED(**given).result


def aligned_in(picture: np.ndarray) -> torch.Tensor:
    """The only face of a picture as published encoders take it, (1, 3, 112, 112)."""
    (face,) = YuNetDetector().detect(picture)
    pixels = torch.from_numpy(aligned(picture, face.points)).float()
    return ((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]


def sha(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_vectors(identity, predicted) -> None:
    for found, wanted in zip(
        (identity.key_vectors, identity.value_vectors), predicted, strict=True
    ):
        assert found.keys() == wanted.keys()
        for name, rows in wanted.items():
            torch.testing.assert_close(found[name], rows, atol=1e-5, rtol=1e-5)


# What is predicted.


def test_the_published_files_predict_two_vectors_of_the_aligned_face(folder):
    save_published(folder)
    encoder = opened("msid.pt")
    photo = drawn(200)
    identity, crops = predict(encoder, image(photo))
    seen = aligned_in(photo)
    torch.testing.assert_close(crops, (seen / 2 + 0.5).movedim(1, -1), atol=1e-6, rtol=0)
    same_vectors(identity, encoder.encoder.predict(seen))
    assert (identity.name, identity.class_word, identity.family) == ("anna", "person", "sd1")
    assert identity.position_free and identity.predicted
    assert (identity.stages, identity.vectors, identity.widths) == (1, 2, {"l": 768})
    assert identity.training == {
        "encoder": "msid.pt",
        "encoder_sha256": sha(folder / "msid.pt")[:16],
        "mapping": "mapping.pt",
        "mapping_sha256": sha(folder / "mapping.pt")[:16],
        "photos": 1,
        "crop": "aligned",
        "with_expression": False,
    }
    thumbnail = picture_in(identity.thumbnail).float()
    assert thumbnail.shape[0] == thumbnail.shape[1] and 64 < len(thumbnail) <= 200
    assert from_bytes(to_bytes(identity), folder / "x").same_content(identity)


def test_features_of_several_photos_are_averaged(folder):
    encoder = own(folder)
    photos = [drawn(160), drawn(160, 0.8, (0.1, 0.1)), drawn(240, 0.6)]
    batch_and_other_size = [image(*photos[:2]), image(photos[2])]
    identity, crops = predict(encoder, batch_and_other_size)
    network = encoder.encoder
    features = [network.encoder(aligned_in(photo)) for photo in photos]
    mean = torch.stack(features).mean(0)
    found = network.mapping(mean)
    wanted = torch.cat([found["l_key_0"][0], found["l_key_1"][0]])
    torch.testing.assert_close(identity.key_vectors["l"][0], wanted, atol=1e-5, rtol=1e-5)
    assert len(crops) == identity.training["photos"] == 3
    alone = [predict(encoder, image(photo))[0] for photo in photos]
    assert all(not torch.equal(one.key_vectors["l"][0], wanted) for one in alone)


@of_families("sd1", "sdxl")
@pytest.mark.parametrize("position_free", (True, False))
def test_it_is_drawn_at_once(folder, family, mini_checkpoint, position_free):
    encoder = own(
        folder, family=family, widths=widths(family), stages=3, position_free=position_free
    )
    identity, _ = predict(encoder, image(drawn(160)), class_word="woman")
    assert (identity.stages, identity.vectors, identity.class_word) == (3, 2, "woman")
    assert (identity.widths, identity.position_free) == (widths(family), position_free)
    model, clip, _ = load(mini_checkpoint)
    _, applied = apply_identity(model, clip, METHODS[identity.kind](identity))
    found, word = (
        one.encode_from_tokens(one.tokenize(f"a photo of {text}"))
        for one, text in ((applied, "<anna>"), (clip, "woman"))
    )
    assert torch.isfinite(found).all() and not torch.allclose(found, word, atol=1e-2)


@of_families("sdxl")
def test_the_published_files_are_for_stable_diffusion_1_only(folder, family, mini_checkpoint):
    save_published(folder)
    identity, _ = predict(opened("msid.pt"), image(drawn(160)))
    model, clip, _ = load(mini_checkpoint)
    with pytest.raises(SeFiError, match=r"<anna> was learned on SD 1\.x .* SDXL .*: load a check"):
        apply_identity(model, clip, METHODS[identity.kind](identity))


# What the encoder sees.


@pytest.mark.parametrize(("side", "index"), ((LEFT, 0), (RIGHT, 1)))
def test_the_face_in_the_mask_is_meant(folder, side, index):
    encoder, photo = own(folder), two_faces()
    wanted = predict(encoder, image(photo), which_face="left to right", face_index=index)
    mask = torch.zeros(1, 160, 320)
    mask[..., side] = 0.7  # a soft mask is one too
    found = predict(encoder, image(photo), masks=mask)
    assert torch.equal(found[1], wanted[1])
    same_vectors(found[0], (wanted[0].key_vectors, wanted[0].value_vectors))
    other = predict(encoder, image(photo), which_face="left to right", face_index=1 - index)
    assert (other[1] - found[1]).abs().mean() > 0.01


def test_without_a_mask_or_in_a_mask_of_both_it_is_the_largest(folder):
    encoder, photo = own(folder), image(two_faces())
    wanted = predict(encoder, photo, which_face="left to right", face_index=1)[1]
    assert torch.equal(predict(encoder, photo)[1], wanted)
    assert torch.equal(predict(encoder, photo, masks=torch.ones(1, 160, 320))[1], wanted)


def test_a_head_encoder_sees_the_square_around_the_mask(folder):
    encoder = own(folder, crop="head")
    photo = torch.rand(1, 200, 300, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 200, 300)
    mask[0, 20:132, 250:280] = 1  # 112 pixels high, near the right border
    identity, crops = predict(encoder, photo, masks=mask)
    torch.testing.assert_close(crops, photo[:, 20:132, 188:300], atol=1e-5, rtol=0)
    same_vectors(identity, encoder.encoder.predict((crops * 2 - 1).permute(0, 3, 1, 2)))
    assert identity.training["crop"] == "head"


def test_a_head_larger_than_the_photo_is_shrunk_whole(folder):
    """A square over both borders, as SeFi Face Mask cuts it: no part of the head is lost."""
    photo = torch.zeros(1, 56, 112, 3)
    photo[:, :, 56:] = 1
    _, crops = predict(own(folder, crop="head"), photo, masks=torch.ones(1, 56, 112))
    assert crops[0, :, :50].max() < 1e-3 and crops[0, :, 62:].min() > 0.999


def test_without_a_mask_it_finds_the_head_that_sefi_face_mask_marks(folder):
    encoder, photo = own(folder, crop="head"), image(two_faces())
    mask = mask_faces(photo, "yunet", Selection(region="head")).masks
    wanted = predict(encoder, photo, masks=mask)
    found = predict(encoder, photo)
    assert torch.equal(found[1], wanted[1])
    left = predict(encoder, photo, which_face="left to right")[1]
    assert (left - found[1]).abs().mean() > 0.01


def test_grey_pictures_and_alpha_are_taken(folder):
    encoder, photo = own(folder), image(drawn(160))
    alpha = torch.cat([photo, torch.zeros_like(photo[..., :1])], -1)
    assert torch.equal(predict(encoder, alpha)[1], predict(encoder, photo)[1])
    grey = photo.mean(-1, keepdim=True)
    assert torch.equal(predict(encoder, grey)[1], predict(encoder, grey.expand_as(photo))[1])


# Expressions.


def test_an_expression_is_read_by_the_users_model_from_the_aligned_face(folder):
    encoder, photo, smiling = own(folder), drawn(160), drawn(160, 0.8)[:, ::-1].copy()
    weight = save_expression(folder / "expression_reader.onnx")
    identity, _ = predict(encoder, image(photo), expression=image(smiling))
    colour = (aligned_in(smiling)[0] / 2 + 0.5).mean((1, 2))
    told = colour @ torch.from_numpy(weight)
    same_vectors(identity, encoder.encoder.predict(aligned_in(photo), told))
    assert identity.training["with_expression"] is True
    without, _ = predict(encoder, image(photo))
    same_vectors(without, encoder.encoder.predict(aligned_in(photo)))
    assert not torch.allclose(without.key_vectors["l"], identity.key_vectors["l"], atol=1e-3)


def test_a_model_of_another_size_sees_the_head(folder):
    encoder, photo, other = own(folder), drawn(160), drawn(320, 0.5)
    weight = save_expression(folder / "expression.onnx", side=64)
    found, _ = predict(encoder, image(photo), expression=image(other))
    (face,) = YuNetDetector().detect(other)
    left, top, side = head_square(face, 0, (320, 320))
    assert 0 < left and 0 < top and max(left, top) + side < 320
    pixels = torch.from_numpy(other[top : top + side, left : left + side] / np.float32(255))
    told = pixels.mean((0, 1)) @ torch.from_numpy(weight)
    for role, wanted in zip(
        (found.key_vectors, found.value_vectors),
        encoder.encoder.predict(aligned_in(photo), told),
        strict=True,
    ):
        torch.testing.assert_close(role["l"], wanted["l"], atol=5e-3, rtol=5e-3)
    aligned_ones = (aligned_in(other)[0] / 2 + 0.5).mean((1, 2)) @ torch.from_numpy(weight)
    assert (aligned_ones - told).abs().max() > 0.1  # the wall is of another colour


@pytest.mark.parametrize(
    ("made", "said"),
    (
        (None, r"expression needs a model that reads expressions, and .* no file expression\*"),
        ({"numbers": 5}, "as 5 numbers, and the face encoder takes 64"),
        ({"side": "S"}, "cannot be used to read expressions"),
        ({"inputs": 2}, "cannot be used to read expressions"),
        ({"scale": np.inf}, "what it gives are no numbers"),
        ("junk", "cannot be used to read expressions"),
    ),
)
def test_a_model_of_expressions_that_does_not_do(folder, made, said):
    encoder, file = own(folder), folder / "expression.onnx"
    if made == "junk":
        file.write_bytes(b"no model")
    elif made is not None:
        with np.errstate(invalid="ignore"):
            save_expression(file, **made)
    with pytest.raises(SeFiError, match=f"^SeFi Predict Identity: .*{said}.*disconnect expr"):
        predict(encoder, image(drawn(160)), expression=image(drawn(160)))


def test_an_expression_is_one_picture_with_a_face(folder):
    encoder, photo = own(folder), image(drawn(160))
    save_expression(folder / "expression.onnx")
    for pictures, said in (
        ([image(drawn(64), drawn(64))], "expression has 2 pictures"),
        ([photo, photo], "expression is a list of 2"),
        ([torch.zeros(1, 64, 64, 3)], "no face was found in expression"),
        ([photo * float("nan")], "expression holds values that are not numbers"),
    ):
        with pytest.raises(SeFiError, match=f"^SeFi Predict Identity: {said}"):
            predict(encoder, photo, expression=pictures)


# Files.


def test_the_lists_tell_encoders_from_mappings(folder):
    assert face_encoders.encoder_files() == []
    save_published(folder)
    own(folder)
    for name in ("expression.onnx", "notes.txt", "mapping_old.pt"):
        (folder / name).touch()
    assert face_encoders.encoder_files() == ["faces.safetensors", "msid.pt"]
    assert face_encoders.mapping_files() == ["auto", "mapping.pt", "mapping_old.pt", "msid.pt"]


def test_the_folder_is_registered_beside_those_of_the_user(monkeypatch):
    entry = (["/users/own"], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "face2diffusion", entry)
    for _ in range(2):
        face_encoders.register_model_folder()
    paths, extensions = folder_paths.folder_names_and_paths["face2diffusion"]
    assert paths == ["/users/own", os.path.join(folder_paths.models_dir, "face2diffusion")]
    assert extensions == {".safetensors", ".pt"}


def test_a_mapping_of_another_name(folder):
    save_published(folder, "f2d.pt")
    with pytest.raises(SeFiError, match=r"^SeFi Load Face Encoder: msid\.pt needs .*mapping\.pt"):
        opened("msid.pt")
    assert [name for name, _ in opened("msid.pt", mapping="f2d.pt").files] == ["msid.pt", "f2d.pt"]
    for mapping in ("gone.pt", "../f2d.pt.txt"):
        with pytest.raises(SeFiError, match="choose the file at mapping"):
            opened("msid.pt", mapping=mapping)


def test_an_encoder_is_opened_once_and_again_when_it_has_changed(folder):
    first = own(folder)
    print_before = SeFiLoadFaceEncoder.fingerprint_inputs(file="faces.safetensors")
    assert opened("faces.safetensors") is first
    assert SeFiLoadFaceEncoder.fingerprint_inputs(file="faces.safetensors") == print_before
    second = own(folder, seed=6)
    assert second is not first and second.files != first.files
    assert SeFiLoadFaceEncoder.fingerprint_inputs(file="faces.safetensors") != print_before
    one, other = (predict(encoder, image(drawn(160)))[0] for encoder in (first, second))
    assert not torch.equal(one.key_vectors["l"], other.key_vectors["l"])
    linked = SeFiLoadFaceEncoder.fingerprint_inputs(file=None)
    assert linked != linked  # NaN: looked at each time


def test_a_changed_mapping_is_seen(folder):
    save_published(folder)
    before = SeFiLoadFaceEncoder.fingerprint_inputs(file="msid.pt", mapping="auto")
    content = (folder / "mapping.pt").read_bytes()
    (folder / "mapping.pt").write_bytes(content + b" ")
    assert SeFiLoadFaceEncoder.fingerprint_inputs(file="msid.pt", mapping="auto") != before


def test_a_new_model_of_expressions_is_seen(folder):
    before = SeFiPredictIdentity.fingerprint_inputs(detector=["auto"])
    assert before == SeFiPredictIdentity.fingerprint_inputs()
    save_expression(folder / "expression.onnx")
    assert SeFiPredictIdentity.fingerprint_inputs(detector=["auto"]) != before


@pytest.mark.parametrize(
    ("file", "said"),
    (
        ("", r"no face encoder in .*face2diffusion: put Face2Diffusion's msid\.pt and mapping\.pt"),
        ("gone.safetensors", "'gone.safetensors' is not in .*: press R"),
        ("../outside.safetensors", "is not in"),
        ("notes.txt", "is not in"),
        ("sub", "is not in"),
        ("\0", "is not in"),
        ("junk.safetensors", r"junk\.safetensors cannot be used as a face encoder"),
        ("junk.pt", r"junk\.pt cannot be used as a face encoder"),
    ),
)
def test_files_that_do_not_do(folder, file, said):
    save_published(folder)
    (folder.parent / "outside.safetensors").touch()
    (folder / "sub").mkdir()
    for name in ("notes.txt", "junk.safetensors", "junk.pt"):
        (folder / name).write_bytes(b"junk")
    with pytest.raises(SeFiError, match=f"^SeFi Load Face Encoder: .*{said}") as caught:
        opened(file)
    assert "\n" not in str(caught.value)
    valid = SeFiLoadFaceEncoder.validate_inputs(file=file, mapping="auto")
    if file.startswith("junk"):  # which is not read before the graph runs
        assert valid is True
    else:
        assert re.search(said, str(valid))
    assert SeFiLoadFaceEncoder.validate_inputs(file="msid.pt", mapping="auto") is True
    assert SeFiLoadFaceEncoder.validate_inputs() is True  # linked


@pytest.mark.parametrize("value", (7, True, ["msid.pt"], {}, "\ud800"))
@pytest.mark.parametrize("name", ("file", "mapping"))
def test_a_file_name_that_is_no_text(folder, name, value):
    save_published(folder)
    inputs = {"file": "msid.pt", "mapping": "auto", name: value}
    said = f"{name} is "
    assert said in SeFiLoadFaceEncoder.validate_inputs(**inputs)
    for call in (SeFiLoadFaceEncoder.fingerprint_inputs, SeFiLoadFaceEncoder.execute):
        with pytest.raises(SeFiError, match=said):
            call(**inputs)


def test_a_file_whose_prediction_is_no_identity_is_refused_at_once(folder):
    """Sound in itself, but of two text encoders one has keys only, or another count of vectors."""
    for class_word, wrong in (("<b>", "class word"), ("person", None)):
        if wrong is None:
            encoder = encoder_for("sdxl", {"l": 8, "g": 12})
            outputs = [one for one in encoder.mapping.outputs if one.name != "g_value_1"]
            encoder.mapping.outputs = tuple(outputs)
            del encoder.mapping.g_value_1
        else:
            encoder = encoder_for("sd1", {"l": 8}, class_word=class_word)
        write_face_encoder(encoder, folder / "odd.safetensors")
        with pytest.raises(SeFiError, match="what it predicts is no identity .*: choose another"):
            opened("odd.safetensors")


# Photos and settings that do not do.


@pytest.mark.parametrize("crop", ("aligned", "head"))
def test_a_photo_without_a_face_is_named(folder, crop):
    wall = np.full((160, 160, 3), WALL, np.uint8)
    with pytest.raises(
        SeFiError, match="^SeFi Predict Identity: no face was found in photo 2: use"
    ):
        predict(own(folder, crop=crop), [image(drawn(160), wall)])


def test_a_mask_without_a_face_is_named(folder):
    mask = torch.zeros(1, 160, 160)
    mask[:, :20, :20] = 1
    said = "^SeFi Predict Identity: no face was found in the mask of photo 1, only outside of it: "
    with pytest.raises(SeFiError, match=said):
        predict(own(folder), image(drawn(160)), masks=mask)


@pytest.mark.parametrize(
    ("inputs", "said"),
    (
        ({"name": "a b"}, "the name 'a b' cannot be used"),
        ({"name": "con"}, "con"),
        ({"class_word": "(x)"}, "the class word"),
        ({"detector": "yolo"}, "detector is 'yolo'"),
        ({"which_face": "all"}, "which_face is 'all'"),
        ({"face_index": -1}, "face_index"),
        ({"which_face": "left to right", "face_index": 4}, "face_index is 4, but photo 1 has 1"),
        ({"masks": torch.ones(3, 160, 160)}, "masks: there are 3 masks for 1 photos"),
        ({"masks": torch.ones(1, 9, 9)}, "masks: mask 1 is 9 x 9 pixels"),
        ({"face_encoder": None}, "the face_encoder input is empty: connect"),
        ({"face_encoder": 7}, "face_encoder is an int: connect the face encoder of SeFi Load"),
    ),
)
def test_settings_that_do_not_do(folder, inputs, said):
    encoder = own(folder)
    with pytest.raises(SeFiError, match=r"^SeFi Predict Identity: ") as caught:
        predict(inputs.pop("face_encoder", encoder), image(drawn(160)), **inputs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_unconnected_and_missing_inputs_are_the_defaults(folder):
    encoder, photo = own(folder, class_word="cat"), image(drawn(160))
    optional = {one.id for one in SeFiPredictIdentity.GET_SCHEMA().inputs if one.optional}
    assert optional == {
        "masks", "expression", "class_word", "detector", "which_face", "face_index",
    }  # fmt: skip
    none, _ = predict(encoder, photo, **{name: [None] for name in optional})
    missing, _ = predict(encoder, photo)
    assert none.same_content(missing) and none.class_word == "cat"
