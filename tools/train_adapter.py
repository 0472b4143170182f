"""Train a face adapter: ``python -m tools.train_adapter PHOTOS --checkpoint SD.safetensors
--recogniser w600k_r50.onnx``.

Run it in this pack's folder with ComfyUI's Python. PHOTOS is a folder with a subfolder of two
photos or more for each person, or a file of JSON lines. The result is OUTPUT/face_adapter.
safetensors; put it into ComfyUI's models/face_adapters. It goes on where it was stopped.
docs/face_adapters.md says more, and how to use several graphics cards.
"""

import argparse
import logging
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    __package__ = "sefi_ide.tools"
    comfyui = runpy.run_path(str(Path(__file__).resolve().parent / "comfyui.py"))
    comfyui["start_training"](sys.argv, prefix="sefi-adapter-")

import comfy.clip_vision  # noqa: E402
import torch  # noqa: E402

from ..sefi_core.comfyui.adapter_training import (  # noqa: E402
    AdapterTask,
    Recogniser,
    preparation,
)
from ..sefi_core.comfyui.encoder_training import Checkpoint, load_checkpoint  # noqa: E402
from ..sefi_core.comfyui.face_embedding import open_embedder  # noqa: E402
from ..sefi_core.comfyui.learning.differentiable import differentiable  # noqa: E402
from ..sefi_core.errors import SeFiError  # noqa: E402
from ..sefi_core.face2diffusion.training.data import Faces, prepared, read_records  # noqa: E402
from ..sefi_core.face2diffusion.training.loops import Log, fit, is_first_process  # noqa: E402
from ..sefi_core.face2diffusion.training.settings import (  # noqa: E402
    parse_changes,
    settings_of,
)
from ..sefi_core.face_adapter.files import write_face_adapter  # noqa: E402
from ..sefi_core.face_adapter.training.pairs import with_partners  # noqa: E402
from ..sefi_core.face_adapter.training.settings import PUBLISHED, AdapterTraining  # noqa: E402

RESULT = "face_adapter.safetensors"


def open_recogniser(path: Path, clip_vision: Path | None = None) -> Recogniser:
    """What says who is in a photo, and a CLIP vision model for the variants that need one.

    Raises :class:`SeFiError` for files that are none.
    """
    try:
        embedder, looking = open_embedder(path)
    except OSError as error:
        raise SeFiError(
            f"{path} cannot be read ({error}): give the path of a face recogniser"
        ) from error
    clip = None
    if clip_vision is not None:
        try:
            clip = comfy.clip_vision.load(str(clip_vision))
        except Exception as error:
            raise SeFiError(f"{clip_vision} cannot be read ({error}): give another file") from error
        if clip is None:
            raise SeFiError(f"{clip_vision} is no CLIP vision model: give CLIP ViT-H")
    return Recogniser(embedder, looking, clip)


def faces_of(
    photos: Path,
    output: Path,
    settings: AdapterTraining,
    checkpoint: Checkpoint,
    recogniser: Recogniser,
) -> Faces:
    """What is kept of the photos, prepared; it lies in ``output``."""
    embedder = recogniser.embedder
    kept = {
        "resolution": settings.resolution,
        "family": checkpoint.family,
        "recogniser": [embedder.kind, embedder.file, embedder.sha256],
        "variant": settings.variant,
    }
    prepare = preparation(settings, checkpoint, recogniser)
    if settings.looks_at_pictures:
        kept["clip_vision"] = recogniser.clip_digest
    cache, vae = output / "cache", checkpoint.vae_digest
    return prepared(read_records(photos), prepare, cache, kept, made_with=vae)


def train_adapter(
    faces: Faces,
    output: Path,
    settings: AdapterTraining,
    checkpoint: Checkpoint,
    recogniser: Recogniser,
    on_step=None,
) -> list:
    """Train and write the result; returns the losses. The state is in ``output``."""
    with torch.inference_mode(False), torch.enable_grad():
        learn, test = with_partners(faces).split(settings.validation_people, settings.seed)
        task = AdapterTask(checkpoint, recogniser, learn, test, settings)
        task.to(checkpoint.model.load_device)
        log = Log(output, active=is_first_process())
        with differentiable(*task.frozen_modules):
            losses = fit(
                task, settings.steps, settings.batch, settings.seed,
                output / "adapter_state.safetensors", log, settings.validate_every, on_step,
            )  # fmt: skip
    log.close()
    if is_first_process():
        write_face_adapter(task.face_adapter(), output / RESULT, settings.as_json())
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Stable Diffusion to use")
    parser.add_argument(
        "--recogniser", type=Path, required=True,
        help="w600k_r50.onnx of insightface, an SFace file, or a face encoder of this pack",
    )  # fmt: skip
    parser.add_argument("--clip-vision", type=Path, help="CLIP ViT-H, for some variants")
    parser.add_argument("--output", type=Path, default=Path("output/face_adapter"))
    parser.add_argument("--settings", type=Path, help=f"JSON file; {PUBLISHED.name} is the paper's")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="changes")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        settings = settings_of(AdapterTraining, options.settings, parse_changes(options.changes))
        recogniser = open_recogniser(options.recogniser, options.clip_vision)
        checkpoint = load_checkpoint(options.checkpoint)
        with torch.inference_mode(False):
            faces = faces_of(options.photos, options.output, settings, checkpoint, recogniser)
        train_adapter(faces, options.output, settings, checkpoint, recogniser)
    except SeFiError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
