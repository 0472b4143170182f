"""The identity's file: one safetensors file, of about 60 KB for one stage of Stable Diffusion 1.x
and 6 KB more for each further one; the thumbnail is 50 KB of it.

- tensors ``keys.<encoder>`` and ``values.<encoder>``, float32, (stages, vectors, width);
- metadata, all strings: ``format``, ``format_version``, ``name``, ``class_word``, ``family``,
  ``widths`` (JSON), ``stages``, ``vectors``, ``training`` (JSON), what :mod:`.modelspec` shows to
  others, and ``checksum``, the SHA-256 of all other metadata and all tensors. The checksum is the
  same in every format version. ``kind`` is one of :data:`identity.KINDS`; without it the file is
  of the kind "tokens", the first there was.

Version 1 had no metadata for others, and the thumbnail as a tensor ``thumbnail``, the bytes of a
PNG as uint8. It is read, and written no more. The same identity always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..errors import SeFiError, quoted
from .content import MAX_FILE_BYTES, read_content
from .identity import KINDS, Identity
from .modelspec import FREE_TEXTS, shown_metadata, shown_thumbnail

FORMAT = "sefi-identity"

FORMAT_VERSION = 2

MAX_HEADER_BYTES = 2**20
"""Of the safetensors header: all metadata, and the names and shapes of the tensors. ComfyUI's own
/view_metadata reads no more."""

MAX_VERSION_DIGITS = 9

READ_AGAIN_SECONDS = 0.1
"""How long a file that looks broken may be in the middle of being written."""

READ_AGAIN_TIMES = 20
"""How often a file is read that changes all the time."""


def to_bytes(identity: Identity) -> bytes:
    """An identity as the content of a safetensors file, always the same for the same identity.

    Raises :class:`SeFiError` if it is larger than what :func:`read_identity` reads.
    """
    tensors, metadata = _tensors(identity), _metadata(identity)
    content = safetensors.torch.save(tensors, metadata | {"checksum": _checksum(metadata, tensors)})
    header, data = _split(content)
    # safetensors writes the metadata in any order.
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + len(data) > MAX_FILE_BYTES:
        raise SeFiError(
            f"the identity {identity.name} is too large to be saved, its file may have "
            f"{MAX_FILE_BYTES // 2**20} MiB and {MAX_HEADER_BYTES // 2**20} MiB of training "
            "settings: train it with fewer stages, vectors or templates"
        )
    return len(text).to_bytes(8, "little") + text + data


def read_identity(path: str | Path) -> Identity:
    """Read and validate an identity file.

    Raises :class:`SeFiError`, one sentence that names the file and the remedy, if it is missing,
    unreadable, truncated, changed in any bit, another kind of file, of a newer format version, or
    holds non-finite values or inconsistent shapes.

    The file is read into memory once, so what comes out is one version of it, whoever writes it
    meanwhile. A file that is being written is waited for, for two seconds at most.
    """
    path = Path(path)
    content = read_content(path)
    for _ in range(READ_AGAIN_TIMES):
        try:
            return from_bytes(content.data, path)
        except SeFiError:
            # Copying over a file, or writing in it, leaves it broken for a moment.
            time.sleep(READ_AGAIN_SECONDS)
            again = read_content(path)
            if again == content:
                raise
            content = again
    raise SeFiError(
        f"the identity file {path} is being written by another program all the time: wait until "
        "that has ended, then load it again"
    )


def from_bytes(content: bytes, path: Path) -> Identity:
    """The identity in the content of a file, which is called ``path`` in errors.

    Raises :class:`SeFiError` as :func:`read_identity` does.
    """
    if MAX_HEADER_BYTES < _header_length(content) <= len(content) - 8:
        raise _foreign(path, [])
    try:
        header, _ = _split(content)
        metadata = _metadata_in(header)
    except (AttributeError, ValueError, RecursionError) as error:
        raise _damaged(path, "it is cut off or is no safetensors file") from error
    if metadata.get("format") != FORMAT:
        raise _foreign(path, [name for name in header if name != "__metadata__"])
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # whatever safetensors and torch say to a header that lies
        raise _damaged(path, "it is cut off or is no safetensors file") from error

    checksum = metadata.pop("checksum", "")
    if checksum != _checksum(metadata, tensors):
        raise _damaged(path, "its content does not match its checksum")
    version = metadata.get("format_version", "")
    if _is_number(version) and int(version) > FORMAT_VERSION:
        raise SeFiError(
            f"the identity file {path} has format version {version} and this SeFi-IDE reads "
            f"versions up to {FORMAT_VERSION}: update SeFi-IDE to load it"
        )
    kind = metadata.get("kind", KINDS[False])
    if kind not in KINDS:
        raise SeFiError(
            f"the identity file {path} is of the kind {quoted(kind)}, which this SeFi-IDE does not "
            "know: update SeFi-IDE to load it"
        )
    try:
        identity = _parse(metadata, tensors)
    except SeFiError as error:
        raise _damaged(path, str(error)) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, "its metadata or its tensors are incomplete") from error
    if not _describes(metadata, identity):
        raise _damaged(path, "its metadata does not describe its tensors")
    return identity


def _header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data; ValueError or RecursionError if it has none."""
    length = _header_length(content)
    if not 2 <= length <= len(content) - 8:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(content[8 : 8 + length].decode()), content[8 + length :]


