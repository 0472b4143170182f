"""Files of face adapters, in IP-Adapter's layout: the published FaceID ones and this pack's own.

``image_proj.*`` are the weights of a network of :mod:`networks`, ``ip_adapter.{i}.to_k_ip.weight``
and ``to_v_ip.weight`` those of the image cross-attention, and ``ip_adapter.{i}.to_{q,k,v,out}_lora.
{down,up}.weight`` a LoRA. Transformer block n of the U-Net, in the order input, output, middle, has
i = 2n for its self-attention and 2n + 1 for its cross-attention. An own file says in its metadata
what is not known of a published one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..checks import check_weights
from ..errors import SeFiError, quoted
from ..families import FAMILIES
from .networks import FaceProjection, PairProjection, PlusProjection, Resampler, Sizes

FORMAT = "sefi-face-adapter"
FORMAT_VERSION = 1

FACEID, PORTRAIT, PLUS, PLUS_V2 = "faceid", "portrait", "plus", "plus v2"
UNNORM, INFINITE_ID = "portrait unnorm", "infinite-id"
VARIANTS = (FACEID, PORTRAIT, PLUS, PLUS_V2, UNNORM, INFINITE_ID)
AUTO = "auto"
ASKED = (AUTO, PLUS, PLUS_V2)
"""What a user may say of a file: the two have the same tensors."""

MOST_FACES = 5
"""Photos that a portrait adapter takes side by side."""

MOST_LAYERS = 64
"""Of what looks at a CLIP's states or at faces."""

PORTRAIT_TOKENS = 16

_PARTS = {"input": 0, "output": 1, "middle": 2}

_KNOWN = {(768, 16): "sd1", (1024, 16): "sd2", (2048, 70): "sdxl"}
"""Width of the tokens and number of layers of a family."""

_LAYER = re.compile(r"(?:ip_adapter|adapter_modules)\.(\d{1,4})\.(.+)")
_LORA = re.compile(r"to_(q|k|v|out)_lora\.(down|up)\.weight")

Block = tuple[str, int, int]
"""A transformer block: part of the U-Net, number, index."""


@dataclass(frozen=True)
class Embedder:
    """What says who a face is, as a file names it.

    ``kind`` is "insightface" or "sface", ONNX models that are found by their name, or "sefi", the
    first network of a face encoder of this pack, which is also known by its SHA-256. ``unit``
    embeddings have length 1.
    """

    kind: str = "insightface"
    file: str = "w600k_r50.onnx"
    width: int = 512
    unit: bool = True
    sha256: str = ""


PUBLISHED_EMBEDDER = Embedder()


class Lora(NamedTuple):
    """``up`` (out, rank) times ``down`` (rank, in) is added to a layer's weight."""

    down: torch.Tensor
    up: torch.Tensor


class Layer(NamedTuple):
    """Of one cross-attention: image tokens to keys and to values, (channels, width) each."""

    to_k: torch.Tensor
    to_v: torch.Tensor


