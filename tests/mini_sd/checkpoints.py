"""The checkpoints of the miniatures, by family; needs no ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path

from .editions import EDITION, FIRST

_FOLDER = Path(__file__).parent
_FILES = {"sd1": "mini_sd.safetensors", "sdxl": "mini_sdxl.safetensors"}
FIRST_WORLD = {family: _FOLDER / file for family, file in _FILES.items()}
"""Those of the first world, which the others learn on from."""
BUILD = _FOLDER.parents[1] / "build"
_WORLD = _FOLDER if EDITION is FIRST else _FOLDER / f"world_{EDITION.number}"
CHECKPOINTS = {family: _WORLD / file for family, file in _FILES.items()}
"""Those of this process's world."""

FACE_ENCODER = _WORLD / "face_encoder.safetensors"
"""Of that world, for the first miniature; ``make encoder-mini`` makes it."""

FACE_ADAPTER = _WORLD / "face_adapter.safetensors"
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
