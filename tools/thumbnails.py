"""``make thumbnails``: pictures of the templates, all from runs of the miniatures.

ComfyUI shows ``workflows/<name>.jpg`` beside the template ``<name>``. Most are cut from what
``make demo`` and ``make demo FAMILY=sdxl`` have left; *keep the most alike* is run here, with
SFace from the package index, and so is the painted mask, of a robot.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sefi_ide.tests.mini_sd import render, world
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS
from sefi_ide.tests.mini_sd.wishes import caption_of
from sefi_ide.tests.sface import MODEL, SOURCE

from . import photos, templates
from .comfyui import REPOSITORY
from .demo import OUTPUTS, adapt, positive_text, prompt_of, server_arguments
from .grid import square
from .server import ComfyServer
from .workflow import nodes_of

SIDE = 256  # pixels, of one of the four pictures in a thumbnail


def main() -> None:
    """Write one thumbnail for each workflow; those that learn show the portrait first."""
    portrait, *pictures = left_by_demo("sd1")
    save(templates.DRAW, pictures[3:7])
    save(templates.QUICK_START, [portrait, *pictures[:3]])
    sdxl_portrait, *sdxl_pictures = left_by_demo("sdxl")
    save(templates.QUICK_START_SDXL, [sdxl_portrait, *sdxl_pictures[:3]])
    save(templates.APP, [portrait, *pictures[4:7]])
    save(templates.PAINTED_MASK, painted())
    save(templates.MOST_ALIKE, [portrait, *most_alike(OUTPUTS["sd1"] / "portrait.png")])


def left_by_demo(family: str) -> list[Image.Image]:
    """The portrait and the pictures; exits with a sentence when there are none."""
    folder = OUTPUTS[family]
    files = sorted(folder.glob("[0-9]*_*.png"))
    if not files:
        raise SystemExit(
            f"There is nothing in {folder.relative_to(REPOSITORY)}: run `make demo` "
            "and `make demo FAMILY=sdxl` first."
        )
    return [Image.open(file) for file in (folder / "portrait.png", *files)]


def most_alike(portrait: Path) -> list[Image.Image]:
    """The three pictures that the workflow keeps of its eight, the most alike first."""
    fetched = photos.fetch([SOURCE])
    if fetched.missing:
        raise SystemExit(f"SFace is not there: {fetched.missing[MODEL]}")
    checkpoint = CHECKPOINTS["sd1"]
    with tempfile.TemporaryDirectory(prefix="sefi-thumbnails-") as directory:
        server = ComfyServer(Path(directory), [checkpoint], server_arguments())
        server.add_model("face_recognition", MODEL, photos.path_of(SOURCE))
        with server:
            prompt = prompt_of(server, templates.MOST_ALIKE)
            adapt(prompt, server.upload(portrait), checkpoint.name, miniature=True)
            kept = server.run(prompt).pictures("SaveImage")
    return [Image.open(io.BytesIO(picture)) for picture in kept]


def painted() -> list[Image.Image]:
    """A robot, and what was drawn of it after its mask was painted as the mask editor does."""
    look = world.unseen_look(2, "robot")
    rendering = render.render(world.solo(look, "robot", 2))
    portrait = Image.fromarray(rendering.picture)
    photo = portrait.convert("RGBA")
    masks = rendering.regions[0]
    photo.putalpha(Image.fromarray(255 - np.maximum(masks["head"], masks["body"])))
    checkpoint, drawn = CHECKPOINTS["sd1"], []
    with tempfile.TemporaryDirectory(prefix="sefi-thumbnails-") as directory:
        file = Path(directory) / "robot.png"
        photo.save(file)
        with ComfyServer(Path(directory), [checkpoint], server_arguments()) as server:
            prompt = prompt_of(server, templates.PAINTED_MASK)
            adapt(prompt, server.upload(file), checkpoint.name, miniature=True)
            for trainer in nodes_of(prompt, "SeFiTrainIdentity"):
                trainer["inputs"]["class_word"] = "robot"
            for scene in ("beach", "forest", "snow"):
                positive_text(prompt)["text"] = caption_of({"scene": scene}, "<tom>")
                drawn.append(server.run(prompt).pictures("SaveImage")[0])
    return [portrait, *(Image.open(io.BytesIO(picture)) for picture in drawn)]


def save(name: str, pictures: list[Image.Image]) -> None:
    """Four pictures as the thumbnail of a workflow."""
    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for index, picture in enumerate(pictures):
        sheet.paste(square(picture, SIDE), (index % 2 * SIDE, index // 2 * SIDE))
    sheet.save(templates.FOLDER / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
