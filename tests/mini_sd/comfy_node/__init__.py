"""Test-only custom node: teaches ComfyUI to load the miniature Stable Diffusion."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import architecture  # noqa: E402

architecture.register()


NODE_CLASS_MAPPINGS: dict[str, type] = {}
