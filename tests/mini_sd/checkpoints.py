"""The shipped checkpoints of the miniatures, by family; needs no ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent
CHECKPOINTS = {
    "sd1": _FOLDER / "mini_sd.safetensors",
    "sdxl": _FOLDER / "mini_sdxl.safetensors",
}

FACE_ENCODER = Path(__file__).with_name("face_encoder.safetensors")
"""Of the drawn world, for the first miniature; ``make encoder-mini`` makes it."""


def chosen_family() -> str:
    """The family that ``FAMILY`` in the environment names; ``sd1`` where it names none.

    Raises ``SystemExit`` with a sentence when there is no such miniature.
    """
    family = os.environ.get("FAMILY") or "sd1"
    if family not in CHECKPOINTS:
        raise SystemExit(f"FAMILY is {family}; there are {', '.join(CHECKPOINTS)}.")
    if not CHECKPOINTS[family].exists():
        raise SystemExit(
            f"{CHECKPOINTS[family]} is not there: "
            f"`python tests/mini_sd/train.py --family {family}` makes it."
        )
    return family
