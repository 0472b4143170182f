"""The bytes of an identity file, read once, whatever else happens to the file meanwhile."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from ..errors import SeFiError

MAX_FILE_BYTES = 64 * 2**20
"""More than two thousand times a usual identity; larger files are refused unread."""


class Content(NamedTuple):
    """What was in a file when it was read. Two that are equal: the file has not changed between."""

    data: bytes
    stamp: tuple[int, int, int]
    """The file's inode, size in bytes and time of its last change in nanoseconds, at the start."""


def read_content(path: Path) -> Content:
    """Read a file into memory, opening it once.

    Nothing is mapped: a file that another program cuts off while it is mapped ends the process.
    Raises :class:`SeFiError`, a sentence that names the file and the remedy, if it is missing,
    cannot be read, is no plain file (a pipe is not waited for) or is larger than
    :data:`MAX_FILE_BYTES`.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise not_a_plain_file(path)
            if status.st_size > MAX_FILE_BYTES:
                raise SeFiError(
                    f"the file {path} has {status.st_size / 2**20:.0f} MiB and an identity at most "
                    f"{MAX_FILE_BYTES // 2**20}: choose a file that was written by SeFi Save "
                    "Identity, and move this one to where its kind is kept, such as "
                    "models/checkpoints or models/loras"
                )
            # One byte more, so that a file which has grown since is not taken for whole.
            data = file.read(status.st_size + 1)
            return Content(data, (status.st_ino, status.st_size, status.st_mtime_ns))
    except FileNotFoundError as error:
        raise SeFiError(
            f"the identity file {path} is not there: press R to refresh the lists and choose "
            "another, or save the identity again"
        ) from error
    except IsADirectoryError as error:
        raise not_a_plain_file(path) from error
    except OSError as error:
        raise unreadable(path, error) from error


def not_a_plain_file(path: Path) -> SeFiError:
    """The error for a folder, pipe or device in the place of a file."""
    return SeFiError(
        f"the identity file {path} cannot be read, it is a folder, a pipe or a device and no plain "
        "file: move it away, and choose a file that was written by SeFi Save Identity"
    )


def unreadable(path: Path, error: OSError) -> SeFiError:
    """The error for a file that the system does not let us read."""
    return SeFiError(
        f"the identity file {path} cannot be read ({error.strerror or error}): check that you may "
        "open it and its folder"
    )


def _without_waiting(path: str, flags: int) -> int:
    """Open; a pipe that nobody writes to is opened at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
