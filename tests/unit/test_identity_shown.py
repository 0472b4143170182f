"""What an identity file shows to others, its picture, and files of earlier versions."""

import base64
import hashlib
import json

import pytest
import safetensors.torch
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity import file as identity_file
from sefi_ide.sefi_core.identity.file import (
    from_bytes,
    read_identity,
    to_bytes,
)
from sefi_ide.sefi_core.identity.thumbnail import (
    MAX_THUMBNAIL_BYTES,
    THUMBNAIL_SIDE,
    picture_in,
    thumbnail_of,
)
from sefi_ide.tools.comfyui import REPOSITORY

from .made_files import (
    PICTURE,
    assert_one_clear_sentence,
    make_identity,
    old_parts_of,
    parts_of,
    png_of,
    sealed,
)

OLD_FILE = REPOSITORY / "tests" / "data" / "identity_v1.safetensors"
"""As versions of the pack before format 2 have written it."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Broken files are read again at once."""
    monkeypatch.setattr(identity_file, "READ_AGAIN_SECONDS", 0)


@pytest.fixture
def write(tmp_path):
    """Writes bytes, or tensors and metadata, to a file and returns its path."""

    def write(content, metadata=None):
        path = tmp_path / "anna.safetensors"
        if isinstance(content, dict):
            content = safetensors.torch.save(content, metadata)
        path.write_bytes(content)
        return path

    return write


