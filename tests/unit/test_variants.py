"""Which of the cases that differ in family or renderer alone are run."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

from sefi_ide.tests.conftest import in_turn

FAMILIES = ("sd1", "sd2", "sdxl")


def item(name: str, **parameters):
    if not parameters:
        return SimpleNamespace(nodeid=name)
    text = "-".join(map(str, parameters.values()))
    return SimpleNamespace(nodeid=f"{name}[{text}]", callspec=SimpleNamespace(params=parameters))


def names(items) -> list[str]:
    return [one.nodeid for one in items]


def test_each_case_once_and_each_family_in_its_turn():
    cases = [
        item("a", case=case, family=family)
        for case, family in itertools.product(("x", "y", "z"), FAMILIES)
    ]
    assert names(in_turn(cases)) == ["a[x-sd1]", "a[y-sd2]", "a[z-sdxl]"]


def test_what_has_no_variants_stays_in_its_order():
    items = [
        item("a"),
        item("b", case=1),
        *(item("c", family=family) for family in FAMILIES),
        *(item("d", page=page) for page in ("classic", "vue")),
        item("b", case=2),
        item("e"),
    ]
    assert names(in_turn(items)) == ["a", "b[1]", "c[sd1]", "d[vue]", "b[2]", "e"]


def test_a_family_more_in_some_cases():
    cases = [item("a", family=family) for family in FAMILIES]
    cases += [item("b", family="sd1"), item("c", family="sd1"), item("c", family="sd2")]
    assert names(in_turn(cases)) == ["a[sd1]", "b[sd1]", "c[sd2]"]
