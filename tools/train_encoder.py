"""Train a face encoder: ``python -m tools.train_encoder PHOTOS --checkpoint SD.safetensors``.

Run it in this pack's folder with ComfyUI's Python. PHOTOS is a folder with a subfolder of photos
for each person, or a file of JSON lines. The result is OUTPUT/face_encoder.safetensors; put it into
ComfyUI's models/face2diffusion. It goes on where it was stopped. docs/training_encoders.md says
more, and how to use several graphics cards.
"""

import argparse
import logging
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    __package__ = "sefi_ide.tools"
    comfyui = runpy.run_path(str(Path(__file__).resolve().parent / "comfyui.py"))
    comfyui["start_training"](sys.argv, prefix="sefi-encoder-")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

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
from ..sefi_core.face2diffusion.training.loops import Log, fit, is_first_process  # noqa: E402
from ..sefi_core.face2diffusion.training.settings import (  # noqa: E402
    PUBLISHED,
    EncoderTraining,
    parse_changes,
    read_settings,
)

RESULT = "face_encoder.safetensors"
ENCODER_STATE = "encoder_state.safetensors"
PARTS = ("encoder", "mapping", "both")


def faces_of(
    photos: Path, output: Path, settings: EncoderTraining, checkpoint: Checkpoint | None = None
) -> Faces:
    """What is kept of the photos, prepared; it lies in ``output``.

    For a mapping that is made with its ``checkpoint``.
    """
    kept: dict[str, object] = {"crop": settings.crop, "masked": settings.masked}
    made_with = ""
    if checkpoint is not None:
        kept |= {
            "masked": settings.needs_masks,
            "resolution": settings.resolution,
            "family": checkpoint.family,
        }
        made_with = checkpoint.vae_digest
    prepare = preparation(settings, checkpoint)
    return prepared(read_records(photos), prepare, output / "cache", kept, made_with)


def train_encoder(photos: Path, output: Path, settings: EncoderTraining, on_step=None) -> list:
    """Train the encoder; returns the losses. Its state is in ``output``."""
    faces = faces_of(photos, output, settings)
    learn, test = faces.split(settings.validation_people, settings.seed)
    torch.manual_seed(settings.seed)
    task = Identification(settings.shape.build(), learn, test, settings)
    log = Log(output / "encoder", active=is_first_process())
    if torch.cuda.is_available() and "--cpu" not in sys.argv:
        task.cuda()
    losses = fit(
        task, settings.encoder_steps, settings.encoder_batch, settings.seed,
        output / ENCODER_STATE, log, settings.validate_every, on_step,
    )  # fmt: skip
    log.close()
    return losses


def trained_encoder(output: Path, settings: EncoderTraining) -> torch.nn.Module:
    """The encoder in the state that :func:`train_encoder` has left.

    Raises :class:`SeFiError` where there is none, or one of another shape.
    """
    path = output / ENCODER_STATE
    if not path.is_file():
        raise SeFiError(
            f"{path} is not there: train an encoder first, with --part encoder or both, or give "
            "one with --encoder"
        )
    prefix = "module.encoder."
    encoder = settings.shape.build()
    try:
        state = load_file(path)
        encoder.load_state_dict(
            {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        )
    except Exception as error:  # safetensors has an exception of its own, torch another
        raise SeFiError(
            f"{path} holds no encoder of the shape that is set ({str(error)[:200]}): give the "
            "settings that it was trained with, or remove it to train another"
        ) from error
    return encoder.eval().requires_grad_(False)


def train_mapping(
    photos: Path,
    output: Path,
    settings: EncoderTraining,
    checkpoint: Checkpoint,
    encoder: Path | None = None,
    on_step=None,
) -> list:
    """Train the mapping and write the result; returns the losses.

    Raises :class:`SeFiError` for an ``encoder`` that looks at something else than is set.
    """
    if encoder is not None:
        network, shape, crop = read_encoder(encoder)
        if crop != settings.crop:
            raise SeFiError(
                f"{encoder} looks at a crop of the kind {crop}, and {settings.crop} is set: give "
                f"--set crop={crop}"
            )
    else:
        network, shape = trained_encoder(output, settings), settings.shape
    with torch.inference_mode(False), torch.enable_grad():
        faces = faces_of(photos, output, settings, checkpoint)
        learn, test = faces.split(settings.validation_people, settings.seed)
        task = MappingTask(checkpoint, network, shape, learn, test, settings)
        task.to(checkpoint.model.load_device)
        log = Log(output / "mapping", active=is_first_process())
        with differentiable(*task.frozen_modules):
            losses = fit(
                task, settings.mapping_steps, settings.mapping_batch, settings.seed,
                output / "mapping_state.safetensors", log, settings.validate_every, on_step,
            )  # fmt: skip
    log.close()
    if is_first_process():
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
        # At once, so that a file that is of no use is told before days of training.
        checkpoint = load_checkpoint(options.checkpoint) if options.part != "encoder" else None
        if options.part != "mapping" and options.encoder is None:
            train_encoder(options.photos, options.output, settings)
        if checkpoint is not None:
            train_mapping(options.photos, options.output, settings, checkpoint, options.encoder)
    except SeFiError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
