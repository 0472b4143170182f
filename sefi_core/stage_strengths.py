"""How much of an identity each of its stages gets, as a short list: ``1, 1, 0.6, 0.4, 0.4``.

The list begins at the noisiest stage, where sampling begins, while stages are counted from the
least noisy one; see :mod:`.stages`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .checks import check_number, parse_numbers
from .errors import SeFiError

MAX_ENTRIES = 100
"""As many as an identity may have stages."""

LEAST, MOST = -100.0, 100.0

_EXAMPLE = "1, 1, 0.6, 0.4, 0.4"


def parse_strengths(text: str) -> tuple[float, ...]:
    """The numbers of a list, noisiest stage first; none for an empty text.

    Between them stand commas (Chinese ones too) or, without any comma, spaces and lines. Raises
    :class:`SeFiError` for anything else, for numbers outside :data:`LEAST` to :data:`MOST`, and for
    more than :data:`MAX_ENTRIES`.
    """
    return checked_strengths(parse_numbers("stage_strengths", text, MAX_ENTRIES + 1, _EXAMPLE))


def checked_strengths(entries: Sequence[float]) -> tuple[float, ...]:
    """The entries, if they can be of stages; raises as :func:`parse_strengths` does."""
    if len(entries) > MAX_ENTRIES:
        raise SeFiError(
            f"stage_strengths has more than {MAX_ENTRIES} entries: write one for each stage or "
            "fewer"
        )
    for entry in entries:
        check_number("a number of stage_strengths", entry, LEAST, MOST)
    return tuple(entries)


def strengths_of_stages(entries: Sequence[float], stages: int) -> tuple[float, ...]:
    """The strength of each stage, the least noisy one first; no entries are 1 everywhere.

    Fewer entries than stages are stretched: each stands for as many stages as the others, or one
    more or less. Raises :class:`SeFiError` for more entries than stages.
    """
    if not entries:
        return (1.0,) * stages
    if len(entries) > stages:
        raise SeFiError(
            f"stage_strengths has {len(entries)} entries and the identity {stages} stages: write "
            "one entry for each stage or fewer"
        )
    return tuple(entries[place * len(entries) // stages] for place in reversed(range(stages)))
