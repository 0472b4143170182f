"""What the campaigns share: cases by number, how they are counted, and how a failure is repeated.

A campaign is a module of this package with ``NAME``, ``SECONDS`` (how long one case may take) and
``prepared``, a context manager that gives a function from ``random.Random`` to nothing. One call of
it is one case; it raises where something is not as it should be. All of a case comes from its
``Random``, which comes from the campaign's name, the seed and the case's number.
"""

from __future__ import annotations

import faulthandler
import json
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

REPOSITORY = Path(__file__).resolve().parents[2]

MOST_FAILURES = 10
"""After so many a campaign ends."""

Case = Callable[[random.Random], None]


class Campaign(Protocol):
    NAME: str
    SECONDS: float

    def prepared(self) -> AbstractContextManager[Case]: ...


class NotTried(Exception):
    """A case that ComfyUI does not do without the pack either."""


def chance_of(name: str, seed: int, number: int) -> random.Random:
    """Where everything random of a case comes from."""
    return random.Random(f"{name} {seed} {number}")


def numbers(first: int, cases: int | None, seconds: float | None) -> Iterator[int]:
    """The cases from ``first`` on: at most so many, and none begins after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    number = first
    while (cases is None or number < first + cases) and (end is None or time.monotonic() < end):
        yield number
        number += 1


def told_of(
    campaign: Campaign,
    seed: int,
    first: int = 0,
    cases: int | None = None,
    seconds: float | None = None,
    note: Path | None = None,
) -> dict:
    """Run cases; gives how many were ``tried`` and ``clean``, and the ``failures`` by number.

    A case that hangs ends the process; ``note`` is a file that then holds its number.
    """
    tried = clean = 0
    failures: dict[int, str] = {}
    with campaign.prepared() as case:
        for number in numbers(first, cases, seconds):
            if note is not None:
                note.write_text(json.dumps({"case": number, "tried": tried, "clean": clean}))
            faulthandler.dump_traceback_later(campaign.SECONDS, exit=True)
            try:
                case(chance_of(campaign.NAME, seed, number))
            except NotTried:
                continue
            except KeyboardInterrupt:
                raise
            except BaseException:  # ComfyUI's cancel is no Exception
                failures[number] = traceback.format_exc()
            else:
                clean += 1
            finally:
                faulthandler.cancel_dump_traceback_later()
            tried += 1
            if len(failures) >= MOST_FAILURES:
                break
    return {"tried": tried, "clean": clean, "failures": failures}