class TestThumbnail:
    def test_large_pictures_are_made_small_and_keep_their_aspect(self):
        picture = torch.zeros(300, 600, 3)
        picture[:, 300:] = torch.tensor([1.0, 0.5, 2.0])
        thumbnail = picture_in(thumbnail_of(picture))
        assert thumbnail.shape == (128, 256, 3) and thumbnail.dtype == torch.uint8
        expected = torch.tensor([[0, 0, 0], [255, 128, 255]])
        assert (thumbnail[64, [16, 240]].int() - expected).abs().max() <= 3  # it is a JPEG

    def test_small_pictures_and_alpha(self):
        assert picture_in(thumbnail_of(torch.ones(1, 7, 4))).shape == (1, 7, 3)
        assert picture_in(thumbnail_of(torch.ones(2000, 1, 3))).shape == (256, 1, 3)

    def test_the_worst_picture_of_that_size_may_be_kept(self):
        noise = torch.rand(THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
        for thumbnail in (thumbnail_of(noise), png_of(noise)):
            content = to_bytes(make_identity(thumbnail=thumbnail))
            assert from_bytes(content, "anna.safetensors").thumbnail == thumbnail

    @pytest.mark.parametrize(
        "thumbnail",
        [
            b"",
            b"GIF89a",
            thumbnail_of(PICTURE)[:300],
            png_of(torch.ones(THUMBNAIL_SIDE + 1, 1, 3)),
            png_of(PICTURE) + bytes(MAX_THUMBNAIL_BYTES),
        ],
    )
    def test_what_is_no_small_picture_is_refused(self, thumbnail):
        with pytest.raises(SeFiError, match="thumbnail"):
            make_identity(thumbnail=thumbnail)


class TestShownToOthers:
    """What ComfyUI's Model Library and other programs read."""

    def shown(self, **changes):
        return parts_of(make_identity(**changes))[1]

    def test_texts(self):
        training = {"photos": 1, "steps_done": 60}
        shown = self.shown(class_word="old man", family="sdxl", training=training)
        assert shown["modelspec.title"] == "anna"
        assert shown["modelspec.trigger_phrase"] == "<anna>"
        assert shown["modelspec.architecture"] == "stable-diffusion-xl-v1-base/sefi-identity"
        assert shown["modelspec.description"] == (
            "Stands for old man; learned on SDXL from 1 photo in 60 steps."
        )
        assert "<anna>" in shown["modelspec.usage_hint"]
        assert "old man" in shown["modelspec.usage_hint"]

    @pytest.mark.parametrize(
        "training, described",
        [
            ({}, "learned on SD 1.x."),
            ({"photos": 3, "steps_done": 1}, "learned on SD 1.x from 3 photos in 1 step."),
            ({"photos": True, "steps_done": 1e9}, "learned on SD 1.x."),
            ({"photos": "<b>2</b>", "steps_done": -1}, "learned on SD 1.x."),
            ({"photos": [1], "steps_done": 10**400}, "learned on SD 1.x."),
        ],
    )
    def test_whatever_the_settings_hold(self, training, described):
        assert self.shown(training=training)["modelspec.description"].endswith(described)

    @pytest.mark.parametrize(
        "thumbnail, kind", [(thumbnail_of(PICTURE), "jpeg"), (png_of(PICTURE), "png")]
    )
    def test_face(self, thumbnail, kind):
        shown = self.shown(thumbnail=thumbnail)
        start, _, encoded = shown["modelspec.thumbnail"].partition(",")
        assert start == f"data:image/{kind};base64"
        assert base64.b64decode(encoded) == thumbnail
        assert json.loads(shown["ssmd_cover_images"]) == [encoded]

    def test_no_face(self):
        assert not {"modelspec.thumbnail", "ssmd_cover_images"} & set(self.shown(thumbnail=None))

    def test_texts_for_people_may_be_worded_otherwise(self, write):
        """By a later version, or by somebody; texts they stay, and nothing is made of them."""
        tensors, metadata = parts_of(make_identity())
        hostile = "<img src=x onerror=alert(1)>"
        path = write(sealed(tensors, metadata | {"modelspec.description": hostile}))
        loaded = read_identity(path)
        assert loaded.same_content(make_identity())
        assert to_bytes(loaded) == to_bytes(make_identity())

    def test_they_are_under_the_checksum(self, write):
        tensors, metadata = parts_of(make_identity())
        checksum = identity_file._checksum(metadata, tensors)
        for name in (name for name in metadata if name.startswith(("modelspec.", "ssmd_"))):
            changed = metadata | {name: metadata[name] + " ", "checksum": checksum}
            with pytest.raises(SeFiError, match="does not match its checksum"):
                read_identity(write(tensors, changed))


class TestOldFiles:
    def test_a_file_of_format_version_1(self):
        assert hashlib.sha256(OLD_FILE.read_bytes()).hexdigest().startswith("7a440c71f8012ddc")
        identity = read_identity(OLD_FILE)
        assert (identity.name, identity.class_word, identity.family) == ("Zoë-2", "old man", "sdxl")
        assert identity.training == {
            "steps": 60,
            "steps_done": 60,
            "photos": 1,
            "learning_rate": 0.01,
            "captions": ["naïve \x07 “quote”"],
        }
        for vectors, shifts in (
            (identity.key_vectors, (10, 20)),
            (identity.value_vectors, (30, 40)),
        ):
            for (encoder, width), shift in zip((("l", 8), ("g", 12)), shifts, strict=True):
                expected = (torch.arange(6 * width).reshape(2, 3, width) - shift) / 64
                assert torch.equal(vectors[encoder], expected)
        picture = picture_in(identity.thumbnail)
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(48), indexing="ij")
        expected = torch.stack([rows * 4, columns * 5, (rows + columns) * 2], dim=-1)
        assert torch.equal(picture, expected.to(torch.uint8))

    def test_saved_again_it_is_a_new_file_of_the_same_identity(self, write):
        old = read_identity(OLD_FILE)
        content = to_bytes(old)
        new = from_bytes(content, OLD_FILE)
        assert b'"format_version":"2"' in content
        assert new.same_content(old) and to_bytes(new) == content

    @pytest.mark.parametrize(
        "change",
        [
            {"modelspec.title": "anna"},
            {"modelspec.trigger_phrase": "<anna>"},
            {"format_version": "2"},
            {"format_version": "3"},
        ],
    )
    def test_no_mixture_of_the_two(self, write, change):
        tensors, metadata = old_parts_of(make_identity())
        assert read_identity(write(sealed(tensors, metadata))).name == "anna"
        with pytest.raises(SeFiError, match="damaged|update SeFi-IDE"):
            read_identity(write(sealed(tensors, metadata | change)))

    @pytest.mark.parametrize(
        "thumbnail",
        [
            torch.zeros(10, dtype=torch.uint8),
            torch.zeros(3),
            torch.zeros(MAX_THUMBNAIL_BYTES + 1, dtype=torch.uint8),
        ],
    )
    def test_bad_thumbnails(self, write, thumbnail):
        tensors, metadata = old_parts_of(make_identity())
        path = write(sealed(tensors | {"thumbnail": thumbnail}, metadata))
        with pytest.raises(SeFiError, match="damaged, its thumbnail") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)
