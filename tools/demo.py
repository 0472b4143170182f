"""``make demo``: a real ComfyUI server learns a face from one picture and draws it.

Runs ``workflows/quick_start.json`` through the server's HTTP API and leaves what comes out in
``output/demo``. With ``PHOTO`` and ``CKPT`` in the environment it takes the user's own photo and
Stable Diffusion 1.5 checkpoint, and says how alike the pictures are if a model of SeFi Likeness is
in ComfyUI's models folder; else a drawn portrait (``SEED`` chooses whose) and the miniature of
``tests/mini_sd``. The last line is one JSON object with the figures.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sefi_ide.sefi_core import evaluation
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.recognition import INSIGHT, SFACE, FaceEncoder, find_model
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.sefi_core.likeness import judge as compare
from sefi_ide.sefi_core.likeness import words_of
from sefi_ide.tests.mini_sd import judges, render, world
from sefi_ide.tests.mini_sd.wishes import caption_of, shot_of

from .comfyui import REPOSITORY, comfyui_path
from .grid import labelled_grid
from .server import ComfyServer
from .workflow import Prompt, nodes_of, to_prompt

MINIATURE = REPOSITORY / "tests" / "mini_sd" / "mini_sd.safetensors"
OUTPUT = REPOSITORY / "output" / "demo"
QUICK_START = REPOSITORY / "workflows" / "quick_start.json"
NAME = "anna"

# What the person is to do in each picture, in the words of tests/mini_sd/world.py.
WISHES = (
    {"scene": "beach"},
    {"scene": "eiffel", "expression": "smiling"},
    {"scene": "forest", "object": "book"},
    {"scene": "snow", "eyes": "closed"},
    {"scene": "city", "object": "guitar"},
    {"scene": "space", "expression": "surprised"},
    {"scene": "garage", "object": "flower", "expression": "smiling"},
    {"scene": "desert", "expression": "sad"},
)


def main() -> None:
    """Run the demo; settings come from the environment."""
    started = time.monotonic()
    photo, checkpoint = os.environ.get("PHOTO"), os.environ.get("CKPT")
    seed = int(os.environ.get("SEED") or 1)
    picture = (
        upright(Path(photo).expanduser()) if photo else Image.fromarray(draw(seed, "portrait"))
    )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    portrait = OUTPUT / "portrait.png"
    picture.save(portrait)
    if not checkpoint:
        print("No CKPT given: the miniature model is used, which knows drawn faces only.")

    checkpoint = Path(checkpoint).expanduser() if checkpoint else MINIATURE
    with tempfile.TemporaryDirectory(prefix="sefi-demo-") as directory:
        arguments = () if torch.accelerator.is_available() else ("--cpu",)
        with ComfyServer(Path(directory), [checkpoint], arguments) as server:
            prompt = to_prompt(
                json.loads(QUICK_START.read_text(encoding="utf-8")), server.get("/object_info")
            )
            adapt(prompt, server.upload(portrait), checkpoint.name, checkpoint == MINIATURE)
            pictures, train_seconds = learn_and_draw(server, prompt)
            identity = next(Path(directory, "models", "sefi").glob("*.safetensors"))
            shutil.copy(identity, OUTPUT)

    captions = [caption_of(wish, f"<{NAME}>") for wish in WISHES]
    labelled_grid(Image.open(portrait), pictures, captions).save(OUTPUT / "grid.png")
    figures = {
        "images": len(pictures),
        "identity_bytes": (OUTPUT / identity.name).stat().st_size,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "id_mean": None,
        "prompt_share": None,
        "likeness": None,
    }
    if not photo and not os.environ.get("CKPT"):
        figures |= judge(pictures, seed)
    if photo:
        figures["likeness"] = likeness(pictures, picture, comfyui_path() / "models")
    print(f"Look at {(OUTPUT / 'grid.png').relative_to(REPOSITORY)}.")
    print(json.dumps(figures))


def upright(photo: Path) -> Image.Image:
    """A photo as its camera was held, in RGB. A PNG does not keep the note that says how."""
    return ImageOps.exif_transpose(Image.open(photo)).convert("RGB")


def adapt(prompt: Prompt, photo: str, checkpoint: str, miniature: bool) -> None:
    """Put photo and checkpoint into the graph and, for the miniature, its size and guidance."""
    for node in nodes_of(prompt, "LoadImage"):
        node["inputs"]["image"] = photo
    for node in nodes_of(prompt, "CheckpointLoaderSimple"):
        node["inputs"]["ckpt_name"] = checkpoint
    if miniature:
        for node in nodes_of(prompt, "EmptyLatentImage"):
            node["inputs"] |= {"width": 128, "height": 128}
        for node in nodes_of(prompt, "SeFiTrainIdentity"):
            node["inputs"]["resolution"] = 128
        for node in nodes_of(prompt, "KSampler"):
            # What its own check draws with; more guidance overshoots the plain drawings.
            node["inputs"] |= {
                "steps": 20,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
            }


def learn_and_draw(server: ComfyServer, prompt: Prompt) -> tuple[list[Image.Image], float]:
    """Train once, then queue the graph with each wish; saves mask and pictures.

    Returns the pictures and the seconds from queueing the training to its end.
    """
    print("Learning the face ...", flush=True)
    begin = time.monotonic()
    run = server.run(prompt, stop_at=("SeFiSaveIdentity", "MaskPreview"))
    seconds = time.monotonic() - begin
    (OUTPUT / "mask.png").write_bytes(run.pictures("MaskPreview")[0])
    pictures = []
    for number, wish in enumerate(WISHES, start=1):
        words = caption_of(wish, f"<{NAME}>")
        wished = copy.deepcopy(prompt)
        positive_text(wished)["text"] = words
        run = server.run(wished)
        if run.executed("SeFiTrainIdentity"):
            raise RuntimeError("The server trained again though only the prompt had changed.")
        picture = run.pictures("SaveImage")[0]
        file = OUTPUT / f"{number}_{'_'.join(wish.values())}.png"
        file.write_bytes(picture)
        pictures.append(Image.open(io.BytesIO(picture)).convert("RGB"))
        print(f"{words}: {file.relative_to(REPOSITORY)}", flush=True)
    return pictures, seconds


def positive_text(prompt: Prompt) -> dict:
    """The inputs of the text node that the sampler takes as positive."""
    sampler = nodes_of(prompt, "KSampler")[0]
    return prompt[sampler["inputs"]["positive"][0]]["inputs"]


def draw(seed: int, what: str) -> np.ndarray:
    """Pictures of the drawn person that ``seed`` chooses; the miniature has never seen them.

    ``what`` is ``"portrait"`` for one picture (128, 128, 3) or ``"doing"`` for one render of each
    wish (B, 128, 128, 3), uint8.
    """
    look = world.unseen_look(seed)
    if what == "portrait":
        return render.render(world.solo(look, "person", seed)).picture
    return np.stack(
        [
            render.render(shot_of(look, "person", wish, seed + number)).picture
            for number, wish in enumerate(WISHES, start=1)
        ]
    )


def judge(pictures: list[Image.Image], seed: int) -> dict[str, float]:
    """Mean identity similarity to renders of the person, and share of wishes fulfilled."""
    pair = judges.load_judges()
    generated = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])) / 255
    reference = torch.from_numpy(draw(seed, "doing")) / 255
    figures = evaluation.quality(
        pair.identity_similarity(generated, reference), pair.found(generated, WISHES)
    )
    return {
        "id_mean": round(figures["id"], 3),
        "prompt_share": round(figures["prompt"], 3),
    }


def likeness(pictures: list[Image.Image], photo: Image.Image, models: Path) -> float | None:
    """The mean likeness of the pictures to the photo, a picture without a face counting 0.

    Of the photo itself, so that a copy of it is the most alike. None, and a line that says why,
    where ``models`` has no model for it or the photo no face.
    """
    places = ((SFACE, models / "face_recognition"), (INSIGHT, models / "insightface"))
    found = [(kind, path) for kind, folder in places if (path := find_model(kind, [folder]))]
    if not found:
        print(f"No likeness: put {SFACE.files[0]} into {places[0][1]}.")
        return None
    try:
        judged = compare(
            [np.asarray(one) for one in pictures],
            [np.asarray(photo)],
            [],
            YuNetDetector(),
            FaceEncoder(*found[0], use_gpu=False),
        )
    except SeFiError as error:
        print(f"No likeness: {error}.")
        return None
    print("Likeness: " + "; ".join(words_of(one) for one in judged))
    return round(sum(one.likeness for one in judged) / len(judged), 3)


if __name__ == "__main__":
    main()
