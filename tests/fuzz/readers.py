"""Readers beside a writer of any kind.

No process dies and nothing is a mixture of two versions. Where a file is replaced by a rename it is
whole at any time, so none is called damaged either; a writer that stops for long in the middle of
a file may be noticed, in a sentence.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...sefi_core.comfyui import library
from ...sefi_core.errors import SeFiError
from ...sefi_core.identity.file import from_bytes, to_bytes
from . import disk

NAME = "readers"
SECONDS = 60.0

FILE = "anna.safetensors"
SECONDS_OF_READING = 0.3


def copy_over(path: Path, content: bytes, _: random.Random) -> None:
    source = path.with_name("source")
    source.write_bytes(content)
    shutil.copyfile(source, path)


def truncate(path: Path, content: bytes, chance: random.Random) -> None:
    with open(path, "wb") as file:
        _in_pieces(file, content, chance)


def write_in_place(path: Path, content: bytes, chance: random.Random) -> None:
    with open(path, "r+b") as file:
        _in_pieces(file, content, chance)


def rename(path: Path, content: bytes, _: random.Random) -> None:
    source = path.with_name("source")
    source.write_bytes(content)
    os.replace(source, path)


def save(path: Path, content: bytes, _: random.Random) -> None:
    library.save_identity(from_bytes(content, path), path.stem, "overwrite")


WRITERS = (copy_over, truncate, write_in_place, rename, save)
WHOLE_AT_ANY_TIME = (rename, save)


def _in_pieces(file, content: bytes, chance: random.Random) -> None:
    cuts = sorted(chance.randrange(len(content)) for _ in range(chance.choice([1, 1, 5])))
    for start, end in itertools.pairwise([0, *cuts, len(content)]):
        file.write(content[start:end])
        file.flush()
        disk.pause(chance.choice([0, 0.001, 0.02]))


def read(values: set[float], patient: bool) -> int:
    """Read for a while; gives how often."""
    reads, end = 0, time.monotonic() + SECONDS_OF_READING
    while time.monotonic() < end or reads == 0:
        reads += 1
        try:
            library.fingerprint(FILE)
            identity = library.load_identity(FILE)
        except SeFiError as error:
            assert patient and FILE in str(error), error
            continue
        rows = torch.cat([identity.key_vectors["l"], identity.value_vectors["l"]]).unique()
        assert len(rows) == 1 and rows.item() in values, rows
        assert identity.training == {"value": rows.item()}, identity.training
    return reads


@contextmanager
def prepared() -> Iterator[Callable[[random.Random], None]]:
    torch.set_num_threads(1)
    with disk.identity_folder() as folder:
        yield lambda chance: case(folder, chance)


def case(folder: Path, chance: random.Random) -> None:
    write = chance.choice(WRITERS)
    widths = (768,) if write is write_in_place else (8, 768, 4096)
    values = chance.sample(range(100), chance.choice([2, 3]))
    contents = [to_bytes(disk.one(value, chance.choice(widths))) for value in values]
    path = folder / FILE
    path.unlink(missing_ok=True)
    path.write_bytes(contents[0])
    between = chance.choice([0, 0.003, 0.02])

    def write_on() -> None:
        for number in itertools.count():
            write(path, contents[number % len(contents)], chance)
            disk.pause(between)

    writer = disk.Child(write_on)
    patient = write not in WHOLE_AT_ANY_TIME
    readers = [
        disk.Child(lambda: read({float(value) for value in values}, patient))
        for _ in range(chance.randint(1, 3))
    ]
    try:
        for reader in readers:
            assert reader.result() > 0
    finally:
        assert writer.kill(), "the writer ended by itself"
