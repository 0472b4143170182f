"""``make thumbnails``: pictures of the templates, all from runs of the miniatures.

ComfyUI shows ``workflows/<name>.jpg`` beside the template ``<name>``. Most are cut from what
``make demo`` and ``make demo FAMILY=sdxl`` have left; *keep the most alike* is run here, with
SFace from the package index, and so are the painted mask, of a robot, and two people, styles, the
face encoder and the face adapter, with the second drawn world: ``WORLD=2``. ``python -m
tools.thumbnails Two`` writes those only whose names begin so.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from sefi_ide.tests.mini_sd import render, world
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS
from sefi_ide.tests.mini_sd.wishes import caption_of
from sefi_ide.tests.sface import MODEL, SOURCE

from . import photos, templates
from .comfyui import REPOSITORY
from .demo import (
    NAME,
    OUTPUTS,
    adapt,
    add_face_files,
    draw,
    positive_text,
    prompt_of,
    server_arguments,
)
from .grid import square
from .server import ComfyServer
from .workflow import Prompt, nodes_of

SIDE = 256  # pixels, of one of the four pictures in a thumbnail


def main() -> None:
    """Write one thumbnail for each workflow, or for some; those that learn show portraits first."""
    begins = sys.argv[1] if len(sys.argv) > 1 else ""
    made: dict[str, Callable[[], list[Image.Image]]] = {
        templates.DRAW: partial(left_by_demo, "sd1", range(4, 8)),
        templates.QUICK_START: partial(left_by_demo, "sd1", range(4)),
        templates.QUICK_START_SDXL: partial(left_by_demo, "sdxl", range(4)),
        templates.APP: partial(left_by_demo, "sd1", (0, 5, 6, 7)),
        templates.PAINTED_MASK: painted,
        templates.MOST_ALIKE: most_alike,
        templates.TWO_PAINTED: lambda: two()[templates.TWO_PAINTED],
        templates.TWO_FOUND: lambda: two()[templates.TWO_FOUND],
        templates.ENCODER: partial(at_once, templates.ENCODER, f"<{NAME}>"),
        templates.ADAPTER: partial(at_once, templates.ADAPTER, "person"),
        templates.STYLES: in_styles,
    }
    for name, pictures in made.items():
        if name.startswith(begins):
            save(name, pictures())


def left_by_demo(family: str, chosen: Sequence[int]) -> list[Image.Image]:
    """Of the portrait (0) and the pictures; exits with a sentence when there are none."""
    folder = OUTPUTS[family]
    files = sorted(folder.glob("[0-9]*_*.png"))
    if not files:
        raise SystemExit(
            f"There is nothing in {folder.relative_to(REPOSITORY)}: run `make demo` "
            "and `make demo FAMILY=sdxl` first."
        )
    shown = (folder / "portrait.png", *files)
    return [Image.open(shown[number]) for number in chosen]


def most_alike() -> list[Image.Image]:
    """The portrait and the three pictures that are kept of eight, the most alike first."""
    portrait = OUTPUTS["sd1"] / "portrait.png"
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
    return [Image.open(portrait), *(Image.open(io.BytesIO(picture)) for picture in kept)]


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


def at_once(workflow: str, word: str) -> list[Image.Image]:
    """A portrait, and what a workflow draws of it with the miniature's face encoder or adapter.

    ``word`` is what prompts call the person.
    """
    portrait, checkpoint, drawn = Image.fromarray(draw(1, "portrait")), CHECKPOINTS["sd1"], []
    with tempfile.TemporaryDirectory(prefix="sefi-thumbnails-") as directory:
        file = Path(directory) / "portrait.png"
        portrait.save(file)
        with ComfyServer(Path(directory), [checkpoint], server_arguments()) as server:
            add_face_files(server)
            prompt = prompt_of(server, workflow)
            adapt(prompt, server.upload(file), checkpoint.name, miniature=True)
            for wish in (
                {"scene": "beach"},
                {"scene": "forest", "object": "book"},
                {"scene": "snow"},
            ):
                positive_text(prompt)["text"] = caption_of(wish, word)
                drawn.append(server.run(prompt).pictures("SaveImage")[0])
    return [portrait, *(Image.open(io.BytesIO(picture)) for picture in drawn)]


def in_styles() -> list[Image.Image]:
    """A portrait, and the person in the two styles of the workflow and in a third one."""
    portrait, checkpoint = Image.fromarray(draw(1, "portrait")), CHECKPOINTS["sd1"]
    with tempfile.TemporaryDirectory(prefix="sefi-thumbnails-") as directory:
        file = Path(directory) / "portrait.png"
        portrait.save(file)
        with ComfyServer(Path(directory), [checkpoint], server_arguments()) as server:
            learning = prompt_of(server, templates.QUICK_START)
            adapt(learning, server.upload(file), checkpoint.name, miniature=True)
            server.run(learning, stop_at=("SeFiSaveIdentity",))
            prompt = prompt_of(server, templates.STYLES)
            adapt(prompt, file.name, checkpoint.name, miniature=True)
            drawn = server.run(prompt).pictures("SaveImage")
            positive_text(prompt)["text"] = f"pixel art of <{NAME}> {world.SCENE_PHRASES['city']}"
            drawn.append(server.run(prompt).pictures("SaveImage")[0])
    return [portrait, *(Image.open(io.BytesIO(picture)) for picture in drawn)]


@cache
def two() -> dict[str, list[Image.Image]]:
    """Two people and two pictures of both, by workflow; the halves of the picture are painted."""
    checkpoint, people = CHECKPOINTS["sd1"], {"anna": 1, "ben": 6}
    portraits, masks, drawn = [], [], {}
    with tempfile.TemporaryDirectory(prefix="sefi-thumbnails-") as directory:
        with ComfyServer(Path(directory), [checkpoint], server_arguments()) as server:
            for number, (name, seed) in enumerate(people.items()):
                file, mask = (Path(directory) / f"{name}{end}.png" for end in ("", "_mask"))
                portraits.append(Image.fromarray(draw(seed, "portrait")))
                portraits[-1].save(file)
                learning = prompt_of(server, templates.QUICK_START)
                adapt(learning, server.upload(file), checkpoint.name, miniature=True)
                nodes_of(learning, "SeFiTrainIdentity")[0]["inputs"]["name"] = name
                server.run(learning, stop_at=("SeFiSaveIdentity",))
                paper = np.full((128, 128, 4), 255, np.uint8)
                paper[:, 64 * number : 64 * number + 64, 3] = 0  # as the mask editor paints
                Image.fromarray(paper).save(mask)
                masks.append(server.upload(mask))
            for workflow in templates.TWO:
                prompt = prompt_of(server, workflow)
                adapt(prompt, masks[0], checkpoint.name, miniature=True)
                for node, mask in zip(nodes_of(prompt, "LoadImage"), masks, strict=False):
                    node["inputs"]["image"] = mask
                for node, name in zip(nodes_of(prompt, "SeFiLoadIdentity"), people, strict=True):
                    node["inputs"]["file"] = f"{name}.safetensors"
                pictures = [_together(server, prompt, seed) for seed in (0, 1)]
                drawn[workflow] = [*portraits, *pictures]
    return drawn


def _together(server: ComfyServer, prompt: Prompt, seed: int) -> Image.Image:
    """What a workflow draws of anna and ben."""
    scene = world.SCENE_PHRASES[("beach", "snow")[seed]]
    positive_text(prompt)["text"] = f"a photo of <anna> on the left and <ben> on the right {scene}"
    nodes_of(prompt, "KSampler")[0]["inputs"]["seed"] = seed
    return Image.open(io.BytesIO(server.run(prompt).pictures("SaveImage")[0]))


def save(name: str, pictures: list[Image.Image]) -> None:
    """Four pictures as the thumbnail of a workflow."""
    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for index, picture in enumerate(pictures):
        sheet.paste(square(picture, SIDE), (index % 2 * SIDE, index // 2 * SIDE))
    sheet.save(templates.FOLDER / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
