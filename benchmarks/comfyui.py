"""ComfyUI in this process, and the pack under the name ``sefi_ide``, as the tests import it.

Import this before anything of ComfyUI. The repository root must not come before ComfyUI on
``sys.path``, because both have packages named ``nodes`` and ``tests``.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
MINIATURE = REPOSITORY / "tests" / "mini_sd" / "mini_sd.safetensors"

package = sys.modules.setdefault("sefi_ide", ModuleType("sefi_ide"))
package.__path__ = [str(REPOSITORY)]

if "comfy" not in sys.modules:
    from sefi_ide.tools.comfyui import comfyui_path

    sys.path.insert(0, str(comfyui_path()))
    from comfy.cli_args import args

    args.cpu = not torch.accelerator.is_available()
    args.base_directory = tempfile.mkdtemp(prefix="sefi-benchmark-")
    atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)

import comfy.sd  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from sefi_ide.tests.mini_sd import architecture  # noqa: E402


def load(checkpoint: Path) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a checkpoint, with weights that autograd may save.

    A loader node runs in inference mode; everything else is the same.
    """
    architecture.register()
    with torch.inference_mode(False):
        return comfy.sd.load_checkpoint_guess_config(str(checkpoint), embedding_directory=None)[:3]
