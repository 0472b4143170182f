"""About a minute of ``make fuzz``, always the same; and that it tells what it finds."""

import os
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from sefi_ide.tests.fuzz.campaign import NotTried, told_of
from sefi_ide.tests.fuzz.children import CAMPAIGNS, watched

CASES = {"files": 1500, "readers": 5, "kills": 30, "training": 4, "graphs": 8, "prompts": 10}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits and processes")
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_minute_of_every_campaign(name):
    told = watched(name, seed=0, cases=CASES[name])
    assert not told["failures"], "\n".join(f"case {n}: {w}" for n, w in told["failures"].items())
    assert told["tried"] == told["clean"] > CASES[name] // 2  # graphs that ComfyUI cannot do


def a_campaign(case):
    @contextmanager
    def prepared():
        yield case

    return SimpleNamespace(NAME="made", SECONDS=60.0, prepared=prepared)


def test_what_failed_is_told_with_its_number_and_comes_again():
    def case(chance):
        number = chance.randrange(4)
        if number == 0:
            raise KeyError("broken")
        if number == 1:
            raise NotTried

    told = told_of(a_campaign(case), seed=3, cases=40)
    assert 0 < told["clean"] < told["tried"] < 40
    assert len(told["failures"]) == told["tried"] - told["clean"]
    for number, what in told["failures"].items():
        assert "KeyError: 'broken'" in what
        again = told_of(a_campaign(case), seed=3, first=number, cases=1)
        assert again["failures"].keys() == {number}


DIES = """
import json, os, sys
from pathlib import Path
first = int(sys.argv[sys.argv.index("--first") + 1])
cases = int(sys.argv[sys.argv.index("--cases") + 1])
note = Path(sys.argv[sys.argv.index("--note") + 1])
for case in range(first, first + cases):
    note.write_text(json.dumps({"case": case, "tried": case - first, "clean": case - first}))
    if case in (2, 5):
        os.abort()
print(json.dumps({"tried": cases, "clean": cases, "failures": {}}))
"""


def test_a_case_that_ends_its_process_is_told_and_the_others_go_on():
    told = watched("files", seed=0, cases=8, command=(sys.executable, "-c", DIES))
    assert (told["tried"], told["clean"]) == (8, 6)
    assert sorted(told["failures"]) == [2, 5]


def test_a_campaign_that_cannot_begin_is_no_clean_one():
    with pytest.raises(RuntimeError, match="did not begin"):
        watched("files", seed=0, cases=8, command=(sys.executable, "-c", "raise SystemExit(3)"))
