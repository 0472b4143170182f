"""How a benchmark ends: bars in words, figures in one line of JSON, and the exit code."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)


def rounded(figures: Any) -> Any:
    """Mappings and sequences of numbers, at any depth, with four places each."""
    if isinstance(figures, Mapping):
        return {name: rounded(part) for name, part in figures.items()}
    if isinstance(figures, Sequence):
        return [rounded(part) for part in figures]
    return round(figures, 4)


def finish(figures: Mapping[str, Any], missed: Sequence[str] = ()) -> int:
    """Log what was ``missed``, write the figures as the last line; returns the exit code."""
    for line in missed:
        logger.error("missed: %s", line)
    sys.stdout.write(json.dumps(rounded(figures)) + "\n")
    return 1 if missed else 0
