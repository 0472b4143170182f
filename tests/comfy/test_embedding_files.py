"""Identities as ordinary textual inversions in ComfyUI's embeddings folder, and back."""

from __future__ import annotations

import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch
from sefi_ide.nodes.embedding_files import SeFiExportEmbedding, SeFiLoadEmbedding
from sefi_ide.sefi_core.comfyui import embedding_files
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.textual_inversion import read_embedding

from .made_identity import files_in, make_identity
from .random_checkpoint import of_all_families
from .test_train_identity import run
from .training_runs import load, random_vectors

TEXTS = ("a photo of {}, smiling", "({}:1.3) on the beach", "{}")


@pytest.fixture
def embeddings(tmp_path, monkeypatch):
    """ComfyUI's folder of embeddings, which does not exist yet."""
    folder = tmp_path / "models" / "embeddings"
    entry = ([str(folder)], {".safetensors", ".pt", ".bin"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", entry)
    return folder


def anna_of(family, stages=5, vectors=1, class_word="person"):
    keys, values = (random_vectors(family, stages, seed, vectors, 0.1) for seed in (1, 2))
    return Identity("anna", class_word, family, keys, values)


def stock(checkpoint, folder):
    """MODEL and CLIP as Load Checkpoint gives them."""
    return comfy.sd.load_checkpoint_guess_config(checkpoint, embedding_directory=[str(folder)])[:2]


def encoded(clip, text):
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


@of_all_families
@pytest.mark.parametrize(
    ("class_word", "vectors"), [("person", 1), ("old man", 1), ("old man", 3), ("person", 2)]
)
def test_stock_comfyui_encodes_it_as_the_placeholder_leaves_our_clip(
    embeddings, mini_checkpoint, family, class_word, vectors
):
    anna = anna_of(family, vectors=vectors, class_word=class_word)
    SeFiExportEmbedding.execute(anna, "people/anna", "error")
    with torch.inference_mode():
        model, clip = stock(mini_checkpoint, embeddings)
        _, applied = apply_identity(model, clip, AppliedIdentity(anna))
        for text in TEXTS:
            found = encoded(clip, text.format("embedding:people/anna"))
            for one, other in zip(found, encoded(applied, text.format("<anna>")), strict=True):
                assert torch.equal(one, other)
            word = encoded(clip, text.format(class_word))
            assert not torch.equal(found[0], word[0])


@of_all_families
def test_what_was_exported_loads_as_an_identity_that_draws_the_same(
    embeddings, mini_checkpoint, family
):
    anna = anna_of(family, vectors=2)
    SeFiExportEmbedding.execute(anna, "", "error")
    ben = SeFiLoadEmbedding.execute("anna.safetensors", "person", "ben").result[0]
    assert (ben.family, ben.stages, ben.vectors, ben.name) == (family, 1, 2, "ben")
    assert ben.training == {"embedding": "anna.safetensors"}
    for encoder, rows in anna.value_vectors.items():
        assert torch.equal(ben.value_vectors[encoder][0], rows.mean(0))
        assert torch.equal(ben.key_vectors[encoder], ben.value_vectors[encoder])
    with torch.inference_mode():
        model, clip = stock(mini_checkpoint, embeddings)
        _, applied = apply_identity(model, clip, AppliedIdentity(ben))
        for text in TEXTS:
            found, wanted = (
                encoded(applied, text.format("<ben>")),
                encoded(clip, text.format("embedding:anna")),
            )
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_training_goes_on_from_an_embedding(embeddings, mini_checkpoint):
    SeFiExportEmbedding.execute(anna_of("sd1"), "", "error")
    start = SeFiLoadEmbedding.execute("anna.safetensors", "person").result[0]
    trained = run(load(mini_checkpoint), identity=start, steps=1)[0]
    assert trained.stages == 5
    moved = (trained.value_vectors["l"] - start.value_vectors["l"]).abs().max()
    assert 0 < moved < 0.05


def layouts():
    one, two = torch.randn(2, 768), torch.randn(2, 1024)
    both = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": one.clone().requires_grad_()},
        "name": "anna",
        "step": 500,
        "sd_checkpoint": None,
    }
    return {
        "A1111": ("anna.pt", a1111, "sd1", {"l": one}),
        "A1111 with a Parameter": (
            "anna.pt",
            {"string_to_param": {"*": torch.nn.Parameter(two)}},
            "sd2",
            {"h": two},
        ),
        "diffusers": ("anna.bin", {"<anna>": one[0]}, "sd1", {"l": one[:1]}),
        "diffusers safe": ("anna.safetensors", {"<anna>": one[0]}, "sd1", {"l": one[:1]}),
        "kohya": ("anna.safetensors", {"emb_params": two}, "sd2", {"h": two}),
        "half": ("anna.safetensors", {"emb_params": one.half()}, "sd1", {"l": one.half()}),
        "SDXL": (
            "anna.safetensors", both, "sdxl", {"l": both["clip_l"], "g": both["clip_g"]},
        ),
        "a list": ("anna.pt", [{"clip_g": both["clip_g"]}, {"clip_l": both["clip_l"]}], "sdxl",
                   {"l": both["clip_l"], "g": both["clip_g"]}),
    }  # fmt: skip


@pytest.mark.parametrize(("file", "content", "family", "rows"), layouts().values(), ids=layouts())
def test_layouts_of_other_programs(embeddings, file, content, family, rows):
    embeddings.mkdir(parents=True)
    save(embeddings / file, content)
    assert embedding_files.embedding_files() == [file]
    found = SeFiLoadEmbedding.execute(file, "woman").result[0]
    assert (found.name, found.class_word, found.family) == ("anna", "woman", family)
    assert found.value_vectors.keys() == rows.keys()
    for encoder, wanted in rows.items():
        assert torch.equal(found.value_vectors[encoder], wanted[None].float())
        assert torch.equal(found.key_vectors[encoder], wanted[None].float())


def save(path, content):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in content.items()}, path)
    else:
        torch.save(content, path)


