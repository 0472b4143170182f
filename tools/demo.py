"""``make demo``: a real ComfyUI server learns a face from one picture and draws it.

Runs the quick start through the server's HTTP API and leaves what comes out in ``output/demo``;
``FAMILY=sdxl`` runs that of SDXL and leaves it in ``output/demo_sdxl``. With ``PHOTO`` and ``CKPT``
in the environment it takes the user's own photo and checkpoint, and says how alike the pictures are
and how well they fit their prompts, if the models of SeFi Likeness and of SeFi Prompt Score are in
ComfyUI's models folder; else a drawn portrait (``SEED`` chooses whose) and a miniature of
``tests/mini_sd``, whose judges say it. ``START=predicted`` runs the workflow with a face encoder,
here the miniature's: it predicts the person, and the training goes on from there. The last line is
one JSON object with the figures.
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
from sefi_ide.tests.mini_sd import render, world
from sefi_ide.tests.mini_sd.checkpoints import (
    CHECKPOINTS,
    FACE_ADAPTER,
    FACE_ENCODER,
    chosen_family,
)
from sefi_ide.tests.mini_sd.wishes import caption_of, shot_of

from . import templates
from .comfyui import REPOSITORY, comfyui_path
from .demo_scores import judged, likeness, prompt_scores
from .grid import labelled_grid
from .server import ComfyServer
from .workflow import Prompt, nodes_of, to_prompt

OUTPUTS = {
    "sd1": REPOSITORY / "output" / "demo",
    "sdxl": REPOSITORY / "output" / "demo_sdxl",
}
WORKFLOWS = {"sd1": templates.QUICK_START, "sdxl": templates.QUICK_START_SDXL}
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
    family = chosen_family()
    output = OUTPUTS[family]
    photo, given = os.environ.get("PHOTO"), os.environ.get("CKPT")
    seed = int(os.environ.get("SEED") or 1)
    picture = (
        upright(Path(photo).expanduser()) if photo else Image.fromarray(draw(seed, "portrait"))
    )
    predicted = starts_predicted()
    if predicted and (given or family != "sd1"):
        raise SystemExit("START=predicted is for the miniature: leave out CKPT and FAMILY")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    portrait = output / "portrait.png"
    picture.save(portrait)
    if not given:
        print("No CKPT given: the miniature model is used, which knows drawn faces only.")

    checkpoint = Path(given).expanduser() if given else CHECKPOINTS[family]
    with tempfile.TemporaryDirectory(prefix="sefi-demo-") as directory:
        with ComfyServer(Path(directory), [checkpoint], server_arguments()) as server:
            prompt = prompt_of(server, templates.ENCODER if predicted else WORKFLOWS[family])
            if predicted:
                add_face_files(server)
            adapt(prompt, server.upload(portrait), checkpoint.name, miniature=not given)
            pictures, train_seconds = learn_and_draw(server, prompt, output)
            identity = next(Path(directory, "models", "sefi").glob("*.safetensors"))
            shutil.copy(identity, output)

    captions = [caption_of(wish, f"<{NAME}>") for wish in WISHES]
    labelled_grid(Image.open(portrait), pictures, captions).save(output / "grid.png")
    figures = {
        "images": len(pictures),
        "identity_bytes": (output / identity.name).stat().st_size,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
    }
    figures |= dict.fromkeys(("id_mean", "likeness", "prompt_score", "prompt_share", "id_p"))
    models = comfyui_path() / "models"
    alike = likeness(pictures, picture, models) if photo else None
    if alike is not None:
        figures["likeness"] = round(sum(alike) / len(alike), 3)
    found = {}
    if given:
        word = nodes_of(prompt, "SeFiTrainIdentity")[0]["inputs"]["class_word"]
        plain = [caption.replace(f"<{NAME}>", word) for caption in captions]
        found = prompt_scores(pictures, plain, checkpoint, models, alike)
    elif not photo:
        found = judged(pictures, WISHES, draw(seed, "doing"))
    figures |= {name: round(value, 3) for name, value in found.items()}
    print(f"Look at {(output / 'grid.png').relative_to(REPOSITORY)}.")
    print(json.dumps(figures))


def server_arguments() -> tuple[str, ...]:
    """For ComfyUI's ``main.py``: on the CPU where there is nothing else."""
    return () if torch.accelerator.is_available() else ("--cpu",)


def prompt_of(server: ComfyServer, workflow: str) -> Prompt:
    """One of the shipped workflows, as the server runs it."""
    return to_prompt(templates.template(workflow), server.get("/object_info"))


def upright(photo: Path) -> Image.Image:
    """A photo as its camera was held, in RGB. A PNG does not keep the note that says how."""
    return ImageOps.exif_transpose(Image.open(photo)).convert("RGB")


def adapt(prompt: Prompt, photo: str, checkpoint: str, miniature: bool) -> None:
    """Put photo and checkpoint into the graph; for the miniature its size, guidance and files."""
    for node in nodes_of(prompt, "LoadImage"):
        node["inputs"]["image"] = photo
    for node in nodes_of(prompt, "CheckpointLoaderSimple"):
        node["inputs"]["ckpt_name"] = checkpoint
    if miniature:
        choose_face_files(prompt)
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


def starts_predicted() -> bool:
    """Whether ``START`` in the environment asks for a face encoder's prediction."""
    start = os.environ.get("START") or ""
    if start not in ("", "predicted"):
        raise SystemExit(f"START is {start}: leave it out, or set it to predicted.")
    return start == "predicted"


def add_face_files(server: ComfyServer) -> None:
    """Put the miniature's face encoder and face adapter where the server looks for them."""
    server.add_model("face2diffusion", FACE_ENCODER.name, FACE_ENCODER)
    server.add_model("face_adapters", FACE_ADAPTER.name, FACE_ADAPTER)


def choose_face_files(prompt: Prompt) -> None:
    """Choose these files in the nodes of the graph that load such."""
    for node in nodes_of(prompt, "SeFiLoadFaceEncoder"):
        node["inputs"]["file"] = FACE_ENCODER.name
    for node in nodes_of(prompt, "SeFiLoadFaceAdapter"):
        node["inputs"]["file"] = FACE_ADAPTER.name


def learn_and_draw(
    server: ComfyServer, prompt: Prompt, output: Path
) -> tuple[list[Image.Image], float]:
    """Train once, then queue the graph with each wish; saves mask and pictures in ``output``.

    Returns the pictures and the seconds from queueing the training to its end.
    """
    print("Learning the face ...", flush=True)
    begin = time.monotonic()
    run = server.run(prompt, stop_at=("SeFiSaveIdentity", "SeFiFaceMask"))
    seconds = time.monotonic() - begin
    (output / "mask.png").write_bytes(run.pictures("SeFiFaceMask")[0])
    pictures = []
    for number, wish in enumerate(WISHES, start=1):
        words = caption_of(wish, f"<{NAME}>")
        wished = copy.deepcopy(prompt)
        positive_text(wished)["text"] = words
        run = server.run(wished)
        if run.executed("SeFiTrainIdentity"):
            raise RuntimeError("The server trained again though only the prompt had changed.")
        picture = run.pictures("SaveImage")[0]
        file = output / f"{number}_{'_'.join(wish.values())}.png"
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


if __name__ == "__main__":
    main()
