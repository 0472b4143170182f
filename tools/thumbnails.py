"""``make thumbnails``: pictures of the templates, cut from what ``make demo`` has left.

ComfyUI shows ``workflows/<name>.jpg`` beside the template ``<name>``.
"""

from __future__ import annotations

from PIL import Image

from .comfyui import REPOSITORY
from .demo import OUTPUT
from .grid import square

SIDE = 256  # pixels, of one of the four pictures in a thumbnail


def main() -> None:
    """Write one thumbnail for each workflow: quick start shows the portrait first."""
    pictures = sorted(OUTPUT.glob("[0-9]*_*.png"))
    if not pictures:
        raise SystemExit("There is nothing in output/demo: run `make demo` first.")
    for name, files in {
        "quick_start": [OUTPUT / "portrait.png", *pictures[:3]],
        "use_identity": pictures[3:7],
    }.items():
        sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE))
        for index, file in enumerate(files):
            sheet.paste(square(Image.open(file), SIDE), (index % 2 * SIDE, index // 2 * SIDE))
        sheet.save(REPOSITORY / "workflows" / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
