"""Who is it: face embeddings from the user's recognition models, and likeness from embeddings.

Two kinds of ONNX model are read, both by onnxruntime on faces aligned to 112 x 112 pixels: SFace of
OpenCV's model zoo (Apache-2.0) and the recogniser of insightface's packs (for non-commercial
research only). Only files that exist are opened, each by its path; nothing is downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SeFiError
from ..onnx_sessions import import_onnxruntime, open_session
from .alignment import SIDE
from .insight import pack_folders

logger = logging.getLogger(__name__)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Kinds of field in a protocol buffer."""


@dataclass(frozen=True)
class Kind:
    """A kind of recognition model: its files, how it takes pixels, and how its cosines are read."""

    id: str
    """As the node names it."""
    files: tuple[str, ...]
    """The file names it is known by, the best first."""
    middle: float
    """What is taken off a pixel from 0 to 255 ..."""
    scale: float
    """... and what it is then divided by. Channels are RGB."""
    different: float
    """Mean cosine of photos of two people: likeness 0."""
    same: float
    """Mean cosine of two photos of one person: likeness 1."""

    def likeness(self, cosine: float) -> float:
        """0 for what a stranger has, 1 for what another photo of the same person has."""
        return (cosine - self.different) / (self.same - self.different)


SFACE = Kind(
    "sface",
    (
        "face_recognition_sface_2021dec.onnx",
        "face_recognition_sface_2021dec_int8bq.onnx",
        "face_recognition_sface_2021dec_int8.onnx",
    ),
    middle=0.0,
    scale=1.0,
    different=0.06,
    same=0.77,
)
INSIGHT = Kind(
    "insightface",
    ("w600k_r50.onnx", "glintr100.onnx", "w600k_mbf.onnx"),
    middle=127.5,
    scale=127.5,
    # Not measured by this project, whose tests have no weights of it: docs/likeness.md.
    different=0.0,
    same=0.6,
)
KINDS = {kind.id: kind for kind in (SFACE, INSIGHT)}


def find_model(kind: Kind, folders: Sequence[Path]) -> Path | None:
    """The first of the kind's files in ``folders``, None if there is none.

    Those of insightface lie in its packs (:func:`insight.pack_folders`).
    """
    places = pack_folders(folders) if kind.id == INSIGHT.id else folders
    candidates = (place / name for place in places for name in kind.files)
    return next((path for path in candidates if path.is_file()), None)


class FaceEncoder:
    """A recognition model: from aligned faces to embeddings.

    Raises :class:`SeFiError` if onnxruntime cannot be imported or the file is no such model.
    ``use_gpu`` False keeps onnxruntime on the CPU.
    """

    def __init__(self, kind: Kind, path: Path, use_gpu: bool = True) -> None:
        self.kind = kind
        self.path = path
        self._session = _open(path, use_gpu)
        self._input = self._session.get_inputs()[0].name

    def features(self, face: np.ndarray) -> np.ndarray:
        """What the model says of an aligned RGB face (112, 112, 3), uint8: numbers (D,).

        Raises :class:`SeFiError` when the model gives no embedding.
        """
        pixels = (face.astype(np.float32) - self.kind.middle) / self.kind.scale
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        try:
            (found,) = self._session.run(None, {self._input: planes})
        except Exception as error:
            raise _broken(self.path, error) from error
        features = np.asarray(found, dtype=np.float64).reshape(-1)
        if not np.isfinite(features).all() or not features.any():
            raise _broken(self.path, "its embedding is not a number")
        return features

    def embed(self, face: np.ndarray) -> np.ndarray:
        """The embedding (D,) of length 1, as :meth:`features`."""
        features = self.features(face)
        return features / np.linalg.norm(features)


def without_weight_inputs(model: bytes) -> bytes:
    """An ONNX model whose graph asks for its first input only.

    SFace's files list weights as inputs, some of which nobody reads; onnxruntime then asks for
    them, or takes weights for something that changes. Raises ``ValueError`` for bytes that are no
    such model.

    An ONNX file is a protocol buffer: field 7 of the model is the graph, field 11 of the graph an
    input (onnx.proto3 of the ONNX specification).
    """
    parts = []
    for field, raw, content in _fields(model):
        if field == 7 and content is not None:
            kept, inputs = [], 0
            for inner, inner_raw, _ in _fields(content):
                inputs += inner == 11
                if inner != 11 or inputs == 1:
                    kept.append(inner_raw)
            graph = b"".join(kept)
            raw = _varint(7 << 3 | _BYTES) + _varint(len(graph)) + graph
        parts.append(raw)
    return b"".join(parts)


def _open(path: Path, use_gpu: bool) -> Any:
    onnxruntime = import_onnxruntime("faces cannot be compared")
    try:
        session = open_session(onnxruntime, without_weight_inputs(path.read_bytes()), use_gpu)
    except Exception as error:
        raise _broken(path, error) from error
    shape = session.get_inputs()[0].shape
    if len(shape) != 4 or list(shape[1:]) != [3, SIDE, SIDE] or len(session.get_outputs()) != 1:
        raise _broken(path, f"it takes {shape}")
    logger.info("%s runs on onnxruntime's %s.", path.name, session.get_providers()[0])
    return session


def _broken(path: Path, error: object) -> SeFiError:
    return SeFiError(
        f"{path} cannot be used to recognise faces ({error}): put a fresh copy of the file there"
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes | None]]:
    """The fields of a protocol buffer: number, all bytes, and the content where it has a length."""
    view = memoryview(message)
    place = 0
    while place < len(view):
        start = place
        tag, place = _read_varint(view, place)
        content = None
        if tag & 7 == _VARINT:
            _, place = _read_varint(view, place)
        elif tag & 7 == _FIXED64:
            place += 8
        elif tag & 7 == _FIXED32:
            place += 4
        elif tag & 7 == _BYTES:
            length, place = _read_varint(view, place)
            content = view[place : place + length]
            place += length
        else:
            raise ValueError("it is no ONNX model")
        if place > len(view):
            raise ValueError("it is no whole ONNX model")
        yield tag >> 3, bytes(view[start:place]), None if content is None else bytes(content)


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, the lowest first, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(view):
            break
        number |= (view[place] & 127) << shift
        place += 1
        if not view[place - 1] & 128:
            return number, place
    raise ValueError("it is no whole ONNX model")


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])
