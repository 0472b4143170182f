import dataclasses
import json
import os
import random
import struct
import zlib

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity import file as identity_file
from sefi_ide.sefi_core.identity.content import MAX_FILE_BYTES
from sefi_ide.sefi_core.identity.file import (
    MAX_HEADER_BYTES,
    from_bytes,
    read_identity,
    to_bytes,
)
from sefi_ide.sefi_core.identity.identity import (
    MAX_ENCODERS,
    MAX_STAGES,
    MAX_WIDTH,
)
from sefi_ide.sefi_core.identity.thumbnail import (
    MAX_THUMBNAIL_BYTES,
    THUMBNAIL_SIDE,
    picture_in,
    thumbnail_of,
)

from .made_files import (
    PICTURE,
    assert_one_clear_sentence,
    make_identity,
    old_parts_of,
    parts_of,
    png_of,
    sealed,
    with_face,
)


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


class TestRoundTrip:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"widths": {"l": 768, "g": 1280}, "family": "sdxl", "vectors": 3, "stages": 7},
            {"thumbnail": None, "training": {}},
            {"name": "José", "class_word": "old man", "training": {"note": "naïve \x07 “quote”"}},
            {"thumbnail": png_of(PICTURE)},
        ],
    )
    def test_what_is_written_is_read(self, write, changes):
        identity = make_identity(**changes)
        loaded = read_identity(write(to_bytes(identity)))
        for field in ("name", "class_word", "family", "training", "widths", "stages", "vectors"):
            assert getattr(loaded, field) == getattr(identity, field)
        for role in ("key_vectors", "value_vectors"):
            ours, theirs = getattr(identity, role), getattr(loaded, role)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[encoder], theirs[encoder]) for encoder in ours)
        assert loaded.thumbnail == identity.thumbnail
        assert loaded.same_content(identity)

    def test_the_file_is_small_and_says_what_it_is(self, write):
        content = to_bytes(make_identity())
        assert len(content) < 50_000
        with safe_open(write(content), framework="np") as file:
            metadata = file.metadata()
            assert set(file.keys()) == {"keys.l", "values.l"}
        assert metadata["format"] == "sefi-identity"
        assert metadata["format_version"] == "2"
        assert json.loads(metadata["widths"]) == {"l": 768}
        assert (metadata["stages"], metadata["vectors"]) == ("5", "1")
        assert json.loads(metadata["training"])["steps"] == 200

    def test_the_same_identity_gives_the_same_bytes(self):
        identity = make_identity(widths={"l": 8, "g": 12})
        swapped = {
            role: dict(reversed(getattr(identity, role).items()))
            for role in ("key_vectors", "value_vectors", "training")
        }
        contents = {to_bytes(identity) for _ in range(8)}
        contents.add(to_bytes(dataclasses.replace(identity, **swapped)))
        contents.add(to_bytes(from_bytes(min(contents), "anna.safetensors")))
        assert len(contents) == 1

    def test_identities_made_in_inference_mode_can_be_trained_on(self, write):
        with torch.inference_mode():
            made = make_identity(widths={"l": 8})
            loaded = read_identity(write(to_bytes(made)))
            renamed = loaded.renamed("bob")
        for identity in (made, loaded, renamed):
            key = identity.key_vectors["l"].requires_grad_()
            (key**2).sum().backward()
            assert key.grad is not None

    def test_tensors_are_copies_in_float32(self):
        source = torch.ones(5, 2, 8, dtype=torch.float16, requires_grad=True)
        identity = make_identity(key_vectors={"l": source}, value_vectors={"l": source})
        with torch.no_grad():
            source += 1
        assert identity.key_vectors["l"].dtype == torch.float32
        assert identity.key_vectors["l"].unique().tolist() == [1.0]
        assert not identity.key_vectors["l"].requires_grad

    def test_renamed_keeps_everything_else(self):
        identity = make_identity()
        other = identity.renamed("bob")
        assert (other.placeholder, identity.placeholder) == ("<bob>", "<anna>")
        assert other.renamed("anna").same_content(identity)
        with pytest.raises(SeFiError, match="name"):
            identity.renamed("b ob")
        with pytest.raises(dataclasses.FrozenInstanceError):
            identity.name = "bob"

    def test_an_accent_may_be_a_character_of_its_own(self):
        assert make_identity().renamed("Jose\u0301").placeholder == "<Jos\u00e9>"

    def test_every_difference_is_a_difference_of_content(self):
        identity = make_identity()
        assert identity.same_content(make_identity())
        changed = {"l": identity.key_vectors["l"].clone()}
        changed["l"][4, 0, 767] += 1e-5
        for changes in (
            {"name": "bob"},
            {"class_word": "cat"},
            {"family": "sd2"},
            {"key_vectors": changed},
            {"value_vectors": changed},
            {"training": {}},
            {"thumbnail": None},
            {"thumbnail": png_of(PICTURE)},
        ):
            assert not identity.same_content(dataclasses.replace(identity, **changes)), changes


