"""Files of face encoders: the two that Face2Diffusion published, and this pack's own.

The published ``msid.pt`` and ``mapping.pt`` are pickles of tensors, which are read as such
(``weights_only``). An own file is one safetensors file with ``encoder.*`` and ``mapping.*`` and,
in its metadata, what Stable Diffusion it predicts for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..checks import check_weights
from ..errors import SeFiError, quoted
from ..families import FAMILIES
from .networks import PUBLISHED_OUTPUTS, EncoderShape, Mapping, Output

FORMAT = "sefi-face-encoder"
FORMAT_VERSION = 1
CROPS = ("aligned", "head")


@dataclass(frozen=True)
class FaceEncoder:
    """Two networks that predict an identity from a photo, in evaluation mode, float32, on the CPU.

    ``crop`` is what the encoder looks at: "aligned", a face turned and scaled by its five points,
    or "head", the square around the mask. ``position_free`` embeddings take the place of the sum of
    token and position embedding, as in the paper, and not of the token embedding alone.
    ``class_word`` is the word whose place they were trained to take.
    """

    encoder: nn.Module
    mapping: Mapping
    shape: EncoderShape
    family: str = "sd1"
    crop: str = "aligned"
    position_free: bool = True
    class_word: str = "person"

    @torch.inference_mode()
    def predict(
        self, faces: torch.Tensor, expression: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Keys and values: text encoder -> (stages, vectors, width), of one person.

        ``faces`` (N, 3, 112, 112) in [-1, 1] are one or several pictures of the person, whose
        features are averaged; ``expression`` (64,) or None is left to the prompt.
        """
        features = self.encoder(faces.float()).mean(0, keepdim=True)
        found = self.mapping(features, None if expression is None else expression[None])
        return self.mapping.vectors_of(found)


class Features(NamedTuple):
    """The first of the two networks of a :class:`FaceEncoder`: its shape, and what it looks at."""

    encoder: nn.Module
    shape: EncoderShape
    crop: str = "aligned"


def read_encoder(path: Path) -> Features:
    """The first of the two networks alone, from ``msid.pt`` or from this pack's own file.

    Raises :class:`SeFiError` for files that are not what they should be.
    """
    if path.suffix == ".pt":
        shape = EncoderShape()
        return Features(_loaded(shape.build(), _msid(path), path), shape)
    whole = read_face_encoder(path)
    return Features(whole.encoder, whole.shape, whole.crop)


def read_published(msid: Path, mapping: Path) -> FaceEncoder:
    """The encoder of the paper, for Stable Diffusion 1.x, from its two files.

    Raises :class:`SeFiError` for files that are not what they should be.
    """
    encoder, shape, _ = read_encoder(msid)
    return FaceEncoder(
        encoder,
        _loaded(Mapping(shape.features, PUBLISHED_OUTPUTS), _tensors_of(mapping), mapping),
        shape,
    )


def read_face_encoder(path: Path) -> FaceEncoder:
    """An encoder from this pack's own file.

    Raises :class:`SeFiError` for a file that is missing, damaged, of another kind or newer.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise _foreign(path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SeFiError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise SeFiError(
            f"the face encoder {path} has format version {quoted(version)} and this SeFi-IDE reads "
            f"{FORMAT_VERSION}: update SeFi-IDE to load it"
        )
    try:
        shape = EncoderShape(**json.loads(metadata["encoder"]))
        outputs = [Output(*output) for output in json.loads(metadata["outputs"])]
        family, crop = metadata["family"], metadata["crop"]
        widths = {output.encoder for output in outputs}
        if family not in FAMILIES or widths != set(FAMILIES[family].encoders) or crop not in CROPS:
            raise ValueError(f"{family}, {crop}, {sorted(widths)}")
        parts: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "mapping": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value.float() if value.is_floating_point() else value
        expression = len(parts["mapping"]["null_exp"])
        return FaceEncoder(
            _loaded(shape.build(), parts["encoder"], path),
            _loaded(Mapping(shape.features, outputs, expression), parts["mapping"], path),
            shape,
            family,
            crop,
            metadata["position_free"] == "true",
            metadata["class_word"],
        )
    except SeFiError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path, error) from error


def write_face_encoder(
    encoder: FaceEncoder, path: Path, training: dict[str, Any] | None = None
) -> None:
    """Write an encoder to this pack's own file, in half precision but for what a norm has counted.

    ``training`` are JSON-able settings for those who ask later. Raises :class:`SeFiError` for
    weights that are no numbers, or too large for half precision.
    """
    tensors = {}
    for part, network in (("encoder", encoder.encoder), ("mapping", encoder.mapping)):
        for key, value in network.state_dict().items():
            whole = not value.is_floating_point() or "running_" in key
            tensors[f"{part}.{key}"] = (value if whole else value.half()).contiguous()
    check_weights(tensors, "face encoder")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "family": encoder.family,
        "crop": encoder.crop,
        "position_free": "true" if encoder.position_free else "false",
        "class_word": encoder.class_word,
        "encoder": json.dumps(encoder.shape.as_json()),
        "outputs": json.dumps(encoder.mapping.outputs),
        "training": json.dumps(training or {}, sort_keys=True),
    }
    safetensors.torch.save_file(tensors, path, metadata)


def _msid(path: Path) -> dict[str, torch.Tensor]:
    """A last norm over all tokens is in the file, and was not used."""
    tensors = _tensors_of(path)
    return {key: value for key, value in tensors.items() if not key.startswith("norm.")}


def _tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pt`` file, without the prefix of a parallel training."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key.removeprefix("module."): value.float() for key, value in state.items()}
    except Exception as error:  # torch says in many ways that it is no such file
        raise _damaged(path, error) from error


def _loaded(network: nn.Module, state: dict[str, torch.Tensor], path: Path) -> Any:
    """``network`` with these weights, ready to predict."""
    try:
        network.load_state_dict(state, strict=True)
    except Exception as error:
        raise _damaged(path, "its tensors are others than such a file has") from error
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise _damaged(path, "it has values that are not numbers")
    return network.eval().requires_grad_(False)


def _damaged(path: Path, error: object) -> SeFiError:
    return SeFiError(
        f"{path} cannot be used as a face encoder ({str(error)[:200]}): put a fresh copy of the "
        "file there"
    )


def _foreign(path: Path) -> SeFiError:
    return SeFiError(
        f"{path} is a safetensors file, but no face encoder: choose msid.pt of Face2Diffusion or a "
        "file that this pack's training of face encoders has written"
    )
