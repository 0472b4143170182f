"""What ``make bench-styles`` asks for and tells; its second world is for a process of its own."""

from __future__ import annotations

import pytest
from sefi_ide.benchmarks import styles


def test_the_phrase_of_a_style_is_weighted():
    wish = {"style": "oil", "scene": "beach"}
    plain, weighted = (styles.caption_of(wish, "<anna>", how) for how in (False, True))
    assert "<anna>" in plain and plain.endswith("as an oil painting")
    assert weighted == plain.replace("as an oil painting", "(as an oil painting:1.3)")


def test_every_other_round_of_styles_asks_for_more(monkeypatch):
    monkeypatch.setattr(styles.world, "STYLES", ("photo", "pencil", "oil"))
    asked = styles.wishes_of(styles.Styled("plain", 3, 6))
    assert [wish["style"] for wish in asked] == ["pencil", "oil"] * 3
    assert [len(wish) for wish in asked] == [1, 1, 2, 2, 1, 1]
    assert asked == styles.wishes_of(styles.Styled("own", 3, 6))  # all rows have the same


def test_equal_work_is_done_once_and_another_way_again(monkeypatch):
    job = styles.Styled("own", 0, 8)
    assert job.key == styles.Styled("own", 0, 8).key != styles.Styled("same", 0, 8).key
    before = job.key
    monkeypatch.setitem(styles.WAYS, "own", styles.Way("mixed, own", trajectory="same"))
    assert job.key != before


def test_the_table_has_a_row_for_each_way():
    figures = {"style": 0.5, "id": 0.8, "prompt": 0.75, "id_p": 0.4}
    rows = {"plain": [figures, figures], "own": [figures, {**figures, "style": 1.0}]}
    made = styles.summary(rows)
    assert made["own"]["style"][0] == pytest.approx(0.75) and made["plain"]["id_p"][0] == 0.4
    lines = styles.markdown(made).splitlines()
    assert lines[0] == "| | style found | ID | Prompt | ID(P) |" and len(lines) == 4
    assert lines[3].startswith("| mixed, own |")


def test_the_first_world_is_refused():
    with pytest.raises(SystemExit, match="run with WORLD=2"):
        styles.main()


def test_an_unknown_row_is_refused(monkeypatch):
    monkeypatch.setattr(styles, "EDITION", None)
    monkeypatch.setenv("ROWS", "plain mine")
    with pytest.raises(SystemExit, match="ROWS has mine; there are class_word, plain"):
        styles.main()
