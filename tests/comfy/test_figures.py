"""``make bench-figures``: parts of an identity, and what they change."""

import pytest
import torch
from sefi_ide.benchmarks import figures
from sefi_ide.sefi_core.identity.identity import Identity

from .learning import learned


def test_parts_of_an_identity(mini):
    whole = learned(mini, learning_rate=0.05, stages=5)
    word = figures.class_word_embedding(mini.clip, "person")
    parts = dict(figures.parts_of(whole, word))
    plain = word["l"].expand_as(whole.key_vectors["l"])
    assert torch.equal(parts["only K"].key_vectors["l"], whole.key_vectors["l"])
    assert torch.equal(parts["only K"].value_vectors["l"], plain)
    assert torch.equal(parts["only V"].key_vectors["l"], plain)
    noisiest = parts["stage 1 of 5"]
    for vectors, own in (
        (noisiest.key_vectors, whole.key_vectors),
        (noisiest.value_vectors, whole.value_vectors),
    ):
        assert torch.equal(vectors["l"][4], own["l"][4])
        assert torch.equal(vectors["l"][:4], plain[:4])


def test_parts_keep_what_their_title_says():
    """Each stage and role is learned, or the class word's, as the title of the part tells."""
    word = torch.full((1, 4), 9.0)
    keys, values = torch.rand(3, 1, 4), torch.rand(3, 1, 4)
    learned = Identity("anna", "person", "sd1", {"l": keys}, {"l": values})
    kept = {
        title: tuple(
            (rows["l"] != word).all(2)[:, 0].tolist()
            for rows in (part.key_vectors, part.value_vectors)
        )
        for title, part in figures.parts_of(learned, {"l": word})
    }
    none, everything = [False] * 3, [True] * 3
    # Stage 0 is the last, least noisy one.
    noisiest, middle, last = [False, False, True], [False, True, False], [True, False, False]
    assert kept == {
        figures.NEITHER: (none, none),
        "K and V": (everything, everything),
        "only K": (everything, none),
        "only V": (none, everything),
        "stage 1 of 3": (noisiest, noisiest),
        "stage 2 of 3": (middle, middle),
        "stage 3 of 3": (last, last),
    }
    assert next(iter(kept)) == figures.NEITHER


def test_change_tells_layout_from_detail():
    grey = torch.full((1, 128, 128, 3), 0.5)
    brighter = figures.change(grey + 0.1, grey)
    assert brighter["layout"] == pytest.approx(0.1, rel=1e-3)
    assert brighter["detail"] == pytest.approx(0.0, abs=1e-6)
    stripes = grey.clone()
    stripes[:, ::2] += 0.1
    stripes[:, 1::2] -= 0.1
    striped = figures.change(stripes, grey)
    assert striped["layout"] == pytest.approx(0.0, abs=1e-6)
    assert striped["detail"] == pytest.approx(0.1, rel=1e-3)


def test_parts_are_shown_in_a_table():
    row = {name: number / 8 for number, name in enumerate(figures.FIGURES)}
    header, _, line = figures.markdown({"only K": row}).splitlines()
    assert header == "| learned part | id | prompt | id_p | leak | layout | detail |"
    assert line == "| only K | 0.000 | 0.125 | 0.250 | 0.375 | 0.500 | 0.625 |"
