"""The pack under the name ``sefi_ide``, without running its root ``__init__.py``.

Tests write ``from sefi_ide.sefi_core.identity.identity import Identity``. The repository root
never goes on ``sys.path``: the pack's ``nodes`` package would hide ComfyUI's ``nodes.py``.
"""

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

runpy.run_path(str(REPOSITORY / "tools" / "comfyui.py"))["name_the_pack"]()
