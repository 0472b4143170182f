"""Prompt scores and ID(P), with embeddings that are known."""

import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.prompt_score import (
    Rule,
    Scores,
    in_plain_words,
    prompts_for,
    scored,
    texts_to_compare,
)

E = torch.eye(3)
TEXTS = {"on the beach": E[0], "in the snow": E[1], "a photo of a person": E[2]}


def test_a_prompt_for_each_picture_or_one_for_all():
    assert prompts_for("one\n\n  two \n", 2) == ["one", "two"]
    assert prompts_for("one", 3) == ["one"] * 3
    with pytest.raises(SeFiError, match="prompts has 2 lines and images has 3 pictures"):
        prompts_for("one\ntwo", 3)
    with pytest.raises(SeFiError, match="prompts is empty"):
        prompts_for(" \n ", 1)


def test_placeholders_become_their_class_words():
    words = {"anna": "old woman", "rex": "dog"}
    assert in_plain_words("a photo of <anna> with <rex>, smiling", words) == (
        "a photo of old woman with dog, smiling"
    )
    with pytest.raises(SeFiError, match="<bob>.*connect its identity"):
        in_plain_words("<anna> and <bob>", words)
    assert in_plain_words("5 < 6 and <lora:anna:1> stay", words) == "5 < 6 and <lora:anna:1> stay"


def test_the_bare_class_word_is_compared_with_and_no_text_is_there_twice():
    assert texts_to_compare(["x", "y", "x"], {"rex": "dog", "pip": "dog"}) == [
        "x",
        "y",
        "a photo of a dog",
    ]
    assert texts_to_compare(["a photo of a person"], {}) == ["a photo of a person"]


def test_the_score_is_the_cosine_with_the_own_prompt_whatever_the_lengths():
    pictures = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.5, 0.0]])
    scores = scored(pictures, TEXTS, ["on the beach", "in the snow"], Rule())
    assert scores.cosines == pytest.approx([0.6, 1.0])
    assert scores.mean == pytest.approx(0.8)
    assert scores.fulfilled == [False, True]  # the first is closer to the snow
    assert scores.share == 0.5


def test_a_portrait_that_ignores_its_prompt_is_closer_to_the_bare_class_word():
    pictures = torch.tensor([[0.6, 0.0, 0.8]])
    assert scored(pictures, TEXTS, ["on the beach"], Rule()).fulfilled == [False]
    alone = {"on the beach": E[0], "a photo of a person": E[2]}
    assert scored(pictures, alone, ["on the beach"], Rule("threshold", 0.6)).fulfilled == [True]
    assert scored(pictures, alone, ["on the beach"], Rule("threshold", 0.61)).fulfilled == [False]


def test_one_text_alone_cannot_be_the_closest():
    with pytest.raises(SeFiError, match="set fulfilled to 'threshold'"):
        scored(E[:1], {"a photo of a person": E[0]}, ["a photo of a person"], Rule())


def test_id_p_counts_likeness_only_where_the_prompt_is_fulfilled():
    scores = Scores(["a", "b", "c"], [0.3, 0.1, 0.2], [True, False, True])
    figures = scores.quality([0.9, 0.8, -0.1])
    assert figures == pytest.approx({"id": 1.6 / 3, "prompt": 2 / 3, "id_p": 0.8 / 3})
    with pytest.raises(SeFiError, match="likeness is of 2 pictures and images are 3"):
        scores.quality([0.1, 0.2])


def test_the_table_has_a_line_for_each_picture():
    scores = Scores(["a | b", "c"], [0.3, 0.1], [True, False])
    assert scores.table().splitlines()[2] == "| 0 | 0.300 | yes | a / b |"
    assert scores.table([0.5, -0.25]).splitlines()[3] == "| 1 | 0.100 | no | -0.250 | c |"


@pytest.mark.parametrize(
    "wrong", [{"fulfilled": "often"}, {"threshold": 2.0}, {"threshold": float("nan")}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(SeFiError, match=next(iter(wrong))):
        Rule(**wrong)
