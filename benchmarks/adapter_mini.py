"""``make adapter-mini``: a face adapter of the drawn world, trained on drawn people.

Trains as ``tools/train_adapter.py`` does for anybody, on the people whom ``make encoder-mini`` has
drawn, with that encoder as the face recogniser, which shares nothing with the judges. It does so
beside the prompt's attention and, for comparison, without it (``TEXT="on off"``; "on" alone saves
half of the time; ``STEPS`` changes their number), and goes on where it was stopped. Then both draw
``SUBJECTS`` (16) people whom nothing has seen, from one photo each and without training, with
``PROMPTS`` (12) prompts.

The adapter that was trained with text becomes :data:`RESULT`. The last line is one JSON object;
exits with 1 where a drawn person's ID is not at least half of the way from the class word to people
whom the miniature knows by name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from sefi_ide.sefi_core.comfyui import face_encoders
from sefi_ide.sefi_core.comfyui.encoder_training import Checkpoint
from sefi_ide.sefi_core.comfyui.face_adapters import OpenedAdapter, Wish, apply_face_adapter
from sefi_ide.sefi_core.face2diffusion.files import read_encoder
from sefi_ide.sefi_core.face2diffusion.training.data import Faces
from sefi_ide.sefi_core.face2diffusion.training.identification import features_of
from sefi_ide.sefi_core.face2diffusion.training.settings import read_settings, settings_of
from sefi_ide.sefi_core.face_adapter.files import read_face_adapter
from sefi_ide.sefi_core.face_adapter.training.settings import AdapterTraining
from sefi_ide.tests.mini_sd.checkpoints import FACE_ADAPTER, FACE_ENCODER
from sefi_ide.tests.mini_sd.editions import EDITION
from sefi_ide.tools import train_encoder
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.train_adapter import RESULT as TRAINED
from sefi_ide.tools.train_adapter import open_recogniser, train_adapter

from . import encoder_mini
from .commit import measured_at
from .jobs import Figures, miniature
from .measures import draw, quality
from .methods import Learned
from .subjects import Subject, named, noise_seeds, prompts

logger = logging.getLogger(__name__)

BUILD = REPOSITORY / "build" / f"adapter_mini_{EDITION.number}"
RESULT = FACE_ADAPTER
SETTINGS = REPOSITORY / "benchmarks" / "adapter_mini.json"
SEED = 1
BAR = 0.5
"""Of the way from the class word's ID to that of people known by name."""


def drawn_faces(checkpoint: Checkpoint) -> Faces:
    """The people of ``make encoder-mini``, of whose photos it has kept crops and latents."""
    settings = read_settings(encoder_mini.SETTINGS, {})
    photos = encoder_mini.draw_people(encoder_mini.BUILD / "photos")
    faces = train_encoder.faces_of(photos, encoder_mini.BUILD, settings, checkpoint)
    encoder = read_encoder(FACE_ENCODER).encoder
    tensors = {"latent": faces.tensors["latent"], "embedding": features_of(encoder, faces)}
    return Faces(faces.records, tensors)


def train(texts: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Path]:
    """Train with the prompt's attention "on", "off" or both; returns the files of the results."""
    mini, _ = miniature("sd1")
    checkpoint = Checkpoint(mini.model, mini.clip, mini.vae)
    recogniser = open_recogniser(FACE_ENCODER)
    with torch.inference_mode(False):
        faces = drawn_faces(checkpoint)
    results = {}
    for text in texts:

        def tell(step: int, loss: float, text: str = text) -> None:
            if step % 50 == 0:
                logger.info("text %s: step %d, loss %.4f", text, step, loss)

        settings = settings_of(AdapterTraining, SETTINGS, {**changes, "text": text == "on"})
        output = BUILD / f"text_{text}"
        train_adapter(faces, output, settings, checkpoint, recogniser, tell)
        results[text] = output / TRAINED
    return results


def opened(path: Path) -> OpenedAdapter:
    """An adapter of the drawn world, with its face encoder where ComfyUI looks for it."""
    face_encoders.register_model_folder()
    folder = Path(folder_paths.get_folder_paths(face_encoders.FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FACE_ENCODER, folder / FACE_ENCODER.name)
    return OpenedAdapter(read_face_adapter(path), path.name)


def measure(adapter: OpenedAdapter | None, number: int, count: int, known: bool = False) -> Figures:
    """ID, Prompt and ID(P) of one person; without an adapter of the class word, or of a name."""
    mini, judge = miniature("sd1")
    asked = prompts(SEED, count)
    subject = named(SEED, number) if known else Subject(SEED, number)
    learned = Learned(mini.model, mini.clip, getattr(subject, "name", "person"))
    if adapter is not None:
        assert isinstance(subject, Subject)
        model, _ = apply_face_adapter(mini.model, adapter, subject.photos(1), Wish())
        learned = learned._replace(model=model)
    seeds = noise_seeds(SEED, number, count)
    pictures = draw(mini, learned, asked, seeds, "person")
    return quality(judge, pictures, asked, subject.renders(asked))


def main() -> None:
    """Train, put the result where the tests find it, and measure."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    texts = os.environ.get("TEXT", "on off").split()
    people = int(os.environ.get("SUBJECTS", "16"))
    count = int(os.environ.get("PROMPTS", "12"))
    steps = os.environ.get("STEPS")
    trained = train(texts, {"steps": int(steps)} if steps else {})
    if "on" in trained:
        shutil.copyfile(trained["on"], RESULT)
    rows: dict[str, tuple[OpenedAdapter | None, bool]] = {
        "class word": (None, False),
        **{f"trained with text {text}": (opened(path), False) for text, path in trained.items()},
        "known by name": (None, True),
    }
    means: dict[str, dict[str, float]] = {}
    for name, (adapter, known) in rows.items():
        figures = [measure(adapter, number, count, known) for number in range(people)]
        means[name] = {key: float(np.mean([one[key] for one in figures])) for key in figures[0]}
        logger.info("%s: %s", name, {key: round(value, 3) for key, value in means[name].items()})
    lowest, highest = means["class word"]["id"], means["known by name"]["id"]
    best = means[f"trained with text {texts[0]}"]["id"]
    way = (best - lowest) / (highest - lowest)
    print(
        json.dumps(
            {"commit": measured_at(), "people": people, "prompts": count, "rows": means, "way": way}
        )
    )
    sys.exit(0 if way >= BAR else 1)


if __name__ == "__main__":
    main()
