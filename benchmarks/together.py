"""``make bench-together``: identities per hour, several people in one batch or one after the other.

``PEOPLE`` (8) unseen people are learned with the defaults both ways, in turns, ``ROUNDS`` (3)
times. On the CPU by the miniature, whose steps cost little beside a Stable Diffusion's. On a GPU by
a Stable Diffusion with random weights in its true shape and size of picture, of which only the
times mean something; ``FAMILY`` is sd1, sd2 or sdxl, ``STEPS`` (20) how many are timed there, and
eight people together are to be at least 2.5 times as fast. The last line is one JSON object; exits
with 1 when that bar is missed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import comfy.utils
import torch
from sefi_ide.sefi_core.comfyui.learning.together import Person, train_identities
from sefi_ide.sefi_core.families import FAMILIES
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.tests.comfy import full_shape
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS, chosen_family

from .contenders import Models
from .subjects import Subject

logger = logging.getLogger(__name__)

LEAST_ON_GPU = 2.5
SEED = 1
HOUR = 3600.0


def people(count: int, side: int) -> list[Person]:
    """Unseen people with one photo each, of ``side`` pixels; nothing is said about the photos."""
    found = []
    for number in range(count):
        (photo,) = Subject(SEED, number).photos(1)
        picture, mask = (
            torch.nn.functional.interpolate(plane[None], (side, side), mode="bilinear")[0]
            for plane in (photo.picture.movedim(-1, 0), photo.mask[None])
        )
        larger = photo._replace(picture=picture.movedim(0, -1), mask=mask[0])
        found.append(Person(f"person_{number}", [larger], ("",)))
    return found


def seconds(models: Models, who: list[Person], settings: TrainingSettings, together: int) -> float:
    """Wall time of learning all of them, without what loading and the first call take once."""
    started = time.monotonic()
    outcomes = train_identities(
        models.model, models.clip, models.vae, who, "person", settings, together
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if lost := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
        raise lost[0]
    return time.monotonic() - started


def measure(checkpoint: Path, side: int, steps: int, count: int, rounds: int) -> dict[str, float]:
    """Identities per hour both ways and the median of their ratios."""
    models = Models.load(checkpoint)
    settings = TrainingSettings(steps=steps, resolution=side, preview_every=0)
    who = people(count, side)
    seconds(models, who[:2], TrainingSettings(steps=2, resolution=side, preview_every=0), 2)
    alone, together = [], []
    for _ in range(rounds):
        alone.append(seconds(models, who, settings, 1))
        together.append(seconds(models, who, settings, count))
        logger.info("one after the other %.1f s, together %.1f s", alone[-1], together[-1])
    return {
        "people": count,
        "steps": steps,
        "alone_per_hour": HOUR * count / median(alone),
        "together_per_hour": HOUR * count / median(together),
        "times_as_fast": median(a / b for a, b in zip(alone, together, strict=True)),
    }


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    comfy.utils.set_progress_bar_enabled(False)
    family = chosen_family()
    count = int(os.environ.get("PEOPLE") or 8)
    rounds = int(os.environ.get("ROUNDS") or 3)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        steps = int(os.environ.get("STEPS") or 20)
        with tempfile.TemporaryDirectory(prefix="sefi-full-shape-") as folder:
            checkpoint = Path(folder) / "full.safetensors"
            full_shape.write_checkpoint(checkpoint, family)
            figures = measure(checkpoint, FAMILIES[family].resolution, steps, count, rounds)
    else:
        steps = int(os.environ.get("STEPS") or TrainingSettings().steps)
        figures = measure(CHECKPOINTS[family], 128, steps, count, rounds)
    missed = on_gpu and count >= 8 and figures["times_as_fast"] < LEAST_ON_GPU
    if missed:
        logger.error(
            "missed: together is %.2f times as fast, the bar is %.1f",
            figures["times_as_fast"], LEAST_ON_GPU,
        )  # fmt: skip
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
