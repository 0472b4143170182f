"""Placeholders that nobody knows, told in a sentence each."""

import pytest
from sefi_ide.sefi_core.text.mistakes import MOST_TOLD, placeholder_mistakes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a person",
        "a photo of <anna>, (<anna>:1.2)",
        "<Jose\u0301>",
        "<lora:anna:1> <lyco:x:0.5> <hypernet:y:1> <LORA:bob>",
        "__who__ <__who__> {red|blue} [bob] (bob:1.1)",
        "embedding:<bob> EMBEDDING:<bob>",
        "<think>a photo of</think> <anna>",
        "1 < 2 > 1, <- and ->, <3, <>, <<>>, < >",
        "<|endoftext|> </b> <a b> <b/> <b\u200d> <x@y> <a.b>",
    ],
)
def test_nothing_is_wrong(text):
    assert placeholder_mistakes(text, {"anna", "Jos\u00e9"}) == []


def test_an_unknown_one_and_what_is_known():
    assert placeholder_mistakes("<bob> by <anna>", {"vera", "anna"}) == [
        "<bob> is no identity here and is read as plain text. Known: <anna>, <vera>."
    ]


@pytest.mark.parametrize(
    "tag, meant",
    [
        ("<Anna>", "<anna>"),
        ("<ANNA>", "<anna>"),
        ("< anna >", "<anna>"),
        ("<ana>", "<anna>"),
        ("<anna2>", "<anna_2>"),
        ("<vera>", "<Vera>"),
    ],
)
def test_what_was_meant(tag, meant):
    (told,) = placeholder_mistakes(f'a photo of "{tag}"', {"anna", "anna_2", "Vera"})
    assert told == f"{tag} is no identity here: did you mean {meant}?"


def test_each_is_told_once_and_not_more_than_a_few():
    assert len(placeholder_mistakes("<bob> <bob> (<bob>:1.2)", {"anna"})) == 1
    text = " ".join(f"<stranger_{number}>" for number in range(99))
    assert len(placeholder_mistakes(text, {"anna"})) == MOST_TOLD
    (told,) = placeholder_mistakes("<q>", {f"known-{number}" for number in range(9)})
    assert told.endswith("<known-4> and 4 more.")


def test_long_texts_take_no_time():
    assert placeholder_mistakes("<" * 200_000 + "a" * 200_000, {"anna"}) == []
