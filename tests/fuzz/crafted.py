"""Identity files whose bytes, header, metadata, tensors and picture lie, under a right checksum."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import safetensors.torch
import torch

from ...sefi_core.identity import file as identity_file
from ...sefi_core.identity.file import to_bytes
from ...sefi_core.identity.identity import Identity
from ...sefi_core.identity.modelspec import THUMBNAIL
from ...sefi_core.identity.thumbnail import thumbnail_of
from . import pictures

TEXTS = (
    "", " ", "null", "NaN", "-1", "0", "1.5", "1e999", "9" * 30, "9" * 6000, "[]", "{}", '"', "{",
    "[" * 3000, "[" * 19 + "]" * 19, "[" * 30 + "]" * 30, '{"a": 1, "a": 2}', '{"l": 1e400}',
    '{"x": NaN}', '{"x": Infinity}', "[" + "1," * 5000 + "1]", '{"x": ' + "9" * 5000 + "}",
    "\0", "a\nb", "\u202eanna", "\ud800", "é", "e\u0301", "<anna>", "../anna", "con", "a" * 65,
    "a" * 100_000, "１", "²", "sdxl", "sd1", "person", "kind", "tokens",
)  # fmt: skip

VALUES = (None, True, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**30, 1e308, "", "F32", [], {}, [[]])

DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "C64", "Q4", "f32", "",
)  # fmt: skip

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}

NAMES = ("keys.l", "values.l", "keys.g", "values.g", "keys.", ".l", "keys", "keys.l.g", "thumbnail",
         "thumbnail.l", "", ".", "queries.l", "keys.\ud800", "keys. l", "k" * 5000)  # fmt: skip

NUMBERS = (float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45, -0.0, 1e10)


class Made:
    """A file in its parts, to be tampered with: the header as JSON, and the tensors' data."""

    def __init__(self, content: bytes):
        self.header, data = identity_file._split(content)
        self.data = bytearray(data)
        self.wrap: Callable[[bytes], bytes] = bytes  # of the header's text

    @property
    def metadata(self) -> dict:
        found = self.header.get("__metadata__")
        return found if isinstance(found, dict) else {}

    def tensors(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def entry(self, chance: random.Random) -> dict:
        entry = self.header[chance.choice(self.tensors())] if self.tensors() else {}
        return entry if isinstance(entry, dict) else {}

    def content(self) -> bytes:
        text = self.wrap(json.dumps(self.header).encode())
        return len(text).to_bytes(8, "little") + text + bytes(self.data)

    def sealed(self) -> bytes:
        """The content with the checksum that the reader will compute, if it comes so far."""
        with suppress(Exception):
            metadata = {key: text for key, text in self.metadata.items() if key != "checksum"}
            tensors = safetensors.torch.load(self.content())
            self.metadata["checksum"] = identity_file._checksum(metadata, tensors)
        return self.content()


def any_value(chance: random.Random) -> Any:
    return deepcopy(chance.choice(VALUES))


def identity(chance: random.Random) -> Identity:
    """A sound one, small."""
    stages, vectors = chance.choice([1, 1, 2, 5]), chance.choice([1, 1, 3])
    widths = chance.choice([{"l": 8}, {"l": 768}, {"h": 16}, {"l": 8, "g": 12}])
    generator = torch.Generator().manual_seed(chance.getrandbits(30))
    keys, values = (
        {name: torch.randn(stages, vectors, w, generator=generator) for name, w in widths.items()}
        for _ in "kv"
    )
    face = chance.choice([None, thumbnail_of(torch.full((chance.randint(1, 64), 9, 3), 0.1))])
    training = {"steps": 3, "templates": ["a photo of <name>"], "note": "ü"}
    return Identity("anna", "person", "sd1", keys, values, training, face)


# --- what can be wrong --------------------------------------------------------------------------


def metadata_text(made: Made, chance: random.Random) -> None:
    if made.metadata:
        made.metadata[chance.choice(list(made.metadata))] = chance.choice(TEXTS)


def metadata_swap(made: Made, chance: random.Random) -> None:
    if made.metadata:
        one, other = (chance.choice(list(made.metadata)) for _ in "12")
        made.metadata[one], made.metadata[other] = made.metadata[other], made.metadata[one]


def metadata_key(made: Made, chance: random.Random) -> None:
    if made.metadata and chance.random() < 0.5:
        made.metadata.pop(chance.choice(list(made.metadata)))
    else:
        made.metadata[chance.choice(["kind", "note", "", "thumbnail"])] = chance.choice(TEXTS)


def metadata_value(made: Made, chance: random.Random) -> None:
    if made.metadata and chance.random() < 0.8:
        made.metadata[chance.choice(list(made.metadata))] = any_value(chance)
    else:
        made.header["__metadata__"] = any_value(chance)


def metadata_json(made: Made, chance: random.Random) -> None:
    """Widths, stages and vectors that do not say what the tensors are."""
    if made.metadata:
        key = chance.choice(["widths", "stages", "vectors", "format_version"])
        number = chance.choice([0, 1, 2, 5, 8, -1, 10**9, 10**40])
        made.metadata[key] = json.dumps({"l": number} if key == "widths" else number)


def training(made: Made, chance: random.Random) -> None:
    value: Any = any_value(chance)
    for _ in range(chance.choice([0, 1, 5, 18, 19, 20, 21, 500])):
        value = {"x": value} if chance.random() < 0.5 else [value]
    if made.metadata:
        made.metadata["training"] = json.dumps({"x": value} if chance.random() < 0.8 else value)


def dtype(made: Made, chance: random.Random) -> None:
    """Another type, of the same bytes or with a shape that fits it."""
    entry = made.entry(chance)
    entry["dtype"] = chance.choice(DTYPES)
    size, offsets = SIZES.get(entry["dtype"]), entry.get("data_offsets")
    with suppress(TypeError, ValueError, KeyError):
        if size and chance.random() < 0.8:
            count = (offsets[1] - offsets[0]) // size
            entry["shape"] = chance.choice([[1, 1, count], [count], [count, 1, 1], [1, count, 1]])


def shape(made: Made, chance: random.Random) -> None:
    entry = made.entry(chance)
    old = entry.get("shape")
    if not isinstance(old, list):
        return
    kind = chance.randrange(5)
    if kind == 0:
        chance.shuffle(old)
    elif kind == 1:
        old.insert(chance.randint(0, len(old)), chance.choice([1, 1, 1, 0, 2]))
    elif kind == 2 and old:
        old[chance.randrange(len(old))] = any_value(chance)
    elif kind == 3:
        entry["shape"] = chance.choice([[], [0, 1, 8], [2**32, 2**32, 8], [1] * 70, [2**62, 4, 1]])
    elif len(old) == 3 and all(isinstance(side, int) for side in old):
        entry["shape"] = [old[0] * old[1], 1, old[2]]


def offsets(made: Made, chance: random.Random) -> None:
    one = made.entry(chance)
    if chance.random() < 0.5:
        other = made.entry(chance)
        for key in ("data_offsets", "shape") if chance.random() < 0.5 else ("data_offsets",):
            one[key], other[key] = other.get(key), one.get(key)
    elif isinstance(one.get("data_offsets"), list) and one["data_offsets"]:
        place = chance.randrange(len(one["data_offsets"]))
        one["data_offsets"][place] = any_value(chance)


def entry(made: Made, chance: random.Random) -> None:
    names = made.tensors()
    if not names:
        return
    name = chance.choice(names)
    kind = chance.randrange(5)
    if kind == 0:
        del made.header[name]
    elif kind == 1:
        made.header[chance.choice(NAMES)] = made.header.pop(name)
    elif kind == 2:
        made.header[name] = any_value(chance)
    elif kind == 3 and isinstance(made.header[name], dict) and made.header[name]:
        made.header[name].pop(chance.choice(list(made.header[name])))
    else:
        made.header[chance.choice(NAMES)] = {"dtype": "F32", "shape": [1, 1, 0],
                                             "data_offsets": [len(made.data)] * 2}  # fmt: skip


def added_tensor(made: Made, chance: random.Random) -> None:
    """One more tensor, rightly described."""
    shape = chance.choice([[1, 1, 8], [5, 1, 8], [101, 1, 8], [1, 76, 8], [1, 1, 8193], [8], []])
    count = 1
    for side in shape:
        count *= side
    name = chance.choice(NAMES)
    start = len(made.data)
    made.data += bytes(4 * count)
    made.header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(made.data)]}


