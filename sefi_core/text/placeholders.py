"""Placeholders in prompts: ``<anna>`` stands where the class word of the identity would stand.

A placeholder is a name in angle brackets; a name has letters (of any script, with their marks),
digits, ``_`` and ``-``, and its case counts. So LoRA tags such as ``<lora:anna:1>`` are no
placeholders. Names are compared in Unicode's form NFC, as an accent may be a character of its own.
The invisible joiners (U+200C, U+200D) may stand where Persian, Sinhala and others need them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from typing import NamedTuple

from ..errors import SeFiError, quoted

MAX_NAME_LENGTH = 64
MAX_CLASS_WORD_LENGTH = 64

TEMPLATE_PLACEHOLDER = "<name>"
"""Stands in training templates for the placeholder of whichever identity is being trained."""

_JOINERS = "\u200c\u200d"
_VIRAMA = 9
"""Unicode's combining class of the signs that join two letters in the scripts of India."""

_PLACEHOLDER = re.compile(r"<([^<>]+)>")


class Placeholder(NamedTuple):
    """One occurrence of ``<name>`` in a text: ``text[start:end]``, brackets included."""

    name: str
    start: int
    end: int


def check_name(name: str) -> str:
    """``name`` in form NFC if it can be the name of an identity, else raise :class:`SeFiError`."""
    name = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
    if not all(map(_may_be_in_a_name, without_joiners(name) or " ")):
        raise SeFiError(
            f"the name {quoted(name)} cannot be used: give a name of letters, digits, _ and - "
            "only, without spaces or brackets, for example anna or anna_2"
        )
    if len(name) > MAX_NAME_LENGTH:
        raise SeFiError(
            f"the name has {len(name)} characters: give one of at most {MAX_NAME_LENGTH}"
        )
    return name


def without_joiners(text: str) -> str:
    """``text`` without the joiners that change how their neighbours are drawn.

    Those that stand anywhere else stay: nobody could see them.
    """
    around = f" {text} "
    return "".join(
        character
        for before, character, after in zip(around, text, around[2:], strict=False)
        if character not in _JOINERS or not _joins(before, after)
    )


def check_class_word(class_word: str) -> str:
    """Return ``class_word`` without outer spaces if it can be one, else raise :class:`SeFiError`.

    It may be several words ("old man").
    """
    word = class_word.strip() if isinstance(class_word, str) else ""
    if not any(character.isalnum() for character in word):
        raise SeFiError(
            f"the class word {quoted(class_word)} is no word: give the general word for what the "
            "picture shows, for example person, cat or chair"
        )
    if not word.isprintable() or set(word) & set("<>()[]:"):
        raise SeFiError(
            f"the class word {quoted(class_word)} has characters that mean something else in a "
            "prompt: give plain words, for example person or old man"
        )
    if len(word) > MAX_CLASS_WORD_LENGTH:
        raise SeFiError(
            f"the class word has {len(word)} characters: give one of at most "
            f"{MAX_CLASS_WORD_LENGTH}, for example person"
        )
    return word


def placeholder_of(name: str) -> str:
    """``"<anna>"`` for ``"anna"``."""
    return f"<{name}>"


def find_placeholders(text: str, names: Collection[str]) -> list[Placeholder]:
    """All placeholders of ``names`` in ``text``, in order; others are plain text and not listed.

    ``names`` are as :func:`check_name` gives them, and so are those of the placeholders.
    """
    return [
        Placeholder(name, match.start(), match.end())
        for match in _PLACEHOLDER.finditer(text)
        if (name := unicodedata.normalize("NFC", match[1])) in names
    ]


def expand_template(template: str, name: str) -> str:
    """The training prompt that a template gives for the identity ``name``.

    ``"a photo of <name>"`` becomes ``"a photo of <anna>"``; a template that says ``<anna>`` itself
    is fine too. Raises :class:`SeFiError` unless the prompt has the placeholder exactly once.
    """
    placeholder = placeholder_of(name)
    prompt = template.replace(TEMPLATE_PLACEHOLDER, placeholder)
    count = len(find_placeholders(prompt, {name}))
    if count != 1:
        raise SeFiError(
            f"the prompt template {quoted(template)} has the placeholder {count} times: write "
            f"{TEMPLATE_PLACEHOLDER} (or {placeholder}) exactly once in every template, "
            f'for example "a photo of {TEMPLATE_PLACEHOLDER}"'
        )
    return prompt


def _may_be_in_a_name(character: str) -> bool:
    is_mark = unicodedata.category(character).startswith("M")  # as vowels of Hindi and Thai are
    return character.isalnum() or is_mark or character in "_-"


def _joins(before: str, after: str) -> bool:
    """Whether a joiner between the two is of use, roughly as in Unicode's UAX 31: inside a word of
    Arabic letters with their marks, or beside a virama."""
    if not _may_be_in_a_name(before):
        return False
    if _VIRAMA in (unicodedata.combining(before), unicodedata.combining(after)):
        return True
    return unicodedata.bidirectional(before) in ("AL", "NSM") and _may_be_in_a_name(after)
