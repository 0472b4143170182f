"""The pack's one exception for things that the user can put right."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_QUOTE = 200
"""Characters of any input that a message repeats."""


class SeFiError(ValueError):
    """A mistake that the user can put right.

    The message is one clear sentence in plain English: what is wrong, with which input or file,
    and what to do about it. ComfyUI shows it after the name of the class, and sends it as UTF-8:
    what cannot be encoded or printed, from a file's or a user's text, is replaced here.
    """

    # A custom node's own modules are named by their path on the user's disk.
    __module__ = "sefi_ide"

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text that can be encoded as UTF-8 and is one line; what cannot be shown is replaced."""
    return "".join(map(_printable, text))


def quoted(text: object) -> str:
    """A user's text in quotes, for a message: at most :data:`LONGEST_QUOTE` characters of it."""
    text = str(text)
    if len(text) > LONGEST_QUOTE:
        text = text[: LONGEST_QUOTE - 1] + "…"
    return repr(text)


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


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Cf":
        return character  # joiners are part of words in Persian and Sinhala
    return " " if character.isspace() else "\ufffd"
