"""Face encoders in ComfyUI: their folder ``{models}/face2diffusion``, opening, predicting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import folder_paths
import torch

from ..digest import file_digest
from ..errors import SeFiError, quoted
from ..face2diffusion.crops import Choice, Seen, around_head, as_input, found_in, seen_in
from ..face2diffusion.expression import ExpressionModel
from ..face2diffusion.files import FaceEncoder, read_face_encoder, read_published
from ..face2diffusion.networks import SIDE
from ..faces.face import Detector, choose
from ..identity.identity import Identity
from ..identity.thumbnail import THUMBNAIL_SIDE, thumbnail_of
from ..images import checked_pictures
from ..learning.photos import Photo
from .faces import open_detector, progress_of

FOLDER = "face2diffusion"
OWN, PUBLISHED = ".safetensors", ".pt"
MAPPING = "mapping.pt"
BESIDE = "auto"
"""As a mapping: ``mapping.pt`` in the folder of the encoder."""

HASH_DIGITS = 16


@dataclass(frozen=True, eq=False)
class OpenedEncoder:
    """A face encoder, and of each of its files the name and the SHA-256, in hexadecimal."""

    encoder: FaceEncoder
    files: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, object]:
        """For an identity's training settings: the files, and where their hashes begin."""
        described: dict[str, object] = {}
        for part, (name, sha) in zip(("encoder", "mapping"), self.files, strict=False):
            described |= {part: name, f"{part}_sha256": sha[:HASH_DIGITS]}
        return described


@dataclass(frozen=True)
class Wish:
    """What is asked of a prediction: the inputs of SeFi Predict Identity, and their defaults.

    An empty ``class_word`` is the encoder's own.
    """

    name: str = "anna"
    class_word: str = ""
    detector: str = "auto"
    choice: Choice = Choice()


def register_model_folder() -> None:
    """Make ``{models}/face2diffusion`` a model folder of ComfyUI.

    Called once when ComfyUI loads the pack; calling it again changes nothing. Folders that the
    user's extra_model_paths.yaml gives for it stay, in front of this one.
    """
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].update((OWN, PUBLISHED))


def encoder_files() -> list[str]:
    """The files that may be encoders, relative to the folder and sorted: not the mappings."""
    return [
        name
        for name in _listed()
        if not (name.endswith(PUBLISHED) and Path(name).name.startswith("mapping"))
    ]


def mapping_files() -> list[str]:
    """:data:`BESIDE`, and the files that may be a mapping."""
    return [BESIDE, *(name for name in _listed() if name.endswith(PUBLISHED))]


def find_files(file: str, mapping: str = BESIDE) -> list[Path]:
    """The files of an encoder: one of this pack's own, or the published two.

    Raises :class:`SeFiError` where the folder has no such file.
    """
    if not file:
        raise SeFiError(
            f"there is no face encoder in {_folder()}: put Face2Diffusion's msid.pt and {MAPPING} "
            "there, or a face encoder of this pack (.safetensors), and press R to refresh the "
            "lists; nothing is downloaded for you"
        )
    path = _found(file)
    if path is None or path.suffix not in (OWN, PUBLISHED):
        raise SeFiError(
            f"the face encoder {quoted(file)} is not in {_folder()}: press R to refresh the lists "
            "and choose another, or put the file there; nothing is downloaded for you"
        )
    if path.suffix == OWN:
        return [path]
    beside = path.with_name(MAPPING) if mapping == BESIDE else _found(mapping)
    if beside is None or not beside.is_file():
        missing = str(beside) if mapping == BESIDE else quoted(mapping)
        raise SeFiError(
            f"{path.name} needs Face2Diffusion's {MAPPING} as well, and {missing} is not there: "
            f"put {MAPPING} into the same folder, or choose the file at mapping; nothing is "
            "downloaded for you"
        )
    return [path, beside]


def fingerprint(file: str, mapping: str = BESIDE) -> str:
    """Another text whenever the files have changed; raises as :func:`find_files` does."""
    return str([(str(path), _stamp(path)) for path in find_files(file, mapping)])


def load_face_encoder(file: str, mapping: str = BESIDE) -> OpenedEncoder:
    """The encoder in these files. The last one is kept open while its files are the same.

    Raises :class:`SeFiError` for files that are missing, damaged or of another kind.
    """
    return open_encoder(find_files(file, mapping))


def open_encoder(files: Sequence[Path]) -> OpenedEncoder:
    """As :func:`load_face_encoder`, of files anywhere: one of this pack, or the published two."""
    return _opened(tuple(files), tuple(map(_stamp, files)))


def expression_file() -> Path | None:
    """The model that turns a picture into numbers of its expression: the first of that name."""
    files = (
        file
        for folder in folder_paths.get_folder_paths(FOLDER)
        for file in sorted(Path(folder).glob("expression*.onnx"))
    )
    return next((file for file in files if file.is_file()), None)


