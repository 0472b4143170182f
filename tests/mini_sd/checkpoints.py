"""The checkpoints of the miniatures, by family; needs no ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path

from .editions import EDITION

_FOLDER = Path(__file__).parent
_FILES = {"sd1": "mini_sd.safetensors", "sdxl": "mini_sdxl.safetensors"}
SHIPPED = {family: _FOLDER / file for family, file in _FILES.items()}
"""Those of the first world."""
BUILD = _FOLDER.parents[1] / "build"
_MADE = _FOLDER if EDITION.number == 1 else BUILD / "mini_sd_2"
CHECKPOINTS = {family: _MADE / file for family, file in _FILES.items()}
"""Those of this process's world."""

FACE_ENCODER = _MADE / "face_encoder.safetensors"
"""Of that world, for the first miniature; ``make encoder-mini`` makes it."""

FACE_ADAPTER = _MADE / "face_adapter.safetensors"
"""For the same, with that encoder; ``make adapter-mini`` makes it."""


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
