"""Crafted identity files, most of them under a right checksum.

Whatever a file holds, reading it gives an identity that can be saved and read again, or one
sentence, within two seconds and some memory.
"""

from __future__ import annotations

import io
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image

from ...sefi_core.errors import SeFiError
from ...sefi_core.identity.file import from_bytes, to_bytes
from ...sefi_core.identity.identity import Identity
from ...sefi_core.identity.thumbnail import picture_in
from .crafted import crafted

NAME = "files"
SECONDS = 20.0

MOST_SECONDS = 2.0
"""Of processor time that one file may take."""

MOST_MEMORY = 512 * 2**20
"""Bytes that all cases together may take more than the first ones."""

ADDRESSES = 2 * 2**30
"""Bytes of address space beyond what the process has at the start."""

PATH = Path("people/anna.safetensors")


def assert_sound(found: Identity) -> None:
    """What came out can be used, and kept."""
    for vectors in (*found.key_vectors.values(), *found.value_vectors.values()):
        assert vectors.dtype == torch.float32 and vectors.ndim == 3 and vectors.numel() > 0
        assert torch.isfinite(vectors).all() and vectors.is_contiguous()
    if found.thumbnail is not None:
        picture = picture_in(found.thumbnail)
        assert picture.dtype == torch.uint8 and picture.ndim == 3 and max(picture.shape) <= 256
        Image.fromarray(picture.numpy()).save(io.BytesIO(), "PNG")
    again = from_bytes(to_bytes(found), PATH)
    assert again.same_content(found)


def assert_sentence(error: SeFiError) -> None:
    message = str(error)
    message.encode()
    assert str(PATH) in message and ": " in message and "\n" not in message, message
    assert len(message) < 1500, len(message)


def case(chance: random.Random) -> None:
    sound, content, is_sealed = crafted(chance)
    began = time.process_time()
    try:
        found = from_bytes(content, PATH)
    except SeFiError as error:
        assert_sentence(error)
    else:
        if not is_sealed and content != sound:
            assert found.same_content(from_bytes(sound, PATH)), "a change went unseen"
        assert_sound(found)
    assert time.process_time() - began < MOST_SECONDS


@contextmanager
def prepared() -> Iterator[Callable[[random.Random], None]]:
    for number in range(200):  # what is loaded once
        with suppress(Exception):
            case(random.Random(number))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def within_memory(chance: random.Random) -> None:
        case(chance)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * (1 if sys.platform == "darwin" else 1024) < MOST_MEMORY, f"{grown} KiB more"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of broken APNGs
        yield within_memory
