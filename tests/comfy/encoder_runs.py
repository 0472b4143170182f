"""What the tests of training face encoders share; each module says which fixtures it takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from sefi_ide.sefi_core.comfyui.encoder_training import Checkpoint
from sefi_ide.sefi_core.face2diffusion.networks import EncoderShape
from sefi_ide.sefi_core.face2diffusion.training.settings import EncoderTraining

from .training_runs import load

SMALL = EncoderTraining(
    shape=EncoderShape("cnn", widths=(4, 6)),
    crop="head",
    resolution=64,
    encoder_steps=2,
    encoder_batch=4,
    mapping_steps=3,
    mapping_batch=4,
    mapping_learning_rate=0.01,
    dropout=0.0,
    validate_every=2,
    validation_people=1,
)


def changed(**changes):
    return EncoderTraining(**{**SMALL.as_json(), **changes})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Drawn people with masks, and captions, as JSON lines."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    lines = []
    for person in range(6):
        colour = rng.integers(0, 255, 3)
        for number in range(2):
            pixels = np.full((72, 64, 3), 40 * number, np.uint8)
            pixels[20:50, 16:46] = colour
            mask = np.zeros((72, 64), np.uint8)
            mask[20:50, 16:46] = 255
            name = f"{person}_{number}"
            Image.fromarray(pixels).save(folder / f"{name}.png")
            Image.fromarray(mask).save(folder / f"{name}_mask.png")
            told = {"person": str(person), "file": f"{name}.png", "mask": f"{name}_mask.png"}
            lines.append({**told, "caption": ["", "smiling"][number]})
    lines[0]["expression"] = [0.5] * 64
    (folder / "faces.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "faces.jsonl"


@pytest.fixture(scope="module")
def checkpoint(mini_checkpoint):
    return Checkpoint(*load(mini_checkpoint))
