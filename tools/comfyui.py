"""Where the ComfyUI is that the tests and the demo run, and that ComfyUI in this process.

Uses the standard library alone: ``make setup`` asks it before there is anything else.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent


def comfyui_path() -> Path:
    """Directory of ComfyUI's ``main.py``.

    In this order: ``$COMFYUI_PATH``; the ComfyUI whose ``custom_nodes`` folder holds the
    pack; the copy that ``make setup`` puts into ``.comfyui/ComfyUI``.
    """
    candidates = [REPOSITORY.parent.parent, REPOSITORY / ".comfyui" / "ComfyUI"]
    if os.environ.get("COMFYUI_PATH"):
        candidates = [Path(os.environ["COMFYUI_PATH"]).expanduser()]
    for candidate in candidates:
        if (candidate / "main.py").is_file() and (candidate / "comfy").is_dir():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"No ComfyUI in {looked}: run `make setup` or set COMFYUI_PATH.")


def name_the_pack() -> None:
    """Make the pack importable as ``sefi_ide``, without running its root ``__init__.py``.

    The repository root need not be on ``sys.path`` for that, and must not come before ComfyUI
    there: both have packages named ``nodes`` and ``tests``.
    """
    package = sys.modules.setdefault("sefi_ide", ModuleType("sefi_ide"))
    package.__path__ = [str(REPOSITORY)]


def start(cpu: bool, prefix: str) -> None:
    """Make ComfyUI importable in this process, and the pack as ``sefi_ide``.

    Call it before anything of ComfyUI is imported, because ComfyUI reads its arguments while it
    is. ``cpu`` keeps it off graphics cards. Models, input and output are in a new directory, whose
    name begins with ``prefix`` and which goes when the process ends. Does nothing where ComfyUI
    has been imported already. Raises ``FileNotFoundError`` without a ComfyUI.
    """
    name_the_pack()
    if "comfy" in sys.modules:
        return
    sys.path.insert(0, str(comfyui_path()))
    from comfy.cli_args import args

    args.cpu = cpu
    args.base_directory = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)


def start_training(arguments: list[str], prefix: str) -> None:
    """As :func:`start`, for one of several processes, each with a graphics card of its own.

    ``arguments`` are those of the command line; with ``--cpu`` there is no graphics card.
    """
    cpu = "--cpu" in arguments
    if not cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # ComfyUI takes the current
    start(cpu, prefix)


if __name__ == "__main__":
    print(comfyui_path())
