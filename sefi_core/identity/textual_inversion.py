"""Textual inversion files: an identity as one, and one as an identity.

Read are the layouts of A1111 (``string_to_param``), kohya (``emb_params``; ``clip_l`` and
``clip_g`` for SDXL), diffusers (one tensor under its token) and ComfyUI (any of them, and a list of
them). Pickles are read as tensors only.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..errors import SeFiError
from .content import MAX_FILE_BYTES
from .identity import MAX_VECTORS, Identity
from .modelspec import ARCHITECTURES

PICKLES = (".pt", ".bin")
SAFE = ".safetensors"

ARCHITECTURE = "modelspec.architecture"

_FAMILY_OF_WIDTH = {768: ("sd1", "l"), 1024: ("sd2", "h")}
_ENCODER_OF_FAMILY = {"sd1": "l", "sd2": "h"}
_SDXL = ("clip_l", "clip_g")


def exported(identity: Identity, least: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of an embedding file: V vectors, their mean over the stages.

    They are what a CLIP that knows the identity has in the place of its placeholder for whoever
    knows textual inversion only. ``least`` is the number of tokens of the class word: a placeholder
    takes as many places, in which the last vector is repeated. Raises :class:`SeFiError` for an
    identity whose vectors hold positions too.
    """
    if identity.position_free:
        raise SeFiError(
            f"the identity {identity.placeholder} is of SeFi Predict Identity, whose vectors hold "
            "a place in the prompt too, and cannot be an ordinary embedding: export one that SeFi "
            "Train Identity has learned from photos alone"
        )
    names = {"l": "clip_l", "g": "clip_g"} if len(identity.value_vectors) > 1 else {}
    tensors = {}
    for encoder, rows in identity.value_vectors.items():
        mean = rows.mean(0)
        missing = max(0, least - len(mean))
        tensors[names.get(encoder, "emb_params")] = torch.cat([mean, mean[-1:].expand(missing, -1)])
    return tensors


def embedding_bytes(identity: Identity, least: int = 1) -> bytes:
    """The content of a safetensors file of :func:`exported`, always the same for the same."""
    architecture = ARCHITECTURES.get(identity.family, identity.family)
    metadata = {ARCHITECTURE: f"{architecture}/textual-inversion"}
    return safetensors.torch.save(exported(identity, least), metadata)


def read_embedding(path: Path, name: str, class_word: str) -> Identity:
    """The identity of one stage, K = V, that draws what the embedding file draws.

    The family is that of the vectors' width or, for any other width, what the file says of itself.
    Raises :class:`SeFiError`, one sentence that names the file, if it is none.
    """
    tensors, architecture = _content(path)
    rows = _of_encoders(path, tensors, architecture)
    family, vectors = rows
    counts = {len(one) for one in vectors.values()}
    if len(counts) != 1 or max(counts) > MAX_VECTORS:
        raise _unusable(
            path,
            f"it has {' and '.join(map(str, sorted(counts)))} vectors where at most {MAX_VECTORS}, "
            "as many for each text encoder, are possible",
        )
    if not all(bool(one.isfinite().all()) for one in vectors.values()):
        raise _unusable(path, "it has values that are not finite numbers")
    stages = {encoder: one[None] for encoder, one in vectors.items()}
    return Identity(name, class_word, family, stages, stages, {"embedding": path.name})


def _content(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a file by their names, and the architecture that it gives."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise _unusable(path, f"it is no plain file of at most {MAX_FILE_BYTES // 2**20} MiB")
        data = path.read_bytes()
        if path.suffix.lower() == SAFE:
            length = int.from_bytes(data[:8], "little")
            tensors = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
            return tensors, str(metadata.get(ARCHITECTURE, ""))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return dict(_tensors_in(loaded)), ""
    except SeFiError:
        raise
    except Exception as error:  # whatever torch, safetensors and json say to what is no such file
        raise _unusable(path, "it is damaged, or no file of tensors alone") from error


def _tensors_in(loaded: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a pickle, those of A1111's ``string_to_param`` alone."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get("string_to_param"), Mapping):
        loaded = loaded["string_to_param"]
    for part in loaded if isinstance(loaded, list) else [loaded]:
        for name, value in part.items():
            if torch.is_tensor(value):
                yield str(name), value


def _of_encoders(
    path: Path, tensors: Mapping[str, torch.Tensor], architecture: str
) -> tuple[str, dict[str, torch.Tensor]]:
    """The family, and the rows (vectors, width) of each of its text encoders, float32."""
    if all(name in tensors for name in _SDXL):
        return "sdxl", {name.removeprefix("clip_"): _rows(path, tensors[name]) for name in _SDXL}
    named = [name for name in ("emb_params", "clip_l", "clip_h") if name in tensors]
    if len(named) != 1 and len(tensors) != 1:
        raise _unusable(path, "its tensors are not those of one embedding")
    rows = _rows(path, tensors[named[0] if named else next(iter(tensors))])
    width = rows.shape[1]
    if width in _FAMILY_OF_WIDTH:
        family, encoder = _FAMILY_OF_WIDTH[width]
        return family, {encoder: rows}
    for family, known in ARCHITECTURES.items():
        if architecture == f"{known}/textual-inversion" and family in _ENCODER_OF_FAMILY:
            return family, {_ENCODER_OF_FAMILY[family]: rows}
    raise _unusable(
        path,
        f"its vectors have {width} numbers where those of SD 1.x have 768, of SD 2.x 1024, and "
        "SDXL has both clip_l and clip_g",
    )


def _rows(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim not in (1, 2) or 0 in tensor.shape or not tensor.is_floating_point():
        raise _unusable(
            path, f"a tensor of it has the shape {tuple(tensor.shape)} and type {tensor.dtype}"
        )
    return tensor.detach().reshape(-1, tensor.shape[-1])[: MAX_VECTORS + 1].float()


def _unusable(path: Path, what: str) -> SeFiError:
    return SeFiError(
        f"the file {path} cannot be used as a textual inversion, {what}: choose an embedding of "
        "SD 1.x, SD 2.x or SDXL, .safetensors or .pt"
    )
