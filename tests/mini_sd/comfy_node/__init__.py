"""Test-only custom node: teaches ComfyUI to load the miniature Stable Diffusions."""

import importlib.util
import sys
from pathlib import Path

# As a file: to a server the pack, and so the miniature's package, has another name.
_spec = importlib.util.spec_from_file_location(
    "mini_sd_architecture", Path(__file__).resolve().parent.parent / "architecture.py"
)
architecture = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = architecture  # its dataclasses look themselves up there
_spec.loader.exec_module(architecture)
architecture.register()


NODE_CLASS_MAPPINGS: dict[str, type] = {}
