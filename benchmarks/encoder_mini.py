"""``make encoder-mini``: the face encoder of the drawn world, trained on drawn people.

Draws people whom neither a benchmark nor the miniature's vocabulary has, writes them as PNG files
with JSON lines into ``build/encoder_mini``, and trains both networks as ``tools/train_encoder.py``
does for anybody. Some are twins, with the same hair and skin: else the encoder need not look at the
rest of a face. It goes on where it was stopped. The result is :data:`RESULT`. It shares neither
weights nor training with the judges that benchmarks measure by.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sefi_ide.sefi_core.comfyui.encoder_training import Checkpoint
from sefi_ide.sefi_core.face2diffusion.training.settings import EncoderTraining, read_settings
from sefi_ide.tests.mini_sd import render, wishes, world
from sefi_ide.tests.mini_sd.checkpoints import FACE_ENCODER
from sefi_ide.tests.mini_sd.editions import EDITION
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.train_encoder import RESULT as TRAINED
from sefi_ide.tools.train_encoder import train_encoder, train_mapping

logger = logging.getLogger(__name__)

BUILD = REPOSITORY / "build" / f"encoder_mini_{EDITION.number}"
RESULT = FACE_ENCODER
SETTINGS = REPOSITORY / "benchmarks" / "encoder_mini.json"
FORMS: dict[str, dict[str, object]] = {
    "two vectors": {},
    "added to positions": {"position_free": False},
    "K and V apart": {"keys_apart": True},
    "five stages": {"stages": 5},
    "five stages, K and V apart": {"stages": 5, "keys_apart": True},
}
"""What a mapping can predict; settings that differ from those of the shipped encoder."""
FAMILIES, TWINS, PHOTOS = 700, 4, 4
FIRST_SEED = 300_000
"""Of the people's looks; those of the miniature's training and of ``unseen_look`` are others."""


def family(number: int) -> list[world.Look]:
    """Twins, whom all but hair and skin tell apart."""
    rng = np.random.default_rng(FIRST_SEED + number)
    first = world.random_look(rng)
    return [first, *(world.twin_look(first, rng) for _ in range(TWINS - 1))]


def draw_people(folder: Path) -> Path:
    """Photos of all people, with masks and captions, as JSON lines; drawn once."""
    lines = folder / "faces.jsonl"
    if lines.is_file():
        return lines
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for person, look in enumerate(look for n in range(FAMILIES) for look in family(n)):
        for number in range(PHOTOS):
            seed = FIRST_SEED + PHOTOS * person + number
            wish = wishes.random_wish(np.random.default_rng(seed))
            rendering = render.render(wishes.shot_of(look, "person", wish, seed))
            name = f"{person:04}_{number}"
            Image.fromarray(rendering.picture).save(folder / f"{name}.png")
            Image.fromarray(rendering.regions[0]["head"]).save(folder / f"{name}_mask.png")
            # What the caption says behind "a photo of a person".
            _, _, caption = wishes.caption_of(wish, "person").partition(" person ")
            rows.append({"person": f"{person:04}", "file": f"{name}.png",
                         "mask": f"{name}_mask.png", "caption": caption})  # fmt: skip
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return lines


def train(settings: EncoderTraining, build: Path = BUILD) -> Path:
    """Train both networks; returns the file of the result."""
    photos = draw_people(build / "photos")

    def tell(part: str):
        def on_step(step: int, loss: float) -> None:
            if step % 50 == 0:
                logger.info("%s: step %d, loss %.4f", part, step, loss)

        return on_step

    train_encoder(photos, build, settings, tell("encoder"))
    mini = MiniSDRuntime()
    checkpoint = Checkpoint(mini.model, mini.clip, mini.vae)
    train_mapping(photos, build, settings, checkpoint, on_step=tell("mapping"))
    return build / TRAINED


def trained_form(name: str) -> Path:
    """The encoder with a mapping of one of :data:`FORMS`; trained where there is none."""
    changes = FORMS[name]
    if not changes:
        return RESULT
    output = BUILD / name.replace(" ", "_").replace(",", "")
    if not (output / TRAINED).is_file():
        if (cache := BUILD / "cache").is_dir() and not output.exists():
            shutil.copytree(cache, output / "cache")
        photos = draw_people(BUILD / "photos")
        mini = MiniSDRuntime()
        checkpoint = Checkpoint(mini.model, mini.clip, mini.vae)
        logger.info("training a mapping: %s", name)
        train_mapping(photos, output, read_settings(SETTINGS, changes), checkpoint, RESULT)
    return output / TRAINED


def main() -> None:
    """Train with the settings of :data:`SETTINGS`, and put the result where the tests find it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    shutil.copyfile(train(read_settings(SETTINGS, {})), RESULT)


if __name__ == "__main__":
    main()
