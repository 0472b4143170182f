"""Photos of many people: which there are, and what a training keeps of each on the disk."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from PIL import ExifTags, Image, ImageOps

from ...errors import SeFiError
from ...images import rgb_tensor
from ..networks import EXPRESSION_WIDTH

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PER_FILE = 512
"""Photos of which one file of the cache holds what is kept."""


@dataclass(frozen=True)
class Record:
    """One photo: who it shows, the file, and what is known of it.

    ``mask`` is a picture that is white on the head; ``expression`` 64 numbers, or none.
    """

    person: str
    file: Path
    mask: Path | None = None
    caption: str = ""
    expression: tuple[float, ...] = ()


def read_records(source: Path) -> list[Record]:
    """The photos of a folder or of a file of JSON lines, in a fixed order.

    A folder has a subfolder for each person, or pictures that are a person each. A line is
    ``{"person": "anna", "file": "anna/1.jpg"}``, and may have ``mask``, ``caption`` and
    ``expression``; paths are relative to the file. Raises :class:`SeFiError` for a source without
    photos and for lines that are none.
    """
    if source.is_dir():
        records = _in_folder(source)
    else:
        try:
            # Captions may hold what Python takes for ends of lines besides, such as U+2028.
            lines = source.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SeFiError(
                f"{source} cannot be read ({error}): give a folder of photos"
            ) from error
        records = [
            _of_line(line, source, number) for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not records:
        raise SeFiError(f"{source} has no photos: give a folder of photos, or a file of JSON lines")
    return records


def _in_folder(folder: Path) -> list[Record]:
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file()
    )
    return [
        Record(file.stem if file.parent == folder else file.relative_to(folder).parts[0], file)
        for file in files
    ]


def _of_line(line: str, source: Path, number: int) -> Record:
    try:
        given = json.loads(line)
        if not isinstance(given, dict):
            raise ValueError("it is no JSON object")
        person = given["person"]
        if isinstance(person, int) and not isinstance(person, bool):
            person = str(person)
        return Record(
            _text("person", person),
            source.parent / _text("file", given["file"]),
            source.parent / _text("mask", given["mask"]) if given.get("mask") else None,
            " ".join(_text("caption", given["caption"]).split()) if given.get("caption") else "",
            _expression(given["expression"]) if given.get("expression") else (),
        )
    except KeyError as error:
        raise _no_photo(source, number, f"it has no {error.args[0]}") from error
    except RecursionError as error:
        raise _no_photo(source, number, "it is nested too deeply") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise _no_photo(source, number, error) from error


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {str(value)[:60]!r}, where a text is needed")
    return value


def _expression(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != EXPRESSION_WIDTH:
        raise ValueError(f"expression is no list of {EXPRESSION_WIDTH} numbers")
    numbers = tuple(map(float, value))
    if not torch.tensor(numbers, dtype=torch.float32).isfinite().all():
        raise ValueError("expression has numbers that are too large, or NaN")
    return numbers


def _no_photo(source: Path, number: int, error: object) -> SeFiError:
    return SeFiError(
        f'line {number} of {source} is no photo ({error}): write {{"person": "anna", "file": '
        '"anna/1.jpg"}'
    )


def read_picture(file: Path) -> torch.Tensor:
    """A picture file as (H, W, 3) in [0, 1], upright as its EXIF orientation says.

    Raises :class:`SeFiError` for one that is broken.
    """
    try:
        with Image.open(file) as picture:
            return rgb_tensor(ImageOps.exif_transpose(picture).convert("RGB")).float() / 255
    except Exception as error:  # Pillow raises a dozen kinds
        raise SeFiError(
            f"{file} cannot be read as a picture ({error}): mend or remove it"
        ) from error


@dataclass(frozen=True)
class Faces:
    """What is kept of N photos, and who is in them.

    ``tensors``: "crop" (N, 3, 112, 112) uint8, what the encoder sees; for the mapping also "latent"
    (N, C, h, w) and "mask" (N, 1, H, W), uint8. ``people`` (N,) are numbers of ``names``.
    """

    records: list[Record]
    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def names(self) -> list[str]:
        """The people, in the order of their first photo."""
        return list(dict.fromkeys(record.person for record in self.records))

    @property
    def people(self) -> torch.Tensor:
        """Who is in each photo, (N,)."""
        numbers = {name: number for number, name in enumerate(self.names)}
        return torch.tensor([numbers[record.person] for record in self.records])

    @property
    def expressions(self) -> torch.Tensor:
        """(N, 64), NaN where nothing is known."""
        rows = torch.full((len(self), EXPRESSION_WIDTH), float("nan"))
        for row, record in enumerate(self.records):
            if record.expression:
                rows[row] = torch.tensor(record.expression)
        return rows

    def pixels(self, rows: torch.Tensor) -> torch.Tensor:
        """Encoder inputs (B, 3, 112, 112) in [-1, 1] of these photos."""
        return self.tensors["crop"][rows].float() / 127.5 - 1

    def of(self, rows: Sequence[int]) -> Faces:
        """Some of the photos."""
        index = torch.tensor(rows, dtype=torch.long)
        return Faces(
            [self.records[row] for row in rows],
            {name: tensor[index] for name, tensor in self.tensors.items()},
        )

    def split(self, held_out: int, seed: int) -> tuple[Faces, Faces]:
        """Photos to learn from, and those of so many people, at most a fifth, to test with."""
        count = min(held_out, len(self.names) // 5)
        order = torch.randperm(
            len(self.names), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        apart = set(order[:count])
        sides: tuple[list[int], list[int]] = ([], [])
        for row, person in enumerate(self.people.tolist()):
            sides[person in apart].append(row)
        return self.of(sides[0]), self.of(sides[1])


Prepare = Callable[[Record], Mapping[str, torch.Tensor]]
"""Makes of a photo what is to be kept, the same names and shapes each time; raises SeFiError for
one that is of no use."""


def prepared(
    records: Sequence[Record],
    prepare: Prepare,
    folder: Path,
    settings: Mapping[str, Any],
    made_with: str = "",
) -> Faces:
    """What ``prepare`` makes of all photos, kept in ``folder`` for the next time.

    ``settings`` are those that what is kept depends on; ``made_with`` is a digest of weights that
    it depends on besides. Files that are damaged or were made with others are made anew; those of
    earlier versions, which do not say with which, are used. Photos that are of no use are named in
    the log and left out. Raises :class:`SeFiError` if none is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good: list[Record] = []
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(records), PER_FILE):
        some = records[start : start + PER_FILE]
        path = folder / f"{_key(some, settings)}.safetensors"
        tensors = _read(path, made_with) if path.is_file() else None
        if tensors is None:
            tensors = _prepare(some, prepare)
            _write(path, tensors, made_with)
            logger.info("%d of %d photos are prepared.", start + len(some), len(records))
        good += [some[row] for row in tensors.pop("rows").tolist()]
        if tensors:
            parts.append(tensors)
    if not parts:
        raise SeFiError("none of the photos can be used: the log says why")
    names = parts[0]
    return Faces(good, {name: torch.cat([part[name] for part in parts]) for name in names})