@dataclass(frozen=True, eq=False)
class FaceAdapter:
    """A projection in evaluation mode, float32, on the CPU, and a layer for each transformer block.

    ``layers`` are in the file's order, see :func:`in_file_order`. ``lora`` has for a block's number
    and one of "attn1.to_q" and its like what is added there. ``with_text`` says whether it was
    trained beside the text's attention, None where that is not known.
    """

    variant: str
    family: str
    projection: nn.Module
    layers: Sequence[Layer]
    lora: Mapping[tuple[int, str], Lora] = field(default_factory=dict)
    embedder: Embedder = PUBLISHED_EMBEDDER
    with_text: bool | None = None

    @property
    def looks_at_pictures(self) -> bool:
        """Whether it needs a CLIP's states besides the face's embedding."""
        return self.variant in (PLUS, PLUS_V2, INFINITE_ID)

    @property
    def takes_several(self) -> bool:
        """Whether several photos are seen side by side, and not averaged."""
        return self.variant in (PORTRAIT, UNNORM)

    @torch.inference_mode()
    def tokens(self, faces: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
        """Image tokens (rows, T, width) of faces (rows, people, F); see :mod:`networks`."""
        return self.projection(faces.float(), None if states is None else states.float())


def in_file_order(blocks: Sequence[Block]) -> list[Block]:
    """Transformer blocks of a U-Net as a file counts them: input, output, and the middle last."""
    return sorted(blocks, key=lambda block: (_PARTS[block[0]], *block[1:]))


def read_face_adapter(path: Path, asked: str = AUTO) -> FaceAdapter:
    """The adapter in a ``.safetensors`` or ``.bin`` file.

    ``asked`` is one of :data:`ASKED`. Raises :class:`SeFiError` for a file that is missing,
    damaged or no face adapter, and where it cannot be told which of two variants it is.
    """
    tensors, metadata = _content(path)
    try:
        return _adapter_of(tensors, metadata, path, asked)
    except SeFiError:
        raise
    except Exception as error:  # of tensors that no such file has, in many ways
        raise _damaged(path, error) from error


def _adapter_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path, asked: str
) -> FaceAdapter:
    projection = {
        key.partition(".")[2]: value.float()
        for key, value in tensors.items()
        if key.startswith(("image_proj.", "image_proj_model."))
    }
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if match := _LAYER.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    if not projection or not found:
        raise _foreign(path)
    if not all(
        bool(torch.isfinite(value.float()).all())
        for value in tensors.values()
        if value.is_floating_point()
    ):
        raise _damaged(path, "it has values that are not numbers")
    own = _own_metadata(metadata, path)
    variant = own.variant if own else _variant_of(projection, path, asked)
    network, sizes = _network(variant, projection, path)
    layers = _layers(found, sizes.width, path)
    family = own.family if own else _KNOWN.get((sizes.width, len(layers)))
    if family is None:
        raise SeFiError(
            f"{path} has {len(layers)} layers for tokens of {sizes.width} numbers, as no "
            "Stable Diffusion 1.x, 2.x or SDXL has: choose a face adapter for one of them, or put "
            "a fresh copy of the file there"
        )
    embedder = own.embedder if own else Embedder(unit=variant != UNNORM)
    if sizes.face != embedder.width:
        raise SeFiError(
            f"{path} takes embeddings of {sizes.face} numbers and its face recogniser "
            f"{embedder.file} gives {embedder.width}: choose a face adapter of IP-Adapter FaceID, "
            "or one that this pack has trained"
        )
    lora = _lora(found, len(layers), path)
    return FaceAdapter(
        variant, family, network, layers, lora, embedder, own.with_text if own else None
    )


