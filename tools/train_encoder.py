"""Train a face encoder: ``python -m tools.train_encoder PHOTOS --checkpoint SD.safetensors``.

Run it in this pack's folder with ComfyUI's Python. PHOTOS is a folder with a subfolder of photos
for each person, or a file of JSON lines. The result is OUTPUT/face_encoder.safetensors; put it into
ComfyUI's models/face2diffusion. It goes on where it was stopped. docs/training_encoders.md says
more, and how to use several graphics cards.
"""

import argparse
import logging
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    __package__ = "sefi_ide.tools"
    comfyui = runpy.run_path(str(Path(__file__).resolve().parent / "comfyui.py"))
    comfyui["start_training"](sys.argv, prefix="sefi-encoder-")

import torch  # noqa: E402

from ..sefi_core.comfyui.encoder_training import (  # noqa: E402
    Checkpoint,
    MappingTask,
    load_checkpoint,
    preparation,
)
from ..sefi_core.comfyui.learning.differentiable import differentiable  # noqa: E402
from ..sefi_core.errors import SeFiError  # noqa: E402
from ..sefi_core.face2diffusion.files import read_encoder, write_face_encoder  # noqa: E402
from ..sefi_core.face2diffusion.training.data import Faces, prepared, read_records  # noqa: E402
from ..sefi_core.face2diffusion.training.identification import Identification  # noqa: E402
from ..sefi_core.face2diffusion.training.loops import Log, fit  # noqa: E402
from ..sefi_core.face2diffusion.training.settings import (  # noqa: E402
    PUBLISHED,
    EncoderTraining,
    parse_changes,
    read_settings,
)

RESULT = "face_encoder.safetensors"
PARTS = ("encoder", "mapping", "both")


def faces_of(photos: Path, output: Path, settings: EncoderTraining, checkpoint) -> tuple:
    """The photos to learn from and those to test with, prepared."""
    kept = {"crop": settings.crop, "masked": settings.masked}
    if checkpoint is not None:
        kept |= {"resolution": settings.resolution, "family": checkpoint.family}
    faces: Faces = prepared(
        read_records(photos), preparation(settings, checkpoint), output / "cache", kept
    )
    return faces.split(settings.validation_people, settings.seed)


def train_encoder(photos: Path, output: Path, settings: EncoderTraining, on_step=None) -> list:
    """Train the encoder; returns the losses. Its state is in ``output``."""
    learn, test = faces_of(photos, output, settings, None)
    torch.manual_seed(settings.seed)
    task = Identification(settings.shape.build(), learn, test, settings)
    log = Log(output / "encoder")
    if torch.cuda.is_available() and "--cpu" not in sys.argv:
        task.cuda()
    losses = fit(
        task, settings.encoder_steps, settings.encoder_batch, settings.seed,
        output / "encoder_state.safetensors", log, settings.validate_every, on_step,
    )  # fmt: skip
    log.close()
    return losses


def trained_encoder(output: Path, settings: EncoderTraining) -> torch.nn.Module:
    """The encoder in the state that :func:`train_encoder` has left."""
    from safetensors.torch import load_file

    state = load_file(output / "encoder_state.safetensors")
    prefix = "module.encoder."
    encoder = settings.shape.build()
    encoder.load_state_dict(
        {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    )
    return encoder.eval().requires_grad_(False)


def train_mapping(
    photos: Path,
    output: Path,
    settings: EncoderTraining,
    checkpoint: Checkpoint,
    encoder: Path | None = None,
    on_step=None,
) -> list:
    """Train the mapping and write the result; returns the losses."""
    if encoder is not None:
        network, shape = read_encoder(encoder)
    else:
        network, shape = trained_encoder(output, settings), settings.shape
    with torch.inference_mode(False), torch.enable_grad():
        learn, test = faces_of(photos, output, settings, checkpoint)
        task = MappingTask(checkpoint, network, shape, learn, test, settings)
        task.to(checkpoint.model.load_device)
        log = Log(output / "mapping")
        with differentiable(*task.frozen_modules):
            losses = fit(
                task, settings.mapping_steps, settings.mapping_batch, settings.seed,
                output / "mapping_state.safetensors", log, settings.validate_every, on_step,
            )  # fmt: skip
    log.close()
    if int(os.environ.get("RANK", "0")) == 0:
        write_face_encoder(task.face_encoder(), output / RESULT, settings.as_json())
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="Stable Diffusion to train a mapping for")
    parser.add_argument("--output", type=Path, default=Path("output/face_encoder"))
    parser.add_argument("--part", choices=PARTS, default="both")
    parser.add_argument("--encoder", type=Path, help="msid.pt or a file of this pack, to keep")
    parser.add_argument("--settings", type=Path, help=f"JSON file; {PUBLISHED.name} is the paper's")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="changes")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        settings = read_settings(options.settings, parse_changes(options.changes))
        if options.part != "encoder" and options.checkpoint is None:
            raise SeFiError("a mapping needs --checkpoint, the Stable Diffusion that it is for")
        if options.part != "mapping" and options.encoder is None:
            train_encoder(options.photos, options.output, settings)
        if options.part != "encoder":
            checkpoint = load_checkpoint(options.checkpoint)
            train_mapping(options.photos, options.output, settings, checkpoint, options.encoder)
    except SeFiError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