def expression_state() -> str:
    """What decides how an expression is read: which file is there, in which state."""
    path = expression_file()
    return "" if path is None else f"{path} {_stamp(path)}"


def predict_identity(
    opened: OpenedEncoder,
    photos: Sequence[Photo],
    wish: Wish,
    expression: torch.Tensor | None = None,
) -> tuple[Identity, torch.Tensor]:
    """An identity from photos of one person, and what the encoder saw of them (N, 112, 112, 3).

    ``expression`` is an IMAGE of one picture, whose expression becomes part of the identity;
    without one the expression is left to the prompt. Raises :class:`SeFiError` for photos in which
    the face that is needed is not found, and for an expression that cannot be read.
    """
    encoder = opened.encoder
    detector = open_detector(wish.detector, "head")
    told = None if expression is None else _expression(encoder, expression, detector, wish.choice)
    on_photo = progress_of(len(photos))
    seen: list[Seen] = []
    for number, photo in enumerate(photos, 1):
        seen.append(seen_in(photo, encoder.crop, detector, wish.choice, f"photo {number}"))
        on_photo(number)
    pictures = torch.stack([one.picture for one in seen])
    keys, values = encoder.predict(as_input(pictures), told)
    return (
        Identity(
            wish.name,
            wish.class_word.strip() or encoder.class_word,
            encoder.family,
            keys,
            values,
            {
                **opened.as_json(),
                "photos": len(photos),
                "crop": encoder.crop,
                "with_expression": told is not None,
            },
            thumbnail_of(around_head(photos[0].picture, seen[0].square, THUMBNAIL_SIDE)),
            encoder.position_free,
        ),
        pictures,
    )


def _expression(
    encoder: FaceEncoder, picture: torch.Tensor, detector: Detector, choice: Choice
) -> torch.Tensor:
    pictures = checked_pictures(picture, "expression")
    path = expression_file()
    if path is None:
        raise SeFiError(
            f"expression needs a model that reads expressions, and {_folder()} has no file "
            "expression*.onnx: put one there (the help page says what it takes and gives; no "
            "public one is known), or disconnect expression and write the expression in the prompt"
        )
    if len(pictures) != 1:
        raise SeFiError(
            f"expression has {len(pictures)} pictures: connect one, whose expression is meant"
        )
    faces = found_in(pictures[0], detector)
    if not faces:
        raise SeFiError(
            "no face was found in expression: use a picture in which the face is sharp, upright "
            "and seen from the front, or disconnect expression"
        )
    size = pictures[0].shape[0], pictures[0].shape[1]
    face = choose(faces, choice.which_face, choice.face_index, size, "expression")[0]
    model = _opened_expression(path, _stamp(path), not comfy.model_management.cpu_mode())
    numbers = model.numbers(pictures[0], face)
    wanted = len(encoder.mapping.null_exp)
    if len(numbers) != wanted:
        raise SeFiError(
            f"expression is read by {path.name} as {len(numbers)} numbers, and the face encoder "
            f"takes {wanted}: put the model there that it was trained with, or disconnect "
            "expression"
        )
    return numbers


@lru_cache(maxsize=1)
def _opened(files: tuple[Path, ...], stamps: tuple[object, ...]) -> OpenedEncoder:
    with torch.inference_mode(False):
        encoder = read_face_encoder(*files) if len(files) == 1 else read_published(*files)
    _check_predicts(encoder, files[0])
    return OpenedEncoder(encoder, tuple((path.name, file_digest(path)) for path in files))


def _check_predicts(encoder: FaceEncoder, path: Path) -> None:
    """Raise :class:`SeFiError` unless what the encoder says of grey pictures is an identity."""
    try:
        keys, values = encoder.predict(torch.zeros(1, 3, SIDE, SIDE))
        Identity("probe", encoder.class_word, encoder.family, keys, values)
    except (SeFiError, RuntimeError, ValueError, StopIteration) as error:
        raise SeFiError(
            f"{path} cannot be used as a face encoder, since what it predicts is no identity "
            f"({str(error)[:200]}): choose another file"
        ) from error


@lru_cache(maxsize=1)
def _opened_expression(path: Path, stamp: object, use_gpu: bool) -> ExpressionModel:
    return ExpressionModel(path, use_gpu)


def _listed() -> list[str]:
    return sorted(folder_paths.get_filename_list(FOLDER))


def _found(name: str) -> Path | None:
    """The file of this name; ComfyUI keeps names within its folders."""
    try:
        # A workflow may come from another operating system.
        path = folder_paths.get_full_path(FOLDER, name.replace("\\", "/"))
    except ValueError:  # another drive
        return None
    return None if path is None else Path(path)


def _folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _stamp(path: Path) -> tuple[int, int, int]:
    """Inode, size in bytes and time of the last change in nanoseconds."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