def numbers(made: Made, chance: random.Random) -> None:
    """Values of the tensors."""
    for _ in range(chance.choice([1, 1, 50])):
        place = 4 * chance.randrange(max(1, len(made.data) // 4))
        value = torch.tensor(chance.choice(NUMBERS)).numpy().tobytes()
        made.data[place : place + 4] = value


def data_bytes(made: Made, chance: random.Random) -> None:
    kind = chance.randrange(3)
    if kind == 0 and made.data:
        made.data[chance.randrange(len(made.data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del made.data[chance.randrange(len(made.data) + 1) :]
    else:
        made.data += chance.randbytes(chance.choice([1, 8, 4096]))


def header_text(made: Made, chance: random.Random) -> None:
    """The header's own text, as no JSON writer writes it."""
    place = chance.random()
    piece = chance.choice([b"", b" " * 4000, b"\xff", b"{", b'"', b"\0", b"NaN", b",", b"[" * 2000])
    cut = chance.choice([0, 0, 1, 20])

    def wrap(text: bytes) -> bytes:
        at = int(place * len(text))
        return text[:at] + piece + text[at + cut :]

    made.wrap = wrap


def doubled_keys(made: Made, chance: random.Random) -> None:
    more = chance.choice(
        [
            b'"__metadata__": {}',
            b'"__metadata__": {"format": "sefi-identity"}',
            b'"keys.l": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
        ]
    )
    first = chance.random() < 0.5

    def wrap(text: bytes) -> bytes:
        return b"{" + more + b"," + text[1:] if first else text[:-1] + b"," + more + b"}"

    made.wrap = wrap


def thumbnail(made: Made, chance: random.Random) -> None:
    """A picture that is none, or not the picture that it says it is."""
    content = pictures.crafted(chance)
    if chance.random() < 0.5:
        encoded = base64.b64encode(content).decode()
        kind = chance.choice(["image/png", "image/png", "image/jpeg", "text/html", ""])
        made.metadata[THUMBNAIL] = f"data:{kind};base64,{encoded}"
        made.metadata["ssmd_cover_images"] = json.dumps([encoded])
        return
    become_old(made, chance)
    begin = len(made.data)
    made.data += content
    offsets = [begin, len(made.data)]
    made.header["thumbnail"] = {"dtype": "U8", "shape": [len(content)], "data_offsets": offsets}


def become_old(made: Made, chance: random.Random) -> None:
    """A file of format version 1, or a mixture of the two."""
    made.metadata["format_version"] = "1"
    if chance.random() < 0.9:
        for name in [name for name in made.metadata if name.startswith(("modelspec", "ssmd"))]:
            del made.metadata[name]


FAULTS = (
    metadata_text, metadata_swap, metadata_key, metadata_value, metadata_json, training, dtype,
    shape, offsets, entry, added_tensor, numbers, numbers, data_bytes, header_text, doubled_keys,
    become_old, thumbnail, thumbnail, thumbnail,
)  # fmt: skip


def crafted(chance: random.Random) -> tuple[bytes, bytes, bool]:
    """A sound file, what became of it, and whether its checksum was made right again."""
    sound = to_bytes(identity(chance))
    made = Made(sound)
    for _ in range(chance.choice([1, 1, 2, 3])):
        chance.choice(FAULTS)(made, chance)
        if not isinstance(made.header, dict):
            break
    if chance.random() < 0.9:
        return sound, made.sealed(), True
    content = bytearray(made.content())
    for _ in range(chance.choice([0, 1, 8])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return sound, bytes(content[: chance.choice([len(content), chance.randrange(200)])]), False
