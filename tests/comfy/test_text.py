"""Placeholders in ComfyUI's tokens and text encoder."""

import copy
import pickle

import pytest
import torch
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.clip.tokens import (
    PlaceholderToken,
    class_word_ids,
    encoder_names,
    items_of,
    placeholder_ids,
    placeholders_in,
    substitute,
    token_widths,
    with_placeholders,
)
from sefi_ide.sefi_core.identity.identity import Identity

import nodes

WIDTH = 128


def identity(name="anna", class_word="person", vectors=1, stages=2):
    embeddings = {"l": torch.randn(stages, vectors, WIDTH)}
    return Identity(name, class_word, "sd1", embeddings, embeddings)


def marked(tokens):
    """(chunk, place, name, position) of every placeholder token."""
    return [
        (chunk, place, pair[0].name, pair[0].position)
        for chunk, pairs in enumerate(tokens["l"])
        for place, pair in enumerate(pairs)
        if isinstance(pair[0], PlaceholderToken)
    ]


@pytest.mark.parametrize("class_word", ["person", "old man"])
@pytest.mark.parametrize(
    "text",
    [
        "a photo of {}",
        "{}",
        "{}, smiling. {}'s hat!",
        "a (photo of ({}:1.3) in) the (sun:0.5)",
        "\\({}\\) and [{}]",
        "{} {}{}",
        "embedding:missing {} and <nobody> at <lora:x:1>",
        "words and " * 36 + "two {} here",
        "words and " * 36 + "and of {} here",
        "many " * 200 + "{}",
    ],
)
def test_others_see_the_class_word(mini_sd, text, class_word):
    _, clip, _ = mini_sd
    applied = with_placeholders(clip, [identity(class_word=class_word)])
    tokens = applied.tokenize(text.format(*["<anna>"] * 3))
    # "personperson" would be one word; the placeholder never merges with its neighbour.
    expected = clip.tokenize(text.replace("{}{}", "{} {}").format(*[class_word] * 3))
    assert tokens == expected
    length = len(class_word.split())
    assert [place[3] for place in marked(tokens)] == list(range(length)) * text.count("{}")


def test_weights_and_word_ids_stay_with_the_tokens(mini_sd):
    _, clip, _ = mini_sd
    applied = with_placeholders(clip, [identity()])
    tokens = applied.tokenize("a (<anna>:1.5) here", return_word_ids=True)
    assert tokens == clip.tokenize("a (person:1.5) here", return_word_ids=True)
    replaced = substitute(tokens, {"anna": {"l": torch.ones(1, WIDTH)}})
    assert [len(item) for item in replaced["l"][0]] == [3] * 77
    assert torch.equal(replaced["l"][0][2][0], torch.ones(WIDTH))
    assert replaced["l"][0][2][1:] == (1.5, tokens["l"][0][2][2])


@pytest.mark.parametrize("text", ["", "a person", "<bob>", "<Anna>", "<anna", "anna>", "< anna >"])
def test_text_without_the_placeholder_is_untouched(mini_sd, text):
    _, clip, _ = mini_sd
    tokens = with_placeholders(clip, [identity()]).tokenize(text)
    assert tokens == clip.tokenize(text)
    assert placeholders_in(tokens) == set()


def test_more_vectors_than_class_word_tokens(mini_sd):
    _, clip, _ = mini_sd
    applied = with_placeholders(clip, [identity(class_word="old man", vectors=4)])
    tokens = applied.tokenize("see <anna> there")
    old, man = class_word_ids(clip, "old man")
    assert placeholder_ids(items_of(tokens["l"]), "anna") == [old, man, man, man]
    ids = [int(token) for token, _ in tokens["l"][0][2:7]]
    assert ids == [old, man, man, man, *class_word_ids(clip, "there")]


def test_fewer_vectors_than_class_word_tokens(mini_sd):
    """The last vector is repeated, so K, V and reference prompts line up."""
    _, clip, _ = mini_sd
    tokens = with_placeholders(clip, [identity(class_word="old man")]).tokenize("<anna>")
    vector = torch.randn(1, WIDTH)
    replaced = substitute(tokens, {"anna": {"l": vector}})["l"][0]
    assert torch.equal(replaced[1][0], vector[0]) and torch.equal(replaced[2][0], vector[0])


def test_class_word_embeddings_encode_like_the_class_word(mini_sd):
    _, clip, _ = mini_sd
    applied = with_placeholders(clip, [identity(class_word="old man")])
    tokens = applied.tokenize("a (<anna>:1.2) and words " * 20)
    assert len(tokens["l"]) > 1
    with torch.inference_mode():
        rows = class_word_embedding(applied, "old man")
        assert rows["l"].shape == (2, WIDTH) and rows["l"].dtype == torch.float32
        context, pooled = applied.encode_from_tokens(
            substitute(tokens, {"anna": rows}), return_pooled=True
        )
        expected = clip.encode_from_tokens(tokens, return_pooled=True)
    assert context.shape == (1, 77 * len(tokens["l"]), WIDTH)
    assert torch.equal(context, expected[0]) and torch.equal(pooled, expected[1])


