"""Tell the user of placeholders that a CLIP does not know, on the node that encodes them."""

from __future__ import annotations

import logging
from functools import lru_cache

from comfy.sd import CLIP

from ...errors import printable
from ...text.mistakes import placeholder_mistakes
from .. import notices
from .tokens import known_names

logger = logging.getLogger(__name__)


def tell_unknown_placeholders(clip: CLIP, text: str) -> None:
    """Say on the running node, and once in the log, which tags of a text are no placeholders.

    What the node was told in a run before is taken away where nothing is wrong any more.
    """
    mistakes = placeholder_mistakes(text, known_names(clip))
    notices.warn(mistakes)
    for mistake in mistakes:
        _log_once(mistake)


@lru_cache(maxsize=1024)
def _log_once(mistake: str) -> None:
    logger.warning("In a prompt: %s", printable(mistake))
