"""Faces and landmarks from insightface's ONNX models, which the user has put in place.

Only files that exist are opened, each by its path; insightface's functions that look a model up by
name, and would download it, are not called.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SeFiError
from ..onnx_sessions import providers
from .face import Face, face_in_box

logger = logging.getLogger(__name__)

PACKS = ("buffalo_l", "antelopev2", "buffalo_m", "buffalo_s", "buffalo_sc")
DETECTOR_FILES = ("det_10g.onnx", "scrfd_10g_bnkps.onnx", "det_2.5g.onnx", "det_500m.onnx")
LANDMARK_FILE = "2d106det.onnx"

# SCRFD sees faces of about 1/40 to 1/2 of its input; the small input is for faces that fill the
# picture.
INPUT_SIZES = (640, 128)
THRESHOLD = 0.5


@dataclass(frozen=True)
class ModelFiles:
    """A face detector and, if there is one, a landmark model (2d106det)."""

    detector: Path
    landmarks: Path | None


def is_installed() -> bool:
    """Whether insightface and an onnxruntime can be imported, without importing them."""
    return all(find_spec(name) is not None for name in ("insightface", "onnxruntime"))


def pack_folders(roots: Sequence[Path]) -> Iterator[Path]:
    """Where a pack may lie in ``roots``, the best first.

    That is ``<root>/models/<pack>``, as insightface and other node packs keep it, or
    ``<root>/<pack>``; its zip file may have made another folder of the same name inside.
    """
    for root in roots:
        for parent in (root / "models", root):
            for pack in PACKS:
                yield from (parent / pack, parent / pack / pack)


def find_models(roots: Sequence[Path]) -> ModelFiles | None:
    """The models of the first pack found in ``roots``, None if there is none."""
    for folder in pack_folders(roots):
        for name in DETECTOR_FILES:
            if (folder / name).is_file():
                landmarks = folder / LANDMARK_FILE
                return ModelFiles(folder / name, landmarks if landmarks.is_file() else None)
    return None


class InsightDetector:
    """insightface's SCRFD detector, with 106 landmarks where the landmark model is there.

    Raises :class:`SeFiError` if insightface cannot be imported or a file is not such a model.
    ``use_gpu`` False keeps onnxruntime on the CPU.
    """

    def __init__(self, files: ModelFiles, use_gpu: bool = True) -> None:
        self._detector = _open(files.detector, "detection", use_gpu)
        height, width = self._detector.session.get_inputs()[0].shape[2:4]
        fixed = isinstance(width, int) and isinstance(height, int)
        self._sizes = [(width, height)] if fixed else [(size, size) for size in INPUT_SIZES]
        self._detector.prepare(0, input_size=self._sizes[0], det_thresh=THRESHOLD)
        self._landmarks = None
        if files.landmarks is not None:
            self._landmarks = _open(files.landmarks, "landmark_2d_106", use_gpu)

    def detect(self, picture: np.ndarray) -> list[Face]:
        """The faces of an RGB picture (height, width, 3), uint8."""
        from insightface.app.common import Face as InsightFace

        bgr = np.ascontiguousarray(picture[..., ::-1])
        if min(bgr.shape[:2]) * self._sizes[-1][0] < max(bgr.shape[:2]):
            return []  # insightface would resize the shorter side to nothing
        for size in self._sizes:
            boxes, points = self._detector.detect(bgr, input_size=size)
            if len(boxes):
                break
        faces = []
        for number, box in enumerate(boxes):
            five = None if points is None else points[number]
            landmarks = None
            if self._landmarks is not None:
                landmarks = self._landmarks.get(bgr, InsightFace(bbox=box[:4], kps=five))
            faces.append(face_in_box(box[:4], five, landmarks))
        return faces


def _open(path: Path, task: str, use_gpu: bool) -> Any:
    try:
        import onnxruntime
        from insightface import model_zoo
    except Exception as error:  # a broken onnxruntime raises more than ImportError
        raise SeFiError(
            f"insightface cannot be used ({error}): install insightface and onnxruntime, or set "
            "detector to 'yunet'"
        ) from error
    try:
        model: Any = model_zoo.get_model(
            str(path), providers=providers(onnxruntime, use_gpu), download=False
        )
    except Exception as error:
        raise SeFiError(
            f"the insightface model {path} cannot be read ({error}): put a fresh copy of the file "
            "there"
        ) from error
    if getattr(model, "taskname", None) != task:
        raise SeFiError(
            f"{path} is not the model that its name promises ({task}): put the file of "
            "insightface's model pack there"
        )
    logger.info("%s runs on onnxruntime's %s.", path.name, model.session.get_providers()[0])
    return model