class TestDamage:
    def test_no_flipped_bit_goes_unseen(self, write):
        content = to_bytes(make_identity(widths={"l": 24}, thumbnail=png_of(PICTURE[:1, :1])))
        header = 8 + int.from_bytes(content[:8], "little")
        positions = list(range(header * 8))  # every bit of the header: metadata, names, shapes
        positions += random.Random(0).sample(range(header * 8, len(content) * 8), 400)
        path = write(content)
        for position in positions:
            byte, bit = divmod(position, 8)
            changed = bytearray(content)
            changed[byte] ^= 1 << bit
            with pytest.raises(SeFiError) as caught:
                from_bytes(bytes(changed), path)
            assert_one_clear_sentence(caught.value, path)
        assert from_bytes(content, path).name == "anna"

    def test_no_truncation_goes_unseen(self, write):
        content = to_bytes(make_identity(widths={"l": 24}))
        path = write(content)
        for length in [0, 1, 7, 8, 9, *random.Random(0).sample(range(len(content)), 100)]:
            with pytest.raises(SeFiError) as caught:
                from_bytes(content[:length], path)
            assert_one_clear_sentence(caught.value, path)

    def test_appended_bytes_are_seen(self, write):
        with pytest.raises(SeFiError, match="damaged"):
            read_identity(write(to_bytes(make_identity()) + b"\0"))

    @pytest.mark.parametrize("content", [b"PK\3\4" + b"x" * 500, b"<html>" * 90, b"\0" * 4096])
    def test_other_file_formats(self, write, content):
        path = write(content)
        with pytest.raises(SeFiError, match="no safetensors file") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    def test_missing_files_and_folders(self, tmp_path):
        missing = tmp_path / "missing.safetensors"
        with pytest.raises(SeFiError, match="is not there") as caught:
            read_identity(missing)
        assert_one_clear_sentence(caught.value, missing)
        with pytest.raises(SeFiError, match="a folder, a pipe or a device") as caught:
            read_identity(tmp_path)
        assert_one_clear_sentence(caught.value, tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        pipe = tmp_path / "anna.safetensors"
        os.mkfifo(pipe)
        with pytest.raises(SeFiError, match="a folder, a pipe or a device") as caught:
            read_identity(pipe)
        assert_one_clear_sentence(caught.value, pipe)


class TestFilesThatChange:
    """The file changes between one read and the next; test_identity_disk has real writers."""

    def test_a_file_in_the_middle_of_being_written_is_waited_for(self, write, monkeypatch):
        content = to_bytes(make_identity())
        path = write(b"")
        versions = [content[:8], content[:900], content]
        monkeypatch.setattr("time.sleep", lambda _: path.write_bytes(versions.pop(0)))
        assert read_identity(path).same_content(make_identity())
        assert versions == []

    def test_one_that_never_comes_to_rest_is_not_called_damaged(self, write, monkeypatch):
        path = write(b"0")
        monkeypatch.setattr("time.sleep", lambda _: path.write_bytes(path.read_bytes() + b"0"))
        with pytest.raises(SeFiError, match="being written by another program") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    def test_a_whole_file_is_opened_once(self, write, monkeypatch):
        path = write(to_bytes(make_identity()))
        opened, really_open = [], os.open
        monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or really_open(*args))
        read_identity(path)
        assert len(opened) == 1


class TestSize:
    def test_a_huge_file_is_refused_unread(self, write):
        path = write(b"x")
        os.truncate(path, 2**40)  # of holes
        with pytest.raises(SeFiError, match="1048576 MiB .* at most 64: choose") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    def test_a_huge_header_is_refused_unparsed(self, write, monkeypatch):
        metadata = {"format": "pt", "ss_tag_frequency": "x" * MAX_HEADER_BYTES}
        path = write({"lora_up": torch.ones(1)}, metadata)
        monkeypatch.setattr(json, "loads", None)
        with pytest.raises(SeFiError, match="no SeFi identity") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"widths": {"l": MAX_WIDTH}, "stages": 20, "vectors": 75},
            {"training": {"note": "x" * MAX_HEADER_BYTES}},
        ],
    )
    def test_what_could_not_be_read_again_is_not_written(self, changes):
        with pytest.raises(SeFiError, match="anna is too large to be saved"):
            to_bytes(make_identity(**changes))

    def test_the_limits_themselves(self, write):
        widths = {"l": 8, "g": MAX_WIDTH, "h": 8, "t5": 8}
        assert len(widths) == MAX_ENCODERS
        identity = make_identity(widths=widths, stages=MAX_STAGES)
        content = to_bytes(identity)
        assert len(content) < MAX_FILE_BYTES
        assert read_identity(write(content)).same_content(identity)

    @pytest.mark.parametrize(
        "changes",
        [
            {"stages": MAX_STAGES + 1, "widths": {"l": 4}},
            {"widths": {"l": MAX_WIDTH + 1}},
            {"widths": dict.fromkeys("abcde", 4)},
        ],
    )
    def test_beyond_the_limits(self, changes):
        with pytest.raises(SeFiError, match="at most .* possible; train"):
            make_identity(**changes)


