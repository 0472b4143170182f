"""Captions: one for each photo, clear words when they do not fit, and the phrase that fits best."""

import pytest
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.text.captions import LEAST_GAIN, best_phrase, check_captions, with_caption


@pytest.mark.parametrize(
    ("captions", "photos", "expected"),
    [
        ((), 2, ["", ""]),
        (("smiling",), 3, ["smiling"] * 3),
        (("smiling", " on the beach "), 2, ["smiling", "on the beach"]),
        (("", "sad"), 2, ["", "sad"]),
        (("smiling", ""), 2, ["smiling", ""]),
        (("smiling", " ", ""), 3, ["smiling", "", ""]),
        (("smiling", "", " "), 2, ["smiling", ""]),
        (("smiling", ""), 3, ["smiling"] * 3),
        (("smiling", ""), 1, ["smiling"]),
        (("smiling,", "on the beach"), 1, ["smiling, on the beach"]),
    ],
)
def test_one_caption_for_each_photo(captions, photos, expected):
    assert check_captions(captions, photos) == expected


@pytest.mark.parametrize(
    ("captions", "photos", "complaint"),
    [
        (("smiling", "sad"), 3, "2 lines for 3 photos"),
        (("with <ben>",), 1, "brackets"),
        (("very " * 80,), 1, "400 characters"),
    ],
)
def test_captions_that_do_not_fit_are_refused(captions, photos, complaint):
    with pytest.raises(SeFiError, match=complaint):
        check_captions(captions, photos)


def test_a_caption_follows_the_prompt():
    assert with_caption("a photo of <anna>", "smiling") == "a photo of <anna> smiling"
    assert with_caption("a photo of <anna>", "") == "a photo of <anna>"


def test_the_phrase_has_to_save_enough():
    assert best_phrase({"": 1.0, "smiling": 0.9, "sad": 0.95}) == "smiling"
    assert best_phrase({"": 1.0, "smiling": 1.0 - 0.9 * LEAST_GAIN, "sad": 1.2}) == ""
    assert best_phrase({"": 1.0, "smiling": 1.1}) == ""
