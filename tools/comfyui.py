"""Where the ComfyUI is that the tests and the demo run."""

import os
from pathlib import Path

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


if __name__ == "__main__":
    print(comfyui_path())