class TestForeignFiles:
    @pytest.mark.parametrize(
        "names, kind",
        [
            (["lora_unet_down_blocks_0.lora_down.weight"], "LoRA"),
            (["unet.down.0.lora_A.weight"], "LoRA"),
            (["model.diffusion_model.input_blocks.0.0.weight"], "checkpoint"),
            (["emb_params"], "textual inversion"),
            (["clip_l", "clip_g"], "textual inversion"),
            (["weight"], "other"),
        ],
    )
    def test_foreign_files_are_called_by_their_name(self, write, names, kind):
        path = write({name: torch.ones(2, 768) for name in names}, {"format": "pt"})
        with pytest.raises(SeFiError, match=f"no SeFi identity but .*{kind}") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    def test_files_without_tensors_or_metadata(self, write):
        for content in (safetensors.torch.save({}), safetensors.torch.save({"a": torch.ones(1)})):
            with pytest.raises(SeFiError, match="no SeFi identity"):
                read_identity(write(content))

    @pytest.mark.parametrize("version", ["3", "10"])
    def test_newer_format_version(self, write, version):
        tensors, metadata = parts_of(make_identity())
        tensors["future"] = torch.ones(1)
        path = write(sealed(tensors, metadata | {"format_version": version}))
        with pytest.raises(SeFiError, match=f"version {version} .*update SeFi-IDE") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    def test_a_kind_to_come(self, write):
        tensors, metadata = parts_of(make_identity())
        path = write(sealed(tensors, metadata | {"kind": "portrait"}))
        with pytest.raises(SeFiError, match="kind 'portrait'.*update SeFi-IDE") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)