class Harmful:
    """A pickle that runs something when it is read."""

    def __reduce__(self):
        return open, ("harmed", "w")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.safetensors", {"emb_params": torch.zeros(1, 320)}, "its vectors have 320 numbers"),
        ("a.safetensors", {"emb_params": torch.zeros(76, 768)}, "76 vectors"),
        ("a.safetensors", {"emb_params": torch.full((1, 768), torch.nan)}, "not finite"),
        ("a.safetensors", {"emb_params": torch.zeros(1, 1, 768)}, "shape (1, 1, 768)"),
        ("a.safetensors", {"emb_params": torch.zeros(0, 768)}, "shape (0, 768)"),
        ("a.safetensors", {"emb_params": torch.zeros(1, 768).int()}, "torch.int32"),
        ("a.safetensors", {"x": torch.zeros(1), "y": torch.zeros(1)}, "not those of one embedding"),
        (
            "a.safetensors",
            {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(2, 1280)},
            "1 and 2 vectors",
        ),
        ("a.pt", {"string_to_param": {"*": Harmful()}}, "no file of tensors alone"),
        ("a.pt", {"string_to_param": {}}, "not those of one embedding"),
        ("a.pt", 7, "no file of tensors alone"),
        ("a.pt", b"", "damaged"),
        ("a.safetensors", b"half an embedding", "damaged"),
    ],
)
def test_other_files_are_one_clear_sentence(embeddings, file, content, said, monkeypatch):
    embeddings.mkdir(parents=True)
    monkeypatch.chdir(embeddings)
    if isinstance(content, bytes):
        (embeddings / file).write_bytes(content)
    else:
        save(embeddings / file, content)
    with pytest.raises(SeFiError, match="^SeFi Load Embedding: the file ") as caught:
        SeFiLoadEmbedding.execute(file, "person")
    message = str(caught.value)
    assert said in message and file in message and "\n" not in message
    assert not (embeddings / "harmed").exists()


@pytest.mark.parametrize("file", ["", "../x.pt", "gone.pt", "a\0.pt", "notes.txt"])
def test_files_that_are_not_in_the_list(embeddings, file):
    embeddings.mkdir(parents=True)
    (embeddings / "notes.txt").touch()
    (embeddings.parent / "x.pt").touch()
    with pytest.raises(SeFiError, match="^SeFi Load Embedding: .* choose it$"):
        SeFiLoadEmbedding.execute(file, "person")
    assert "is not in" in SeFiLoadEmbedding.validate_inputs(file)


def test_another_embedding_gets_a_number_and_the_same_is_kept(embeddings):
    for value, name in [(1, "anna"), (2, "anna_2"), (1, "anna"), (3, "anna_3")]:
        written = embedding_files.export_embedding(make_identity(value=value))
        assert written == f"embedding:{name}"
    with pytest.raises(SeFiError, match="exists already"):
        embedding_files.export_embedding(make_identity(value=4), "", "error")
    embedding_files.export_embedding(make_identity(value=5), "", "overwrite")
    found = read_embedding(embeddings / "anna.safetensors", "x", "person")
    assert found.value_vectors["l"][0, 0, 0] == 5
    assert files_in(embeddings) == ["anna.safetensors", "anna_2.safetensors", "anna_3.safetensors"]


@pytest.mark.parametrize("name", ["../anna", "my anna", "anna(1)", "a,b", "CON", "a[b", "/x"])
def test_names_that_no_prompt_can_have_are_refused(embeddings, name):
    assert isinstance(SeFiExportEmbedding.validate_inputs(name), str)
    with pytest.raises(
        SeFiError, match="^SeFi Export Embedding: the file name .* is refused|cannot"
    ):
        SeFiExportEmbedding.execute(make_identity(), name, "error")
    assert not embeddings.exists()


def test_vectors_that_hold_positions_cannot_be_an_embedding(embeddings):
    rows = random_vectors("sd1", 1, 1)
    eve = Identity("eve", "person", "sd1", rows, rows, position_free=True)
    with pytest.raises(
        SeFiError, match="^SeFi Export Embedding: the identity <eve> is of SeFi Pre"
    ):
        SeFiExportEmbedding.execute(eve, "", "error")
    assert not embeddings.exists()
