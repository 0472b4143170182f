"""Savers that are killed, at any operation and at any time, with hard links and without.

A file is whole, as it was or as it was to be, or it is not there; others are as they were; and the
next saver leaves nothing of the killed one behind.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...sefi_core.comfyui import library
from ...sefi_core.errors import SeFiError
from ...sefi_core.identity import saving
from ...sefi_core.identity.file import read_identity
from . import disk

NAME = "kills"
SECONDS = 60.0

OPERATIONS = ("open", "fsync", "link", "rename", "replace", "unlink", "close", "listdir")
"""Of the module os, which a saver does."""

LAST_OPERATION = 16
"""A save has about a dozen."""


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")  # as on exFAT and many network drives


class DyingFile:
    """A file whose writing counts as an operation too, in whose middle one may be killed."""

    def __init__(self, file: Any, operation: Callable[[Callable[[], Any]], Any]):
        self._file, self._operation = file, operation

    def __enter__(self) -> DyingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._operation(lambda: self._file.write(content[half:]))


def die_at(last: int, before: bool) -> None:
    """From now on this process ends with its operation ``last``: before it, or behind it."""
    done = itertools.count()

    def operation(function: Callable[[], Any]) -> Any:
        number = next(done)
        if number == last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function()
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: operation(lambda: function(*args, **kwargs))

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    saving.open = lambda *args: DyingFile(operation(lambda: open(*args)), operation)


@contextmanager
def prepared() -> Iterator[Callable[[random.Random], None]]:
    torch.set_num_threads(1)
    link = os.link
    with disk.identity_folder() as folder:

        def one_case(chance: random.Random) -> None:
            for path in folder.iterdir():
                path.unlink()
            os.link = link if chance.random() < 0.5 else no_links
            case(folder, chance)

        yield one_case


def case(folder: Path, chance: random.Random) -> None:
    widths = chance.choices([8, 768, 4096], k=2)
    there = chance.random() < 0.6
    if_exists = chance.choice(library.IF_EXISTS)
    library.save_identity(disk.one(7, 8), "other")
    if there:
        library.save_identity(disk.one(1, widths[0]), "anna")

    def save() -> None:
        library.save_identity(disk.one(2, widths[1]), "anna", if_exists)

    last = chance.randrange(LAST_OPERATION)
    before = chance.random() < 0.5
    moment = chance.uniform(0, 0.02)
    if chance.random() < 0.7:

        def attempt() -> None:
            die_at(last, before)
            save()

        child = disk.Child(attempt)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    else:
        child = disk.Child(save)
        disk.pause(moment)
    child.kill()

    def value(name: str) -> float:
        identity = read_identity(folder / name)
        rows = torch.cat([identity.key_vectors["l"], identity.value_vectors["l"]]).unique()
        assert identity.training == {"value": rows.item()}
        return rows.item()

    found = {name: value(name) for name in os.listdir(folder) if name.endswith(".safetensors")}
    old = {"other.safetensors": 7.0} | ({"anna.safetensors": 1.0} if there else {})
    new_name = "anna_2.safetensors" if there and if_exists == "new number" else "anna.safetensors"
    new = old if there and if_exists == "error" else {**old, new_name: 2.0}
    assert found in (old, new), (found, old, new)
    try:
        save()
    except SeFiError as error:
        assert if_exists == "error" and there and "exists already" in str(error)
        library.save_identity(disk.one(7, 8), "other")  # there already, and tidies up
    left = sorted(os.listdir(folder))
    assert left == sorted({*new, saving.LOCK}), left
    assert {name: value(name) for name in new} == new