class TestCraftedFiles:
    """The checksum is right, the content is not."""

    @pytest.mark.parametrize(
        "change",
        [
            {"keys.l": torch.full((5, 1, 768), torch.nan)},
            {"values.l": torch.full((5, 1, 768), -torch.inf)},
            {"keys.l": torch.ones(4, 1, 768)},
            {"values.l": torch.ones(5, 2, 768)},
            {"keys.l": torch.ones(5, 768)},
            {"keys.l": torch.ones(5, 1, 768, dtype=torch.int32)},
            {"keys.l": torch.ones(5, 0, 768), "values.l": torch.ones(5, 0, 768)},
            {"keys.l": torch.ones(2000, 1, 4), "values.l": torch.ones(2000, 1, 4)},
            {"keys.g": torch.ones(5, 1, 1280)},
            {"keys.g": torch.ones(4, 1, 8), "values.g": torch.ones(4, 1, 8)},
            {"keys.l.x": torch.ones(5, 1, 768), "values.l.x": torch.ones(5, 1, 768)},
            {"surprise": torch.ones(3)},
            {"keys.l": None},
            {"keys.l": None, "values.l": None},
            {"thumbnail": torch.zeros(10, dtype=torch.uint8)},  # as format 1 has it
            {"keys.l": torch.ones(101, 1, 4), "values.l": torch.ones(101, 1, 4)},
            {"keys.l": torch.ones(1, 1, 8193), "values.l": torch.ones(1, 1, 8193)},
            {f"{role}.{e}": torch.ones(5, 1, 4) for role in ("keys", "values") for e in "abcd"},
        ],
    )
    def test_bad_tensors(self, write, change):
        tensors, metadata = parts_of(make_identity())
        tensors = {
            name: tensor for name, tensor in (tensors | change).items() if tensor is not None
        }
        path = write(sealed(tensors, metadata))
        with pytest.raises(SeFiError, match="damaged") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "../anna"},
            {"name": None},
            {"class_word": ""},
            {"family": "a b"},
            {"stages": "4"},
            {"vectors": "x"},
            {"widths": '{"l": 1024}'},
            {"widths": None},
            {"training": "[1"},
            {"training": "[1, 2]"},
            {"training": "NaN"},
            {"training": '{"loss": NaN}'},
            {"training": "[" * 100_000},
            {"training": '{"a": ' + "[" * 30 + "]" * 30 + "}"},
            {"training": '{"a": ' + "[" * 900 + "]" * 900 + "}"},
            {"training": '{"a": ' + "9" * 5000 + "}"},
            {"format_version": "9" * 5000},
            {"format_version": "²"},
            {"format_version": "0"},
            {"format_version": "one"},
            {"format_version": None},
            {"author": "somebody"},
            {"modelspec.author": "somebody"},
            {"modelspec.title": None},
            {"modelspec.trigger_phrase": "<bob>"},
            {"modelspec.trigger_phrase": None},
            {"modelspec.thumbnail": None},
            {"ssmd_cover_images": None},
            {"ssmd_cover_images": "[]"},
            {"modelspec.thumbnail": "https://example.com/anna.jpg"},
            with_face(b""),
            with_face(b"<svg onload='alert(1)'>"),
            with_face(png_of(torch.ones(THUMBNAIL_SIDE + 1, 1, 3))),
            with_face(png_of(PICTURE) + bytes(MAX_THUMBNAIL_BYTES)),
            with_face(png_of(PICTURE))
            | {"modelspec.thumbnail": with_face(thumbnail_of(PICTURE))["modelspec.thumbnail"]},
            {"modelspec.thumbnail": with_face(png_of(PICTURE))["modelspec.thumbnail"] + "\n"},
        ],
    )
    def test_bad_metadata(self, write, change):
        tensors, metadata = parts_of(make_identity())
        metadata = {key: text for key, text in (metadata | change).items() if text is not None}
        path = write(sealed(tensors, metadata))
        with pytest.raises(SeFiError, match="damaged") as caught:
            read_identity(path)
        assert_one_clear_sentence(caught.value, path)

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize(
        "kind", [b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"fcTL"]
    )
    @pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 5, b"\xff" * 26, b"a\0\0", b"a\0\1x"])
    @pytest.mark.parametrize("place", [33, -12])  # behind the first chunk, before the last one
    @pytest.mark.filterwarnings("ignore:Invalid APNG")
    def test_thumbnails_with_chunks_that_lie(self, write, place, kind, data, old):
        """Either there is a picture, or a sentence: nothing else comes out."""
        png = png_of(PICTURE)
        chunk = (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
        content = bytearray(png[:place] + chunk + png[place:])
        tensors, metadata = (old_parts_of if old else parts_of)(make_identity())
        if old:
            tensors["thumbnail"] = torch.frombuffer(content, dtype=torch.uint8)
        else:
            metadata |= with_face(bytes(content))
        path = write(sealed(tensors, metadata))
        try:
            assert picture_in(read_identity(path).thumbnail).shape == (64, 48, 3)
        except SeFiError as error:
            assert "its thumbnail is no small JPEG or PNG picture" in str(error)
            assert_one_clear_sentence(error, path)

    def test_headers_that_lie(self, write):
        """Whatever the header says, with a body of 8 bytes."""
        for header in (
            "[]", "{}x", "1", "[" * 9999,
            '{"__metadata__": null}', '{"__metadata__": {"format": 1}}',
            '{"__metadata__": {"format": "sefi-identity"}, "a": 1}',
            '{"__metadata__": {"format": "sefi-identity"}, "a": {"dtype": "F4", "shape": [16], '
            '"data_offsets": [0, 8]}}',
            '{"__metadata__": {"format": "sefi-identity"}, "a": {"dtype": "F32", "shape": [3], '
            '"data_offsets": [0, 8]}}',
            '{"__metadata__": {"format": "sefi-identity"}, "a": {"dtype": "U8", "shape": '
            '[4294967296, 4294967296, 8], "data_offsets": [0, 8]}}',
        ):  # fmt: skip
            text = header.encode()
            path = write(len(text).to_bytes(8, "little") + text + bytes(8))
            with pytest.raises(SeFiError, match="damaged|no SeFi identity") as caught:
                read_identity(path)
            assert_one_clear_sentence(caught.value, path)


class TestFit:
    def test_the_right_model_fits(self):
        make_identity().check_fits("sd1", {"l": 768})
        make_identity(widths={"g": 1280, "l": 768}).check_fits("sd1", {"l": 768, "g": 1280})

    @pytest.mark.parametrize(
        "family, widths",
        [
            ("sdxl", {"l": 768, "g": 1280}),
            ("sd2", {"h": 1024}),
            ("sd1", {"l": 128}),
            ("sd2", {"l": 768}),
            ("sd1", {}),
            ("flux", {"l": 768, "t5xxl": 4096}),
        ],
    )
    def test_other_models_do_not(self, family, widths):
        with pytest.raises(SeFiError, match="<anna> was learned on SD 1.x .* load a checkpoint"):
            make_identity().check_fits(family, widths)


def test_settings_that_are_no_json_are_refused():
    for training in ({"loss": float("nan")}, {"image": torch.ones(1)}, {"x": {1, 2}}):
        with pytest.raises(SeFiError, match="training settings"):
            make_identity(training=training)
    assert make_identity(training={"size": (1, 2)}).training == {"size": [1, 2]}
