"""The miniature Stable Diffusion and its world, for benchmarks that run in this process.

Importing this puts ComfyUI and the modules of ``tests/mini_sd`` on the path; it must come before
anything of ComfyUI.
"""

from __future__ import annotations

import sys

from .comfyui import REPOSITORY

sys.path.append(str(REPOSITORY / "tests" / "mini_sd"))  # its modules import one another

import runtime  # noqa: E402

# isort: split
import judges  # noqa: E402
import render  # noqa: E402
import wishes  # noqa: E402
import world  # noqa: E402
from runtime import MiniSDRuntime  # noqa: E402

__all__ = ["MiniSDRuntime", "judges", "render", "runtime", "wishes", "world"]
