"""Checks of what comes from the user; links and JSON go around the ranges of the nodes' widgets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch

from .errors import SeFiError, quoted


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raises :class:`SeFiError` unless an input is a number from ``least`` to ``most``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SeFiError(f"{name} is {quoted(value)}: set it to a number")
    if isinstance(value, float) and math.isnan(value):
        raise SeFiError(f"{name} is not a number (NaN): set it from {least:g} to {most:g}")
    if value < least:
        raise SeFiError(f"{name} is {value}: set it to {least:g} or more")
    if value > most:
        raise SeFiError(f"{name} is {value}: set it to {most:g} or less")


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raises :class:`SeFiError` unless an input is a whole number from ``least`` to ``most``."""
    if isinstance(value, float):
        raise SeFiError(f"{name} is {value}: set it to a whole number")
    if not isinstance(value, int) or isinstance(value, bool):
        raise SeFiError(f"{name} is {quoted(value)}: set it to a whole number")
    check_number(name, value, least, most)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises :class:`SeFiError` unless an input is one of its choices."""
    if not isinstance(value, str) or value not in choices:
        raise SeFiError(f"{name} is {quoted(value)}: choose one of {', '.join(choices)}")


def parse_numbers(name: str, text: str, most: int, example: str) -> tuple[float, ...]:
    """The first ``most`` numbers of an input's list; none for an empty text.

    Between them stand commas (Chinese ones too) or, without any comma, spaces and lines. Raises
    :class:`SeFiError`, which gives the ``example``, for anything else.
    """
    if not text.strip():
        return ()
    commas = re.search("[,，]", text)
    parts = re.split("[,，]", text) if commas else text.split()
    numbers = []
    for part in parts[:most]:
        try:
            numbers.append(float(part.strip()))
        except ValueError:
            raise SeFiError(
                f"{name} has {quoted(part.strip())} where a number is needed: write numbers with "
                f'commas between them, such as "{example}"'
            ) from None
    return tuple(numbers)


def check_weights(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises :class:`SeFiError` where what has been trained is not to be kept."""
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise SeFiError(
            f"the {what} has weights that are no numbers or too large for its file, which is not "
            "written: train again with a lower learning rate"
        )
