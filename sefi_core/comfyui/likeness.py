"""Likeness in ComfyUI: where recognition models lie, and a batch of pictures judged by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import numpy as np
import torch

from ..checks import check_choice, check_number, check_whole
from ..errors import SeFiError
from ..faces.recognition import INSIGHT, KINDS, SFACE, FaceEncoder, Kind, find_model
from ..faces.yunet import YuNetDetector
from ..images import checked_pictures, pixels_of
from ..likeness import LEAST, Judged, judge
from .faces import model_folders, progress_of

FOLDER = "face_recognition"
ENCODERS = ("auto", *KINDS)


@dataclass(frozen=True)
class Choice:
    """The settings of SeFi Likeness, and their defaults; see :func:`likeness.ranked`."""

    encoder: str = "auto"
    threshold: float = LEAST
    keep: int = 0

    def __post_init__(self) -> None:
        check_choice("encoder", self.encoder, ENCODERS)
        check_number("threshold", self.threshold, LEAST, 2.0)
        check_whole("keep", self.keep, 0, 4096)


def encoder_state(name: str) -> str:
    """What else than its name decides what an encoder says: its file."""
    kind, path = _found(name)
    return "" if path is None else f"{kind.id} {path} {path.stat().st_mtime_ns}"


def open_encoder(name: str) -> FaceEncoder:
    """The encoder of that name, one of :data:`ENCODERS`, opened once while its file is the same.

    "auto" is SFace where its file is there, else insightface's. Raises :class:`SeFiError` when
    there is no file, or onnxruntime is missing.
    """
    check_choice("encoder", name, ENCODERS)
    kind, path = _found(name)
    if path is None:
        raise SeFiError(_missing(kind, name))
    use_gpu = not comfy.model_management.cpu_mode()
    return _opened(kind.id, path, path.stat().st_mtime_ns, use_gpu)


def judge_pictures(
    images: torch.Tensor, reference: torch.Tensor, training_photo: torch.Tensor | None, encoder: str
) -> tuple[list[Judged], Pictures]:
    """:func:`likeness.judge` of IMAGE batches, with a progress bar and cancelling.

    Also gives what the pictures are as pixels. Raises :class:`SeFiError` for what is no batch of
    pictures, for photos without a face and for an encoder that is not there.
    """
    pictures = Pictures(
        _pixels(images, "images"),
        _pixels(reference, "reference"),
        [] if training_photo is None else _pixels(training_photo, "training_photo"),
    )
    model = open_encoder(encoder)
    count = len(pictures.images) + len(pictures.reference) + len(pictures.training)
    judged = judge(
        pictures.images,
        pictures.reference,
        pictures.training,
        YuNetDetector(),  # whose five points the scale was measured with
        model,
        progress_of(count),
    )
    return judged, pictures


@dataclass(frozen=True)
class Pictures:
    """The batches as lists of RGB pictures (height, width, 3), uint8."""

    images: list[np.ndarray]
    reference: list[np.ndarray]
    training: list[np.ndarray]


def _pixels(batch: torch.Tensor, name: str) -> list[np.ndarray]:
    return [pixels_of(picture).numpy() for picture in checked_pictures(batch, name)]


def _found(name: str) -> tuple[Kind, Path | None]:
    """The kind that a name means, and its file if there is one."""
    kinds = list(KINDS.values()) if name == "auto" else [KINDS.get(name, SFACE)]
    for kind in kinds:
        path = find_model(kind, model_folders() if kind is INSIGHT else model_folders(FOLDER))
        if path is not None:
            return kind, path
    return kinds[0], None


def _missing(kind: Kind, name: str) -> str:
    if kind is INSIGHT:
        folder = model_folders()[0] / "models" / "buffalo_l"
        return (
            f"no face recogniser of insightface was found: put {kind.files[0]} of its model pack "
            f"buffalo_l into {folder}, or set encoder to 'sface'; nothing is downloaded for you"
        )
    rest = "" if name == "sface" else ", or insightface's models into models/insightface"
    return (
        f"no face recogniser was found: put {kind.files[0]} (or {kind.files[-1]}) of OpenCV's "
        f"model zoo into {model_folders(FOLDER)[0]}{rest}; nothing is downloaded for you"
    )


@lru_cache(maxsize=2)
def _opened(kind: str, path: Path, changed: int, use_gpu: bool) -> FaceEncoder:
    return FaceEncoder(KINDS[kind], path, use_gpu)