def write_face_adapter(
    adapter: FaceAdapter, path: Path, training: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter as a safetensors file in half precision, in IP-Adapter's layout.

    ``training`` are JSON-able settings for those who ask later. Raises :class:`SeFiError` for
    weights that are no numbers, or too large for half precision.
    """
    tensors = {f"image_proj.{key}": value for key, value in adapter.projection.state_dict().items()}
    for number, layer in enumerate(adapter.layers):
        tensors[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"] = layer.to_k
        tensors[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] = layer.to_v
    for (number, name), lora in adapter.lora.items():
        attention, _, projection = name.partition(".")
        prefix = f"ip_adapter.{2 * number + (attention == 'attn2')}.{projection}_lora"
        tensors |= {f"{prefix}.down.weight": lora.down, f"{prefix}.up.weight": lora.up}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "family": adapter.family,
        "variant": adapter.variant,
        "embedder": json.dumps(asdict(adapter.embedder), sort_keys=True),
        "with_text": json.dumps(adapter.with_text),
        "training": json.dumps(training or {}, sort_keys=True),
    }
    halves = {key: value.detach().cpu().half().contiguous() for key, value in tensors.items()}
    check_weights(halves, "face adapter")
    safetensors.torch.save_file(halves, path, metadata)


class _Own(NamedTuple):
    family: str
    variant: str
    embedder: Embedder
    with_text: bool | None


def _content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, flat, and its metadata."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        nested = torch.load(path, map_location="cpu", weights_only=True)
        flat: dict[str, torch.Tensor] = {}
        for key, value in nested.items():
            if not isinstance(key, str):
                raise ValueError("it has names that are no texts")
            parts = value.items() if isinstance(value, Mapping) else ((None, value),)
            for name, tensor in parts:
                if not torch.is_tensor(tensor):
                    raise ValueError("it has more than tensors")
                flat[key if name is None else f"{key}.{name}"] = tensor
        return flat, {}
    except Exception as error:  # torch and safetensors say in many ways that it is no such file
        raise _damaged(path, error) from error


def _own_metadata(metadata: Mapping[str, str], path: Path) -> _Own | None:
    if metadata.get("format") != FORMAT:
        return None
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise SeFiError(
            f"the face adapter {path} has format version {quoted(version)} and this SeFi-IDE reads "
            f"{FORMAT_VERSION}: update SeFi-IDE to load it"
        )
    try:
        embedder = _embedder(json.loads(metadata["embedder"]))
        with_text = json.loads(metadata["with_text"])
        family, variant = metadata["family"], metadata["variant"]
        if family not in FAMILIES or variant not in VARIANTS:
            raise ValueError(f"{family}, {variant}")
        return _Own(family, variant, embedder, with_text)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def _embedder(given: Mapping[str, Any]) -> Embedder:
    """What a file says of its recogniser, whose file must not lie anywhere else than it should."""
    embedder = Embedder(**given)
    if embedder.kind not in ("insightface", "sface", "sefi"):
        raise ValueError(f"a face recogniser of the kind {embedder.kind}")
    name = embedder.file
    if not isinstance(name, str) or not name or name in (".", ".."):
        raise ValueError("a face recogniser without a file")
    # What this pack's own encoders are called is checked where they are looked for.
    if embedder.kind != "sefi" and set(name) & set("/\\:\0"):
        raise ValueError(f"a face recogniser {name}, which is no file's name")
    if type(embedder.width) is not int or embedder.width < 1:
        raise ValueError(f"embeddings of {embedder.width} numbers")
    if type(embedder.unit) is not bool or not isinstance(embedder.sha256, str):
        raise ValueError("a face recogniser that is not told as it should be")
    return embedder


def _variant_of(projection: Mapping[str, torch.Tensor], path: Path, asked: str) -> str:
    """Which network has such weights; of two that have the same, what the file's name says."""
    if "latents" in projection and "proj_in.weight" in projection:
        if projection["proj_in.weight"].shape[-1] > PUBLISHED_EMBEDDER.width:
            raise _foreign(path)  # IP-Adapter plus, which looks at pictures only
        return UNNORM
    if "proj.0.weight" not in projection or "norm.weight" not in projection:
        raise _foreign(path)
    if any(key.startswith("perceiver_resampler.") for key in projection):
        if asked != AUTO:
            return asked
        name = re.sub(r"[^a-z0-9]", "", path.stem.lower())
        if "plusv2" in name:
            return PLUS_V2
        if "plus" in name:
            return PLUS
        raise SeFiError(
            f"{path} is a FaceID plus or plus v2 adapter, and only its name could tell which: set "
            "variant"
        )
    width = len(projection["norm.weight"])
    tokens = projection["proj.2.weight"].shape[0] // max(1, width)
    return PORTRAIT if tokens == PORTRAIT_TOKENS else FACEID


def _network(
    variant: str, state: Mapping[str, torch.Tensor], path: Path
) -> tuple[nn.Module, Sizes]:
    """The projection with these weights, and its sizes, which are read off them."""
    try:
        depth = 1 + max(
            (int(m[1]) for key in state if (m := re.search(r"layers\.(\d+)\.", key))), default=0
        )
        if depth > MOST_LAYERS:  # each of them takes memory before it is known that it is wrong
            raise ValueError(f"it has {depth} layers")
        if variant == UNNORM:
            inner, face = state["proj_in.weight"].shape
            tokens, width = state["latents"].shape[1], len(state["norm_out.weight"])
            sizes = Sizes(face, width, tokens, depth=depth, inner=inner)
            network: nn.Module = Resampler(sizes)
        else:
            prefix = "face." if variant == INFINITE_ID else ""
            hidden, face = state[f"{prefix}proj.0.weight"].shape
            width = len(state[f"{prefix}norm.weight"])
            tokens = state[f"{prefix}proj.2.weight"].shape[0] // width
            sizes = Sizes(face, width, tokens, hidden=hidden, depth=depth)
            if variant == INFINITE_ID:
                sizes = sizes._replace(states=state["clip.proj_in.weight"].shape[1])
                network = PairProjection(sizes)
            elif variant in (PLUS, PLUS_V2):
                seen = state["perceiver_resampler.proj_in.weight"].shape[1]
                sizes = sizes._replace(states=seen)
                network = PlusProjection(sizes, variant == PLUS_V2)
            else:
                network = FaceProjection(sizes)
        network.load_state_dict(dict(state), strict=True)
    except Exception as error:  # of shapes that no such network has, in many ways
        raise _damaged(path, "the tensors of image_proj are others than such a file has") from error
    return network.eval().requires_grad_(False), sizes


def _layers(found: Mapping[int, Mapping[str, torch.Tensor]], width: int, path: Path) -> list[Layer]:
    """The image cross-attentions in their order; every second number is one."""
    numbers = sorted(number for number, of in found.items() if "to_k_ip.weight" in of)
    last = max(found) // 2 if found else 0
    expected = [2 * n + 1 for n in range(last + 1)]
    if numbers != expected:
        missing = sorted(set(expected) - set(numbers)) or sorted(set(numbers) - set(expected))
        raise _damaged(path, f"ip_adapter.{missing[0]}.to_k_ip.weight is not as in such a file")
    layers = []
    for number in numbers:
        pair = [found[number].get(f"to_{one}_ip.weight") for one in "kv"]
        if any(one is None or one.ndim != 2 for one in pair):
            raise _damaged(path, f"ip_adapter.{number} has no to_k_ip and to_v_ip of two sides")
        to_k, to_v = (one.float() for one in pair if one is not None)
        if to_k.shape != to_v.shape or to_k.shape[1] != width:
            raise _damaged(
                path,
                f"ip_adapter.{number} takes tokens of {to_k.shape[1]} and {to_v.shape[1]} numbers, "
                f"and image_proj gives {width}",
            )
        layers.append(Layer(to_k, to_v))
    return layers


def _lora(
    found: Mapping[int, Mapping[str, torch.Tensor]], count: int, path: Path
) -> dict[tuple[int, str], Lora]:
    halves: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for number, tensors in found.items():
        for name, value in tensors.items():
            if match := _LORA.fullmatch(name):
                place = number // 2, f"attn{number % 2 + 1}.to_{match[1]}"
                halves.setdefault(place, {})[match[2]] = value.float()
    lora: dict[tuple[int, str], Lora] = {}
    for place, pair in halves.items():
        down, up = pair.get("down"), pair.get("up")
        if (
            down is None
            or up is None
            or down.ndim != 2
            or up.ndim != 2
            or len(down) != up.shape[1]
            or place[0] >= count
        ):
            raise _damaged(path, f"the LoRA at block {place[0]} ({place[1]}) is not whole")
        lora[place] = Lora(down, up)
    return lora


def _damaged(path: Path, error: object) -> SeFiError:
    return SeFiError(
        f"{path} cannot be used as a face adapter ({str(error)[:200]}): put a fresh copy of the "
        "file there"
    )


def _foreign(path: Path) -> SeFiError:
    return SeFiError(
        f"{path} is no face adapter: choose a FaceID file of IP-Adapter, or a file that this "
        "pack's training of face adapters has written"
    )
