"""The shipped workflows. A file's name is the title that ComfyUI shows and its search finds."""

from __future__ import annotations

import json
from typing import Any

from .comfyui import REPOSITORY

FOLDER = REPOSITORY / "workflows"
QUICK_START = "Learn a person from one photo (SD 1.5)"
QUICK_START_SDXL = "Learn a person from one photo (SDXL)"
APP = "Learn a person from one photo, as an app (SD 1.5)"
MOST_ALIKE = "Learn a person and keep the most alike (SD 1.5)"
PAINTED_MASK = "Learn a pet or a thing with a painted mask (SD 1.5)"
DRAW = "Draw a learned person (SD 1.5)"
TWO_PAINTED = "Two people with painted masks (SD 1.5)"
TWO_FOUND = "Two people, places found automatically (SD 1.5)"
TWO = (TWO_PAINTED, TWO_FOUND)
ENCODER = "A person in a second, with a face encoder (SD 1.5)"
ADAPTER = "A person from one photo with a face adapter (SD 1.5)"
STYLES = "Style portraits of a learned person (SD 1.5)"
LEARNING = (QUICK_START, QUICK_START_SDXL, APP, MOST_ALIKE, PAINTED_MASK, ENCODER)
ALL = (*LEARNING, DRAW, *TWO, ADAPTER, STYLES)


def template(name: str) -> dict[str, Any]:
    """A shipped workflow as its file has it. Raises FileNotFoundError for a name without one."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
