"""Placeholders that a prompt has and nobody knows: they would be read as plain text in silence."""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections.abc import Collection

from ..errors import SeFiError
from .placeholders import check_name, placeholder_of

MOST_TOLD = 5
"""Tags, and names beside them, that are told; a prompt may have any number."""

_ALIKE = 0.8
"""How alike a name must be to be what was meant, as difflib counts it: one letter of five."""

# A name of a textual inversion file may have brackets.
_TAG = re.compile(r"(?<!embedding:)<([^<>]+)>", re.IGNORECASE)
_WILDCARD = re.compile(r"__.*__")


def placeholder_mistakes(text: str, names: Collection[str]) -> list[str]:
    """A sentence for each tag of ``text`` that looks like a placeholder and is none of ``names``.

    Only what could be a name counts, or a known name with spaces around it: tags of LoRAs
    (``<lora:anna:1>``) and of other packs have a colon, wildcards (``<__who__>``) underscores, and
    those of XML are closed (``<think>...</think>``).
    """
    inner_texts = dict.fromkeys(match[1] for match in _TAG.finditer(text))
    told = (
        _sentence(inner, names)
        for inner in inner_texts
        if unicodedata.normalize("NFC", inner) not in names
        and f"/{inner}" not in inner_texts
        and _could_be_a_name(inner)
    )
    return list(itertools.islice(filter(None, told), MOST_TOLD))


def _could_be_a_name(inner: str) -> bool:
    try:
        check_name(inner.strip())
    except SeFiError:
        return False
    return not _WILDCARD.fullmatch(inner.strip())


def _sentence(inner: str, names: Collection[str]) -> str:
    """What is wrong with ``<inner>``; "" for a number between two signs, as in ``1 < 2 > 1``."""
    told = f"<{inner}> is no identity here"
    by_folded = {known.casefold(): known for known in names}
    name = unicodedata.normalize("NFC", inner.strip()).casefold()
    if meant := difflib.get_close_matches(name, by_folded, n=1, cutoff=_ALIKE):
        return f"{told}: did you mean {placeholder_of(by_folded[meant[0]])}?"
    if inner != inner.strip():
        return ""
    known = [placeholder_of(one) for one in sorted(names)]
    more = f" and {len(known) - MOST_TOLD} more" if len(known) > MOST_TOLD else ""
    return f"{told} and is read as plain text. Known: {', '.join(known[:MOST_TOLD])}{more}."
