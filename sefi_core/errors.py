"""The pack's one exception for things that the user can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SeFiError(ValueError):
    """A mistake that the user can put right.

    The message is one clear sentence in plain English: what is wrong, with which input or file,
    and what to do about it. ComfyUI shows it after the name of the class.
    """

    # A custom node's own modules are named by their path on the user's disk.
    __module__ = "sefi_ide"


@contextmanager
def raised_by(node: str) -> Iterator[None]:
    """Put the display name of a node in front of every :class:`SeFiError` of the block.

    ``with raised_by("SeFi Save Identity"): ...`` lets the core speak of files and settings without
    knowing which node asked for them.
    """
    try:
        yield
    except SeFiError as error:
        raise SeFiError(f"{node}: {error}") from error