def _prepare(records: Iterable[Record], prepare: Prepare) -> dict[str, torch.Tensor]:
    rows: list[int] = []
    made: dict[str, list[torch.Tensor]] = {}
    for row, record in enumerate(records):
        try:
            kept = prepare(record)
        except SeFiError as error:
            logger.warning("%s is left out: %s", record.file, error)
            continue
        rows.append(row)
        for name, tensor in kept.items():
            made.setdefault(name, []).append(tensor)
    stacked = {name: torch.stack(tensors).contiguous() for name, tensors in made.items()}
    return {"rows": torch.tensor(rows, dtype=torch.long), **stacked}


def _read(path: Path, made_with: str) -> dict[str, torch.Tensor] | None:
    """What is kept; None where that cannot be read, or was made with something else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("made_with", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an exception of its own, the system others
        logger.warning("%s cannot be read (%s): its photos are prepared again.", path, error)
        return None
    if told and told != made_with:
        logger.info("%s was made with another model: its photos are prepared again.", path)
        return None
    return tensors


def _write(path: Path, tensors: dict[str, torch.Tensor], made_with: str) -> None:
    """Whole or not at all: several processes may prepare the same photos."""
    part = path.with_suffix(f".part{os.getpid()}")
    safetensors.torch.save_file(tensors, part, {"made_with": made_with} if made_with else None)
    part.replace(path)


def _key(records: Iterable[Record], settings: Mapping[str, Any]) -> str:
    """Changes with the content of the photos, and with what is made of them."""
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for record in records:
        for file in (record.file, record.mask):
            sha.update(b"-" if file is None or not file.is_file() else _content(file))
        if record.mask is not None and _size(record.file) != _size(record.mask):
            sha.update(b"mask of another size")
    return sha.hexdigest()[:32]


def _content(file: Path) -> bytes:
    """A digest of a file; of pictures that EXIF turns another one than it once was."""
    content = file.read_bytes()
    return hashlib.sha256(content + b"upright" * _is_turned(content)).digest()


def _is_turned(content: bytes) -> bool:
    if not re.search(b"(?i)exif|orientation", content):  # a PNG would have to be decoded to know
        return False
    with suppress(Exception):  # what is no picture is told when it is prepared
        with Image.open(io.BytesIO(content)) as picture:
            return picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


def _size(file: Path) -> tuple[int, int] | None:
    """Width and height of a picture, unturned; None for what is no picture."""
    with suppress(Exception), Image.open(file) as picture:
        return picture.size
    return None
