"""PNG pictures whose chunks lie, as thumbnails of crafted files."""

from __future__ import annotations

import io
import random
import struct
import zlib
from functools import lru_cache

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"

KINDS = (
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"gAMA",
    b"cHRM", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"sRGB", b"zzzz", b"\0\0\0\0",
)  # fmt: skip

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

Chunk = tuple[bytes, bytes]


def crafted(chance: random.Random) -> bytes:
    """The bytes of a picture; now and then a sound one."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice([b"", b"\0", SIGNATURE, b"GIF89a" + bytes(40), chance.randbytes(99)])
    side = chance.choice([1, 9, 64, 256, 257])
    picture = Image.new(chance.choice(MODES), (side, chance.choice([1, 9, 256])))
    content = io.BytesIO()
    if kind == 1:
        picture.convert("RGB").save(content, chance.choice(["JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
        return content.getvalue()
    picture.save(content, "PNG")
    chunks = _chunks(content.getvalue())
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        _spoil(chunks, chance)
    content = SIGNATURE + b"".join(_written(chunk, chance) for chunk in chunks)
    return content[: chance.randrange(len(content) + 1)] if kind == 2 else content


@lru_cache
def _packed(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def _chunks(content: bytes) -> list[Chunk]:
    chunks, place = [], len(SIGNATURE)
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def _written(chunk: Chunk, chance: random.Random) -> bytes:
    kind, data = chunk
    length, crc = len(data), zlib.crc32(kind + data)
    if chance.random() < 0.03:
        length = chance.choice([0, length + 1, 2**31 - 1, 2**32 - 1])
    if chance.random() < 0.03:
        crc ^= 1
    return struct.pack(">I", length) + kind + data + struct.pack(">I", crc)


def _spoil(chunks: list[Chunk], chance: random.Random) -> None:
    place = chance.randrange(len(chunks)) if chunks else 0
    fault = chance.randrange(6)
    if fault == 0:  # another size, depth, colour, compression, filter or interlacing
        side = chance.choice([0, 1, 9, 256, 257, 2**16, 2**31 - 1, 2**32 - 1])
        numbers = [chance.choice([0, 1, 2, 3, 4, 6, 8, 16, 255]) for _ in range(5)]
        chunks[:1] = [
            (b"IHDR", struct.pack(">IIBBBBB", side, chance.choice([1, 9, 256]), *numbers))
        ]
    elif fault == 1:  # a little data that becomes much
        kind = chance.choice([b"IDAT", b"zTXt", b"iCCP", b"iTXt"])
        much = _packed(chance.choice([10**4, 10**7, 6 * 10**7]))
        before = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}.get(kind, b"")
        chunks.insert(max(1, place), (kind, before + much))
    elif fault == 2:
        chunks.insert(place, (chance.choice(KINDS), chance.randbytes(chance.choice([0, 1, 5, 26]))))
    elif fault == 3 and chunks:
        del chunks[place]
    elif fault == 4 and chunks:
        chunks.insert(chance.randrange(len(chunks)), chunks[place])
    elif chunks and chunks[place][1]:
        kind, data = chunks[place]
        at = chance.randrange(len(data))
        chunks[place] = (kind, data[:at] + chance.randbytes(1) + data[at + 1 :])
