"""Face detectors by the name that the user picks, and where their models lie."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..checks import check_choice
from ..errors import SeFiError
from ..faces import insight
from ..faces.extract import Extraction, Selection, extract_faces
from ..faces.face import Detector
from ..faces.yunet import YuNetDetector

logger = logging.getLogger(__name__)

DETECTORS = ("auto", "yunet", "insightface")
FORMER_NAMES = {"lbp cascade": "yunet"}
"""What workflows of former versions say, and what does that now."""

FOLDER = "insightface"


def mask_faces(
    pictures: torch.Tensor, detector: str, selection: Selection, boxes: Any = None
) -> Extraction:
    """:func:`extract_faces` with a detector of :data:`DETECTORS`, a progress bar and cancelling."""
    told = progress_of(len(pictures) if torch.is_tensor(pictures) else 1)
    finder = YuNetDetector() if boxes is not None else open_detector(detector, selection.region)
    return extract_faces(pictures, finder, selection, told, boxes)


def progress_of(count: int) -> Callable[[int], None]:
    """To be told how many of so many pictures are done: a progress bar, and where to cancel."""
    bar = comfy.utils.ProgressBar(count)

    def on_picture(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    return on_picture


def check_detector(name: object) -> None:
    """Raises :class:`SeFiError` unless it is one of :data:`DETECTORS` or a former name of one."""
    if not isinstance(name, str) or name not in FORMER_NAMES:
        check_choice("detector", name, DETECTORS)


def open_detector(name: str, region: str) -> Detector:
    """The detector of that name. Models are opened once and kept while their file is the same.

    "auto" is YuNet, which finds every face that insightface finds in the photos of the tests; for
    the region "face" it is insightface where that and its landmark model are, because the mask then
    follows the outline. Raises :class:`SeFiError` when what insightface needs is not there.
    """
    name = FORMER_NAMES.get(name, name)
    if name == "insightface":
        return _insight_detector()
    if name == "auto" and region == "face" and insight.is_installed():
        files = insight.find_models(model_folders())
        if files is not None and files.landmarks is not None:
            try:
                return _insight_detector()
            except SeFiError as error:
                logger.warning("SeFi Face Mask uses YuNet, because %s", error)
    return YuNetDetector()


def detector_state(name: str) -> str:
    """What else than its name decides what a detector finds: other models, another state."""
    if FORMER_NAMES.get(name, name) == "yunet" or not insight.is_installed():
        return ""
    files = insight.find_models(model_folders())
    return "" if files is None else f"{files} {_changed(files)}"


def model_folders(name: str = FOLDER) -> list[Path]:
    """Where models are looked up: {models}/insightface, as other packs do, or another ``name``."""
    folders = [Path(folder_paths.models_dir) / name]
    if name in folder_paths.folder_names_and_paths:
        folders += [Path(folder) for folder in folder_paths.get_folder_paths(name)]
    return list(dict.fromkeys(folders))


def _insight_detector() -> insight.InsightDetector:
    if not insight.is_installed():
        raise SeFiError(
            "insightface is not installed: run 'pip install insightface onnxruntime' in ComfyUI's "
            "Python, or set detector to 'yunet'"
        )
    folders = model_folders()
    files = insight.find_models(folders)
    if files is None:
        raise SeFiError(
            f"no insightface model was found in {folders[0]}: put {insight.DETECTOR_FILES[0]} (and "
            f"{insight.LANDMARK_FILE}, for masks that follow the face) of the model pack "
            f"{insight.PACKS[0]} into {folders[0] / 'models' / insight.PACKS[0]}, or set detector "
            "to 'yunet'; the files are not downloaded for you"
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
