"""Face detectors by the name that the user picks, and where their models lie."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..errors import SeFiError
from ..faces import insight
from ..faces.extract import Extraction, Selection, extract_faces
from ..faces.face import Detector
from ..faces.lbp import LbpDetector

logger = logging.getLogger(__name__)

DETECTORS = ("auto", "insightface", "lbp cascade")
FOLDER = "insightface"


def mask_faces(pictures: torch.Tensor, detector: str, selection: Selection) -> Extraction:
    """:func:`extract_faces` with a detector of :data:`DETECTORS`, a progress bar and cancelling."""
    progress = comfy.utils.ProgressBar(len(pictures))

    def on_picture(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done)

    return extract_faces(pictures, open_detector(detector), selection, on_picture)


def open_detector(name: str) -> Detector:
    """The detector of that name. Models are opened once and kept while their file is the same.

    Raises :class:`SeFiError` when what it needs is not there; "auto" then takes the LBP cascade
    and says why in the log.
    """
    if name == "lbp cascade":
        return _lbp_detector()
    try:
        return _insight_detector()
    except SeFiError as error:
        if name != "auto":
            raise
        logger.info("SeFi Face Mask uses the LBP cascade, because %s", error)
        return _lbp_detector()


def detector_state(name: str) -> str:
    """What else than its name decides what a detector finds: other models, another state."""
    if name == "lbp cascade" or not insight.is_installed():
        return ""
    files = insight.find_models(model_folders())
    return "" if files is None else f"{files} {_changed(files)}"


def model_folders() -> list[Path]:
    """Where insightface's models are looked up: {models}/insightface, as other packs do."""
    folders = [Path(folder_paths.models_dir) / FOLDER]
    if FOLDER in folder_paths.folder_names_and_paths:
        folders += [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return list(dict.fromkeys(folders))


@lru_cache(maxsize=1)
def _lbp_detector() -> LbpDetector:
    return LbpDetector()


def _insight_detector() -> insight.InsightDetector:
    if not insight.is_installed():
        raise SeFiError(
            "insightface is not installed: run 'pip install insightface onnxruntime' in ComfyUI's "
            "Python, or set detector to 'lbp cascade'"
        )
    folders = model_folders()
    files = insight.find_models(folders)
    if files is None:
        raise SeFiError(
            f"no insightface model was found in {folders[0]}: put {insight.DETECTOR_FILES[0]} (and "
            f"{insight.LANDMARK_FILE}, for masks that follow the face) of the model pack "
            f"{insight.PACKS[0]} into {folders[0] / 'models' / insight.PACKS[0]}, or set detector "
            "to 'lbp cascade'; the files are not downloaded for you"
        )
    return _opened(files, _changed(files), not comfy.model_management.cpu_mode())


def _changed(files: insight.ModelFiles) -> tuple[int, ...]:
    """When the files were changed, in nanoseconds."""
    return tuple(
        file.stat().st_mtime_ns for file in (files.detector, files.landmarks) if file is not None
    )


@lru_cache(maxsize=1)
def _opened(
    files: insight.ModelFiles, changed: tuple[int, ...], use_gpu: bool
) -> insight.InsightDetector:
    return insight.InsightDetector(files, use_gpu)
