"""The learned identity: two token embeddings per stage and text encoder, and its file format.

An identity file is one safetensors file, of about 15 KB for one stage of Stable Diffusion 1.x and
6 KB more for each further one:

- tensors ``keys.<encoder>`` and ``values.<encoder>``, float32, (stages, vectors, width);
- optional tensor ``thumbnail``, the bytes of a PNG picture as uint8;
- metadata, all strings: ``format``, ``format_version``, ``name``, ``class_word``, ``family``,
  ``widths`` (JSON), ``stages``, ``vectors``, ``training`` (JSON) and ``checksum``, the SHA-256 of
  all other metadata and all tensors. The checksum is the same in every format version.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from .errors import SeFiError
from .prompts import check_class_word, check_name, placeholder_of
from .stages import TRAINING_TIMESTEPS

FORMAT = "sefi-identity"
FORMAT_VERSION = 1

MAX_VECTORS = 75
"""A prompt chunk of CLIP has room for 75 tokens, and the placeholder must fit into one."""

THUMBNAIL_SIDE = 64
MAX_THUMBNAIL_SIDE = 256

FAMILY_LABELS = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}

_TOKEN = re.compile(r"\w+")
# What Pillow raises for a broken or huge PNG.
_PNG_ERRORS = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Identity:
    """What was learned of one person or thing. Always valid: building a bad one raises SeFiError.

    The tensors are private float32 copies on the CPU and no inference tensors, wherever they came
    from, so that training can go on from them.
    """

    name: str
    """Its placeholder in prompts is ``<name>``."""
    class_word: str
    """The general word whose place the placeholder takes, for example "person"."""
    family: str
    """Base model family, a key of ``FAMILY_LABELS``."""
    keys: dict[str, torch.Tensor]
    """Text encoder name ("l", "g") -> (stages, vectors, width): token embeddings for K prompts."""
    values: dict[str, torch.Tensor]
    """The same for V prompts."""
    training: dict[str, object] = field(default_factory=dict)
    """JSON-able settings that it was trained with."""
    thumbnail: torch.Tensor | None = None
    """(height, width, 3) uint8, at most ``MAX_THUMBNAIL_SIDE`` a side."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "name", check_name(self.name))
        set_field(self, "class_word", check_class_word(self.class_word))
        if not isinstance(self.family, str) or not _TOKEN.fullmatch(self.family):
            raise SeFiError(f"{self.family!r} is no base model family: give one such as sd1")
        set_field(self, "keys", _private_embeddings("keys", self.keys))
        set_field(self, "values", _private_embeddings("values", self.values))
        if not _shapes(self.keys) == _shapes(self.values):
            raise SeFiError(
                f"the identity {self.name} is inconsistent: its keys have the shapes "
                f"{_shapes(self.keys)} and its values {_shapes(self.values)}; train it again"
            )
        if len({tensor.shape[:2] for tensor in self.keys.values()}) != 1:
            raise SeFiError(
                f"the identity {self.name} is inconsistent: its text encoders have different "
                f"stages or vectors, {_shapes(self.keys)}; train it again"
            )
        try:
            training = json.loads(json.dumps(dict(self.training), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise SeFiError(
                f"the training settings of the identity {self.name} cannot be stored as JSON "
                f"({error}); use plain finite numbers, texts and lists"
            ) from error
        set_field(self, "training", training)
        if self.thumbnail is not None:
            set_field(self, "thumbnail", _private_thumbnail(self.thumbnail))

    @property
    def placeholder(self) -> str:
        """``"<name>"``."""
        return placeholder_of(self.name)

    @property
    def stages(self) -> int:
        """Number of stages, S."""
        return next(iter(self.keys.values())).shape[0]

    @property
    def vectors(self) -> int:
        """Token embeddings per stage, the same for K and V."""
        return next(iter(self.keys.values())).shape[1]

    @property
    def widths(self) -> dict[str, int]:
        """Text encoder name -> width of its token embeddings."""
        return {encoder: tensor.shape[2] for encoder, tensor in self.keys.items()}

    def renamed(self, name: str) -> Identity:
        """The same identity under another name, and so another placeholder."""
        return replace(self, name=name)

    def same_content(self, other: Identity) -> bool:
        """Whether the two agree in everything that a file holds."""
        ours, theirs = _tensors(self), _tensors(other)
        return (
            _metadata(self) == _metadata(other)
            and ours.keys() == theirs.keys()
            and all(torch.equal(ours[key], theirs[key]) for key in ours)
        )

    def check_fits(self, family: str, widths: Mapping[str, int]) -> None:
        """Raise :class:`SeFiError` unless the identity was made for this kind of model.

        ``widths`` are those of the model's text encoders, as in :attr:`widths`.
        """
        if self.family == family and self.widths == dict(widths):
            return
        raise SeFiError(
            f"the identity {self.placeholder} was learned on {_describe(self.family, self.widths)} "
            f"and does not fit this model, {_describe(family, widths)}: load a checkpoint of its "
            "own kind, or train the identity again on this one"
        )

    def to_bytes(self) -> bytes:
        """The identity as the content of a safetensors file."""
        tensors, metadata = _tensors(self), _metadata(self)
        return safetensors.torch.save(
            tensors, metadata | {"checksum": _checksum(metadata, tensors)}
        )


def read_identity(path: str | Path) -> Identity:
    """Read and validate an identity file.

    Raises :class:`SeFiError`, one sentence that names the file and the remedy, if it is missing,
    unreadable, truncated, changed in any bit, another kind of file, of a newer format version, or
    holds non-finite values or inconsistent shapes.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if metadata.get("format") != FORMAT:
                raise _foreign(path, names)
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise SeFiError(
            f"the identity file {path} is not there: press R to refresh the lists and choose "
            "another, or save the identity again"
        ) from error
    except OSError as error:
        raise SeFiError(
            f"the identity file {path} cannot be read ({error.strerror or error}): check that it "
            "is a file and that you may open it"
        ) from error
    except SafetensorError as error:
        raise _damaged(path, "it is cut off or is no safetensors file") from error

    checksum = metadata.pop("checksum", "")
    if checksum != _checksum(metadata, tensors):
        raise _damaged(path, "its content does not match its checksum")
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise SeFiError(
            f"the identity file {path} has format version {version} and this SeFi-IDE reads "
            f"versions up to {FORMAT_VERSION}: update SeFi-IDE to load it"
        )
    try:
        identity = _parse(metadata, tensors)
    except SeFiError as error:
        raise _damaged(path, str(error)) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, "its metadata or its tensors are incomplete") from error
    if _metadata(identity) != metadata:
        raise _damaged(path, "its metadata does not describe its tensors")
    return identity


def thumbnail_of(image: torch.Tensor) -> torch.Tensor:
    """A thumbnail, uint8 and at most ``THUMBNAIL_SIDE`` pixels a side, of a picture.

    ``image`` is (height, width, channels >= 3) with values 0 to 1, as one picture of a ComfyUI
    IMAGE; the aspect ratio is kept.
    """
    pixels = (image[..., :3].detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return _pixels(picture)


def _private_embeddings(
    role: str, embeddings: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Checked float32 CPU copies, sorted by encoder, that no inference mode clings to."""
    if not isinstance(embeddings, Mapping) or not embeddings:
        raise SeFiError(f"the identity has no {role}: train it again")
    copies = {}
    for encoder, tensor in sorted(embeddings.items()):
        if not _TOKEN.fullmatch(encoder):
            raise SeFiError(f"the identity has an ill-named text encoder, {encoder!r}")
        if not tensor.is_floating_point() or tensor.ndim != 3 or 0 in tensor.shape:
            raise SeFiError(
                f"the {role} of text encoder {encoder} have shape {tuple(tensor.shape)} and type "
                f"{tensor.dtype} where (stages, vectors, width) of floats is needed; train the "
                "identity again"
            )
        stages, vectors, _ = tensor.shape
        if stages > TRAINING_TIMESTEPS or vectors > MAX_VECTORS:
            raise SeFiError(
                f"the {role} have {stages} stages and {vectors} vectors per token where at most "
                f"{TRAINING_TIMESTEPS} and {MAX_VECTORS} are possible; train the identity again"
            )
        with torch.inference_mode(False):
            copy = tensor.detach().to("cpu", torch.float32)
            copy = copy.clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(copy).all():
            raise SeFiError(
                f"the {role} of text encoder {encoder} have values that are not finite numbers; "
                "train the identity again with a lower learning rate"
            )
        copies[encoder] = copy
    return copies


def _private_thumbnail(thumbnail: torch.Tensor) -> torch.Tensor:
    height, width, channels = thumbnail.shape if thumbnail.ndim == 3 else (0, 0, 0)
    fits = channels == 3 and 0 < min(height, width) and max(height, width) <= MAX_THUMBNAIL_SIDE
    if not fits or thumbnail.dtype != torch.uint8:
        raise SeFiError(
            f"the thumbnail has shape {tuple(thumbnail.shape)} and type {thumbnail.dtype} where "
            f"(height, width, 3) of uint8 with at most {MAX_THUMBNAIL_SIDE} a side is needed"
        )
    with torch.inference_mode(False):
        return thumbnail.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _shapes(embeddings: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {encoder: tuple(tensor.shape) for encoder, tensor in embeddings.items()}


def _describe(family: str, widths: Mapping[str, int]) -> str:
    encoders = ", ".join(f"{encoder} {width}" for encoder, width in sorted(widths.items()))
    return f"{FAMILY_LABELS.get(family, family)} (token embeddings: {encoders})"


def _metadata(identity: Identity) -> dict[str, str]:
    """All of the file's metadata but the checksum."""
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
    }


def _tensors(identity: Identity) -> dict[str, torch.Tensor]:
    tensors = {f"keys.{encoder}": tensor for encoder, tensor in identity.keys.items()}
    tensors |= {f"values.{encoder}": tensor for encoder, tensor in identity.values.items()}
    if identity.thumbnail is not None:
        png = io.BytesIO()
        Image.fromarray(identity.thumbnail.numpy()).save(png, "PNG", optimize=True)
        tensors["thumbnail"] = torch.frombuffer(bytearray(png.getvalue()), dtype=torch.uint8)
    return tensors


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Identity:
    roles: dict[str, dict[str, torch.Tensor]] = {"keys": {}, "values": {}}
    for name, tensor in tensors.items():
        if name != "thumbnail":
            role, _, encoder = name.partition(".")
            roles[role][encoder] = tensor
    return Identity(
        name=metadata["name"],
        class_word=metadata["class_word"],
        family=metadata["family"],
        training=json.loads(metadata["training"]),
        thumbnail=_decode_png(tensors["thumbnail"]) if "thumbnail" in tensors else None,
        **roles,
    )


def _decode_png(data: torch.Tensor) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(data.numpy().tobytes()), formats=["PNG"]) as picture:
            if max(picture.size) > MAX_THUMBNAIL_SIDE:
                raise ValueError(f"{picture.size} pixels")
            return _pixels(picture.convert("RGB"))
    except _PNG_ERRORS as error:
        raise SeFiError("its thumbnail is no small PNG picture") from error


def _pixels(picture: Image.Image) -> torch.Tensor:
    """(height, width, 3) uint8 of an RGB picture."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(picture.height, picture.width, 3)


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
