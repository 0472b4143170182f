"""The pack under the name ``sefi_ide``, without running its root ``__init__.py``.

Tests write ``from sefi_ide.sefi_core.identity.identity import Identity``. The repository root
never goes on ``sys.path``: the pack's ``nodes`` package would hide ComfyUI's ``nodes.py``.
"""

import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent

package = sys.modules.setdefault("sefi_ide", ModuleType("sefi_ide"))
package.__path__ = [str(REPOSITORY)]