def _metadata_in(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that is no text")
    return metadata


def _is_number(text: str) -> bool:
    """Whether ``int(text)`` gives a number, and soon."""
    return text.isdecimal() and len(text) <= MAX_VERSION_DIGITS


def _metadata(identity: Identity) -> dict[str, str]:
    """All of the file's metadata but the checksum."""
    return _own_metadata(identity) | shown_metadata(identity)


def _own_metadata(identity: Identity) -> dict[str, str]:
    """What the pack itself reads."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "name": identity.name,
        "class_word": identity.class_word,
        "family": identity.family,
        "widths": json.dumps(identity.widths, sort_keys=True),
        "stages": str(identity.stages),
        "vectors": str(identity.vectors),
        "training": json.dumps(identity.training, sort_keys=True),
        **({"kind": identity.kind} if identity.position_free else {}),
    }


def _tensors(identity: Identity) -> dict[str, torch.Tensor]:
    tensors = {f"keys.{encoder}": tensor for encoder, tensor in identity.key_vectors.items()}
    return tensors | {f"values.{name}": tensor for name, tensor in identity.value_vectors.items()}


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Identity:
    thumbnail = shown_thumbnail(metadata)
    if _is_old(metadata) and "thumbnail" in tensors:
        thumbnail = tensors["thumbnail"].numpy().tobytes()
        tensors = {name: tensor for name, tensor in tensors.items() if name != "thumbnail"}
    roles: dict[str, dict[str, torch.Tensor]] = {"keys": {}, "values": {}}
    for name, tensor in tensors.items():
        role, _, encoder = name.partition(".")
        roles[role][encoder] = tensor
    return Identity(
        name=metadata["name"],
        class_word=metadata["class_word"],
        family=metadata["family"],
        training=json.loads(metadata["training"]),
        thumbnail=thumbnail,
        key_vectors=roles["keys"],
        value_vectors=roles["values"],
        position_free=metadata.get("kind") == KINDS[True],
    )


def _is_old(metadata: Mapping[str, str]) -> bool:
    return metadata.get("format_version") == "1"


def _describes(metadata: Mapping[str, str], identity: Identity) -> bool:
    """Whether all metadata is what the identity's file would have, but for texts for people."""
    if _is_old(metadata):
        return metadata == _own_metadata(identity) | {"format_version": "1"}
    free = {name: metadata[name] for name in FREE_TEXTS if name in metadata}
    ours = _metadata(identity)
    return metadata.keys() == ours.keys() and metadata == ours | free


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over metadata and tensors in canonical order, as 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, what: str) -> SeFiError:
    return SeFiError(
        f"the identity file {path} is damaged, {what}: copy it again from where it came, or train "
        "and save the identity again"
    )


def _foreign(path: Path, names: list[str]) -> SeFiError:
    """Say what kind of safetensors file this is instead, judged by its tensor names."""
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in names):
        kind = "a checkpoint: load it with Load Checkpoint"
    elif any("lora" in name.lower() for name in names):
        kind = "a LoRA: load it with Load LoRA"
    elif set(names) <= {"emb_params", "clip_l", "clip_g", "t5xxl"} and names:
        kind = "a textual inversion embedding: move it to models/embeddings"
    else:
        kind = "some other or a damaged safetensors file: move it away"
    return SeFiError(
        f"the file {path} is no SeFi identity but {kind}, and choose a file that was written by "
        "SeFi Save Identity"
    )
