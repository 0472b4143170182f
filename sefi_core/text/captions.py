"""What a photo shows beside the identity: said in the training prompts, it need not be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import SeFiError, quoted

AUTO = "auto"
"""Stands for the expression that the model itself sees in the photo."""

EXPRESSIONS = ("smiling", "laughing", "sad", "angry", "surprised", "with eyes closed")
"""What ``AUTO`` chooses from; none of them is a choice too."""

LEAST_GAIN = 0.02
"""Share of the noise loss that a phrase has to save; less may be chance."""

MAX_CAPTION_LENGTH = 300


def check_captions(captions: Sequence[str], photos: int) -> list[str]:
    """One caption for each of ``photos`` photos, "" for none.

    One caption is for all of them, and all captions are for a single photo; empty ones at the end
    that are too many are dropped. Raises :class:`SeFiError` for another number, for captions that
    are too long, and for those that name a placeholder.
    """
    captions = list(captions) if photos > 1 else [" ".join(captions)]
    while len(captions) not in (0, 1, photos) and not captions[-1].strip():
        captions.pop()
    if len(captions) not in (0, 1, photos):
        raise SeFiError(
            f"captions has {len(captions)} lines for {photos} photos: write one line for each "
            "photo, in their order, or one for all"
        )
    for caption in captions:
        check_caption(caption)
    spread = captions if len(captions) == photos else list(captions or [""]) * photos
    return [caption.strip() for caption in spread]


def check_caption(caption: str) -> None:
    """Raises :class:`SeFiError` for a caption that is too long or names a placeholder."""
    if "<" in caption or ">" in caption:
        raise SeFiError(
            f"the caption {quoted(caption)} has brackets: write only what the photo shows "
            'beside the person, for example "smiling, on the beach"'
        )
    if len(caption) > MAX_CAPTION_LENGTH:
        raise SeFiError(
            f"a caption has {len(caption)} characters: write at most {MAX_CAPTION_LENGTH}"
        )


def with_caption(prompt: str, caption: str) -> str:
    """``"a photo of <anna> smiling"``."""
    return f"{prompt} {caption}" if caption else prompt


def best_phrase(losses: Mapping[str, float]) -> str:
    """The phrase that explains a photo best, "" if none saves :data:`LEAST_GAIN`.

    ``losses`` are the noise losses with each phrase in the prompt, and with none ("").
    """
    best = min(losses, key=losses.__getitem__)
    return best if losses[best] <= (1.0 - LEAST_GAIN) * losses[""] else ""