def test_substitute_changes_marked_tokens_only_and_keeps_gradients(mini_sd):
    _, clip, _ = mini_sd
    applied = with_placeholders(clip, [identity(), identity("bob", "robot")])
    tokens = applied.tokenize("<anna> and <bob> and <anna>")
    vector = torch.randn(1, WIDTH, requires_grad=True)
    replaced = substitute(tokens, {"anna": {"l": vector}})
    assert placeholders_in(tokens) == {"anna", "bob"} and placeholders_in(replaced) == {"bob"}
    changed = [item for item, _ in replaced["l"][0] if torch.is_tensor(item)]
    assert len(changed) == 2
    sum(embedding.sum() for embedding in changed).backward()
    assert torch.equal(vector.grad, torch.full((1, WIDTH), 2.0))


def test_tokens_survive_copies(mini_sd):
    _, clip, _ = mini_sd
    tokens = with_placeholders(clip, [identity(class_word="old man")]).tokenize("a <anna>")
    for duplicate in (copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert duplicate == tokens and marked(duplicate) == marked(tokens)


def test_chain_and_upstream(mini_sd):
    _, clip, _ = mini_sd
    first = with_placeholders(clip, [identity()])
    second = with_placeholders(first, [identity("bob", "robot")])
    third = with_placeholders(second, [identity("anna", "cat")])
    text = "<anna> and <bob>"
    assert placeholders_in(clip.tokenize(text)) == set()
    assert placeholders_in(first.tokenize(text)) == {"anna"}
    assert second.tokenize(text) == clip.tokenize("person and robot")
    assert third.tokenize(text) == clip.tokenize("cat and robot")
    assert first.tokenize(text) == clip.tokenize("person and <bob>")
    # The tokenizer is wrapped once, not three times.
    assert third.tokenizer.clip_l.tokenizer.inner is clip.tokenizer.clip_l.tokenizer


def test_names_with_digits_and_dashes(mini_sd):
    _, clip, _ = mini_sd
    applied = with_placeholders(clip, [identity("anna-2_b"), identity("anna")])
    tokens = applied.tokenize("<anna-2_b> <anna>")
    assert [place[2] for place in marked(tokens)] == ["anna-2_b", "anna"]


def test_clip_options_survive(mini_sd):
    _, clip, _ = mini_sd
    clip = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    clip.set_tokenizer_option("l_min_length", 100)
    applied = with_placeholders(clip, [identity()])
    assert applied.layer_idx == -2
    assert applied.tokenize("<anna>") == clip.tokenize("person")


def test_encoders(mini_sd):
    _, clip, _ = mini_sd
    assert encoder_names(clip) == ["l"] and token_widths(clip) == {"l": WIDTH}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a <anna>", {}),
        (["a <anna>"], {}),
        (["a <anna>, smiling", "no one"], {"padding": True}),
        (["a <anna>", "<anna> and <anna>'s hat"], {"padding": "longest", "return_tensors": "pt"}),
        (["a <anna>"], {"padding": "max_length", "max_length": 12, "return_tensors": "pt"}),
        ("a <anna>", {"return_tensors": "pt"}),
        ("a <anna> at the sea", {"truncation": True, "max_length": 5}),
        (["a <anna> at the sea"], {"truncation": True, "max_length": 4, "padding": "max_length"}),
        ("a <anna>", {"add_special_tokens": False}),
        ("a cat", {"return_tensors": "pt", "padding": "max_length", "max_length": 9}),
        (["a cat", "two black cats"], {"padding": True}),
        ((), {}),
    ],
)
def test_the_tokenizer_keeps_its_contract(mini_sd, text, options):
    """Packs call it themselves; with a placeholder it gives what it gives for the class word."""
    _, clip, _ = mini_sd
    inner = clip.tokenizer.clip_l.tokenizer
    tokenizer = with_placeholders(clip, [identity()]).tokenizer.clip_l.tokenizer
    if text == ():
        assert tokenizer(["a cat"])["input_ids"] == inner(["a cat"])["input_ids"]
        assert len(tokenizer) == len(inner) and tokenizer.get_vocab() == inner.get_vocab()
        assert tokenizer.encode("a <anna>") == inner.encode("a person")
        assert tokenizer.encode("a cat") == inner.encode("a cat")
        assert tokenizer.tokenize("a <anna>!") == inner.tokenize("a person!")
        return
    words = (
        text.replace("<anna>", "person")
        if isinstance(text, str)
        else [one.replace("<anna>", "person") for one in text]
    )
    made, expected = tokenizer(text, **options), inner(words, **options)
    for name in ("input_ids", "attention_mask"):
        one, other = made[name], expected[name]
        assert type(one) is type(other)
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    assert made.input_ids is made["input_ids"]


def test_an_option_that_placeholders_cannot_be_in(mini_sd):
    _, clip, _ = mini_sd
    tokenizer = with_placeholders(clip, [identity()]).tokenizer.clip_l.tokenizer
    with pytest.raises(TypeError, match="return_offsets_mapping"):
        tokenizer("a <anna>", return_offsets_mapping=True)
    assert tokenizer("a cat", return_special_tokens_mask=True)["special_tokens_mask"]
