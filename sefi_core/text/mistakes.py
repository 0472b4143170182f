"""Placeholders that a prompt has and nobody knows: they would be read as plain text in silence."""

from __future__ import annotations

import difflib
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

    Only what could be a name counts, with or without spaces around it: tags of LoRAs
    (``<lora:anna:1>``) and of other packs have a colon, wildcards (``<__who__>``) underscores.
    """
    tags = (
        (match[0], unicodedata.normalize("NFC", match[1]))
        for match in _TAG.finditer(text)
        if not _WILDCARD.fullmatch(match[1].strip())
    )
    strangers = dict.fromkeys(
        (tag, inner.strip()) for tag, inner in tags if inner not in names and _is_name(inner)
    )
    return [_sentence(tag, name, names) for tag, name in list(strangers)[:MOST_TOLD]]


def _is_name(inner: str) -> bool:
    try:
        check_name(inner.strip())
    except SeFiError:
        return False
    return True


def _sentence(tag: str, name: str, names: Collection[str]) -> str:
    told = f"{tag} is no identity of this CLIP and is read as plain text"
    by_folded = {known.casefold(): known for known in names}
    if meant := difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=_ALIKE):
        return f"{told}: did you mean {placeholder_of(by_folded[meant[0]])}?"
    known = [placeholder_of(one) for one in sorted(names)]
    more = f" and {len(known) - MOST_TOLD} more" if len(known) > MOST_TOLD else ""
    return f"{told}. Known here: {', '.join(known[:MOST_TOLD])}{more}."
