"""One text for the content of plain values and tensors, the same in every process.

Values are told apart by kind and length before they are hashed, so that no two that differ run
into one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_ROW = 256
"""Words of eight bytes that are added up before they are hashed; see :func:`weights_digest`."""

Describe = Callable[[object], object]
"""What stands for an object that is not plain: other plain values."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def digest(value: object, describe: Describe | None = None) -> str:
    """SHA-256, as 64 hexadecimal digits, of a value and all within it.

    Plain are None, numbers, texts, bytes, lists, tuples, sets, dicts, PyTorch's types and devices,
    and tensors, of which every byte counts. Anything else goes through ``describe``; without it
    TypeError is raised.
    """
    sha = hashlib.sha256()
    _feed(sha.update, value, describe)
    return sha.hexdigest()


def weights_digest(tensor: torch.Tensor) -> str:
    """The same of a large tensor, at the speed of memory, on the device where it is.

    Its bits are added up in rows of 2 KiB, as whole numbers, and the sums are hashed: any value
    that changes is seen, but not an exchange of values within a row. For weights, not for
    pictures.
    """
    with torch.inference_mode():
        whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if whole.storage_offset() % 8:  # where no whole number of eight bytes may begin
            whole = whole.clone()
        rows = len(whole) // (8 * _ROW)
        sums = whole[: rows * 8 * _ROW].view(torch.int64).view(rows, _ROW).sum(1)
        rest = whole[rows * 8 * _ROW :]
        return digest([str(tensor.dtype), list(tensor.shape), _bytes(sums), _bytes(rest)])


def _feed(update: Callable[[bytes], None], value: Any, describe: Describe | None) -> None:
    def say(kind: str, content: bytes) -> None:
        update(f"{kind}:{len(content)}:".encode())
        update(content)

    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        # By type too: 1, 1.0 and True are equal, and subclasses may be said in another way.
        say(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        say("bytes", value)
    elif isinstance(value, torch.Tensor):
        say("tensor", f"{value.dtype} {list(value.shape)}".encode())
        say("bytes", _bytes(value.detach().contiguous().reshape(-1).view(torch.uint8)))
    elif isinstance(value, Mapping):
        say("mapping", str(len(value)).encode())
        for key, part in value.items():
            _feed(update, key, describe)
            _feed(update, part, describe)
    elif isinstance(value, (list, tuple)):
        say("list", str(len(value)).encode())
        for part in value:
            _feed(update, part, describe)
    elif isinstance(value, (set, frozenset)):
        say("set", "".join(sorted(digest(part, describe) for part in value)).encode())
    elif describe is None:
        raise TypeError(f"a {type(value).__name__} is no plain value")
    else:
        _feed(update, ("described", describe(value)), describe)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
