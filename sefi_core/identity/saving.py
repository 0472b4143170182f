"""Putting a file into a folder whole or not at all, whoever saves at the same time.

Savers take turns by a lock on the hidden file ``.sefi.lock`` of the folder, which the system lifts
when its holder is killed. So a temporary file that is found under the lock is of a killed saver.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".sefi.lock"

LOCK_SECONDS = 30
"""How long the other savers of a folder are waited for."""

_TEMPORARY = re.compile(r"\.sefi-[0-9a-f]{16}\.tmp")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, safe on the disk; raises OSError."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)


def write_whole(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file into an existing folder: whole or not at all, and safe on the disk after.

    Raises FileExistsError if it is there and ``overwrite`` is false, IsADirectoryError if something
    else than a file is there, and other OSErrors; what was there is then as it was.
    """
    if not overwrite:
        _check_free(path)  # without waiting, and without writing into the folder
    with _locked(path.parent, LOCK_SECONDS):
        _remove_temporaries(path.parent)
        # Not made by tempfile, whose files only their owner can read.
        temporary = path.with_name(f".sefi-{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                _check_replaceable(path)
                os.replace(temporary, path)
            else:
                _move_without_overwriting(temporary, path)
        finally:
            with suppress(OSError):  # the next saver removes it
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed savers, if nobody is saving and the folder allows it."""
    if any(_temporaries(folder)):
        with suppress(OSError), _locked(folder, 0):
            _remove_temporaries(folder)


@contextmanager
def _locked(folder: Path, seconds: float) -> Iterator[None]:
    lock = FileLock(folder / LOCK, timeout=seconds)
    try:
        lock.acquire(poll_interval=0.01)
    except Timeout as error:
        raise OSError(errno.EBUSY, f"another program keeps {folder / LOCK} locked") from error
    try:
        yield
    finally:
        lock.release()


def _temporaries(folder: Path) -> Iterator[Path]:
    return (folder / name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name))


def _remove_temporaries(folder: Path) -> None:
    for leftover in _temporaries(folder):
        with suppress(OSError):
            leftover.unlink()


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _check_replaceable(path: Path) -> None:
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise IsADirectoryError(errno.EISDIR, "it is a folder, a pipe or a device", str(path))


def _move_without_overwriting(temporary: Path, path: Path) -> None:
    """As os.replace, but raises FileExistsError if the target exists, even if only just now."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links on this file system. The lock keeps other savers away between the two, and
        # os.rename never overwrites on Windows.
        _check_free(path)
        os.rename(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can do that."""
    with suppress(OSError):  # not on Windows, nor on some network drives
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
