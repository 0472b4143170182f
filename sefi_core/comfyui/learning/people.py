"""Many people's photos: from a list of pictures, or from a folder of ComfyUI's input folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import folder_paths
import torch

from ...errors import SeFiError, quoted
from ...face2diffusion.training.data import PICTURES, read_picture
from ...faces.extract import Selection, extract_faces
from ...faces.yunet import YuNetDetector
from ...learning.photos import Photo, pair_photos
from ...text.placeholders import check_name
from .together import Person


class Called(NamedTuple):
    """Somebody's name, and whom to learn, or the sentence that says why that cannot be."""

    name: str
    person: Person | SeFiError


def photo_folder(name: str) -> Path:
    """A folder within ComfyUI's input folder.

    Raises :class:`SeFiError` for one that is not there, and for names that lead out of it.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    with suppress(ValueError, OSError):  # of names that no file can have
        folder = (root / name.strip().replace("\\", "/")).resolve()
        if folder.is_relative_to(root) and folder.is_dir():
            return folder
    raise SeFiError(
        f"folder {quoted(name)} is no folder in {root}: put a folder of photos there, and give its "
        "name"
    )


def people_in_folder(name: str, captions: Sequence[str], find_heads: bool) -> list[Called]:
    """Everybody in a folder, in the order of their names: a picture each, or a subfolder each.

    ``captions`` is one line for all photos. Raises :class:`SeFiError` for a folder without photos.
    """
    folder = photo_folder(name)
    captions = without_empty_end(captions)
    if len(captions) > 1:
        raise SeFiError("captions has several lines: give one line for all photos of a folder")
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    groups: dict[str, list[Path]] = {}
    twice: dict[str, list[str]] = {}
    for file in files:
        photos = [file] if _is_picture(file) else []
        if file.is_dir():
            photos = [one for one in sorted(file.iterdir()) if _is_picture(one)]
        if photos:
            called = file.name if file.is_dir() else file.stem
            groups.setdefault(called, photos)
            twice.setdefault(called, []).append(file.name)
    if not groups:
        raise SeFiError(f"folder {quoted(name)} has no photos: put pictures into it")
    found = []
    for called, photos in groups.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            if len(twice[called]) > 1:
                raise SeFiError(
                    f"{' and '.join(twice[called])} would be one name: put photos of one person "
                    "into a folder of that name, and rename those of another"
                )
            pictures = [Photo(read_picture(file), None) for file in photos]
            found.append(_called(called, pictures, tuple(captions), find_heads))
        except SeFiError as error:
            found.append(Called(called, error))
    return found


def people_of_photos(
    photos: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    names: Sequence[str],
    captions: Sequence[str],
    find_heads: bool,
) -> list[Called]:
    """One person for each picture of IMAGE batches, with their masks where there are any.

    ``names`` are as many as pictures, or none; ``captions`` as many, or one for all. Raises
    :class:`SeFiError` for another number, and as :func:`photos.pair_photos` does.
    """
    pairs = pair_photos(photos, masks)
    if len(captions) > len(pairs):
        captions = without_empty_end(captions)
    if names and len(names) != len(pairs):
        raise SeFiError(
            f"names has {len(names)} lines for {len(pairs)} photos: give one name for each photo, "
            "or none"
        )
    if len(captions) not in (1, len(pairs)):
        raise SeFiError(
            f"captions has {len(captions)} lines for {len(pairs)} photos: give one line for each "
            "photo, or one for all"
        )
    found = []
    for number, pair in enumerate(pairs):
        called = names[number] if names else f"person_{number + 1}"
        caption = captions[number if len(captions) > 1 else 0]
        try:
            found.append(_called(called, [pair], (caption,), find_heads))
        except SeFiError as error:
            found.append(Called(called, error))
    return found


def without_empty_end(lines: Sequence[str]) -> list[str]:
    """The lines, at least one, without the empty ones that a text ends with."""
    last = max((n for n, line in enumerate(lines) if line.strip()), default=0)
    return list(lines[: last + 1])


def _called(
    name: str, photos: Sequence[Photo], captions: tuple[str, ...], find_heads: bool
) -> Called:
    check_name(name)
    if find_heads:
        photos = [photo if photo.mask is not None else _with_head(photo) for photo in photos]
    return Called(name, Person(name, photos, captions))


def _with_head(photo: Photo) -> Photo:
    found = extract_faces(photo.picture[None], YuNetDetector(), Selection())
    return Photo(photo.picture, found.masks[0])


def _is_picture(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in PICTURES
