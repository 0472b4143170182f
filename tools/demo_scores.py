"""How good the demo's pictures are: by the miniature's judges, or by models that the user has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from sefi_ide.sefi_core import evaluation
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.recognition import INSIGHT, SFACE, FaceEncoder, find_model
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.sefi_core.likeness import judge as compare
from sefi_ide.sefi_core.likeness import words_of
from sefi_ide.sefi_core.prompt_score import Rule
from sefi_ide.tests.mini_sd import judges
from sefi_ide.tests.mini_sd.wishes import Wish

from .comfyui import start

VISION = {1280: "CLIP-ViT-bigG-14", 1024: "CLIP-ViT-H-14", 768: "CLIP-ViT-L-14"}
"""CLIP vision models by the width of the space that they share with a text encoder."""


def judged(
    pictures: Sequence[Image.Image], wishes: Sequence[Wish], renders: np.ndarray
) -> dict[str, float]:
    """``id_mean``, ``prompt_share`` and ``id_p`` of drawn people, by the miniature's judges.

    ``renders`` (N, 128, 128, 3), uint8, show the person.
    """
    pair = judges.load_judges()
    generated, reference = _batch(pictures), torch.from_numpy(renders) / 255
    figures = evaluation.quality(
        pair.identity_similarity(generated, reference), pair.found(generated, wishes)
    )
    print("By the miniature's judges: ID {id:.2f}, prompts {prompt:.2f}, ID(P) {id_p:.2f}".format(
        **figures
    ))  # fmt: skip
    return {
        "id_mean": figures["id"],
        "prompt_share": figures["prompt"],
        "id_p": figures["id_p"],
    }


def likeness(
    pictures: Sequence[Image.Image], photo: Image.Image, models: Path
) -> list[float] | None:
    """The likeness of each picture to the photo, 0 for one without a face.

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
    return [one.likeness for one in judged]


def prompt_scores(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    checkpoint: Path,
    models: Path,
    alike: Sequence[float] | None,
) -> dict[str, float]:
    """``prompt_score``, ``prompt_share`` and, with the likeness of each picture, ``id_p``.

    As SeFi Prompt Score computes them, with a CLIP vision model of the folder ``models`` and the
    checkpoint's text encoder or one of that folder. Prompts are in plain words. Nothing, and a
    line that says why, where there are none that go together.
    """
    files = clip_files(checkpoint, models)
    if isinstance(files, str):
        print(f"No prompt score: {files}.")
        return {}
    start(cpu=not torch.accelerator.is_available(), prefix="sefi-demo-")
    import comfy.clip_vision
    import comfy.sd
    from sefi_ide.sefi_core.comfyui.prompt_score import prompt_scores as score

    vision, text = files
    try:
        with torch.inference_mode():
            if text == checkpoint:
                clip = comfy.sd.load_checkpoint_guess_config(
                    str(text), output_model=False, output_vae=False
                )[1]
            else:
                clip = comfy.sd.load_clip([str(text)])
            loaded = comfy.clip_vision.load(str(vision))
            scores = score(_batch(pictures), "\n".join(prompts), clip, loaded, None, Rule())
    except SeFiError as error:
        print(f"No prompt score with {vision.name} and {text.name}: {error}.")
        return {}
    figures = {"prompt_score": scores.mean, "prompt_share": scores.share}
    line = f"Prompt score {scores.mean:.3f}, fulfilled {scores.share:.2f}"
    if alike is not None:
        figures["id_p"] = scores.quality(alike)["id_p"]
        line += f", ID(P) {figures['id_p']:.3f}"
    print(line)
    print(scores.table(alike))
    return figures


def clip_files(checkpoint: Path, models: Path) -> tuple[Path, Path] | str:
    """A CLIP vision model and what has its text encoder, or a sentence that says what is missing.

    The two share a space where their projections are equally wide. The checkpoint's own text
    encoder comes before those of ``text_encoders`` and ``clip``.
    """
    seen = {width: file for file in _files(models / "clip_vision") for width in _seen(file)}
    read = {width: checkpoint for width in _read(checkpoint)}
    own = next(iter(sorted(read, reverse=True)), None)
    for folder in ("text_encoders", "clip"):
        for file in _files(models / folder):
            for width in _read(file):
                read.setdefault(width, file)
    for width, text in read.items():
        if width in seen:
            return seen[width], text
    wanted = own if own in VISION else 768
    missing = []
    if wanted not in seen:
        missing.append(f"put {VISION[wanted]} into {models / 'clip_vision'}")
    if wanted not in read:
        missing.append(f"put clip_l.safetensors into {models / 'text_encoders'}")
    return " and ".join(missing)


def _batch(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """As ComfyUI's IMAGE."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])) / 255


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def _seen(file: Path) -> list[int]:
    """The width of the space of a CLIP vision model, transformers' or OpenCLIP's; of others []."""
    shapes = dict(_shapes(file, "visual_projection.weight", "visual.proj"))
    return [shape[name.endswith(".proj")] for name, shape in shapes.items()]


def _read(file: Path) -> list[int]:
    """The widths of the spaces of the text encoders in a file."""
    return [shape[0] for _, shape in _shapes(file, "text_projection.weight", "text_projection")]


def _shapes(file: Path, *names: str) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the tensors whose name ends so, from the file's header alone."""
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith(names):
                    yield name, tensors.get_slice(name).get_shape()
    except SafetensorError:
        return  # a download that was cut off, say
