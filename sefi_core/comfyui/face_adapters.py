"""Face adapters in ComfyUI: their folders, what they see of photos, and a MODEL that has one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher

from ..checks import check_choice, check_number
from ..errors import SeFiError, quoted
from ..face2diffusion.crops import Choice
from ..face_adapter.files import (
    ASKED,
    AUTO,
    MOST_FACES,
    FaceAdapter,
    in_file_order,
    read_face_adapter,
)
from ..face_adapter.mixing import mixed, parse_weights
from ..families import label_of
from ..injection import Beside
from ..learning.photos import Photo
from ..regions import region_of
from .base_model import Block, cross_attention_layers, family_of
from .face_embedding import Described, describe
from .unet.adapter import add_beside

logger = logging.getLogger(__name__)

FOLDER = "face_adapters"
SHARED_FOLDER = "ipadapter"
"""Where other packs keep IP-Adapter's files."""
SUFFIXES = (".safetensors", ".bin")

MOST_STRENGTH = 5.0


@dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """A face adapter, and the name of its file."""

    adapter: FaceAdapter
    name: str


@dataclass(frozen=True)
class Wish:
    """What is asked of an adapter: the inputs of SeFi Apply Face Adapter, and their defaults."""

    strength: float = 1.0
    weights: str = ""
    start_percent: float = 0.0
    end_percent: float = 1.0
    text: bool = True
    lora_strength: float = 1.0
    detector: str = "auto"
    choice: Choice = Choice()

    def __post_init__(self) -> None:
        check_number("strength", self.strength, -MOST_STRENGTH, MOST_STRENGTH)
        for name in ("start_percent", "end_percent"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        if self.start_percent >= self.end_percent:
            raise SeFiError(
                f"the range is empty, start_percent {self.start_percent:g} to end_percent "
                f"{self.end_percent:g}: set end_percent above start_percent"
            )
        check_number("lora_strength", self.lora_strength, -MOST_STRENGTH, MOST_STRENGTH)
        if not isinstance(self.text, bool):
            raise SeFiError(f"text is {quoted(self.text)}: set it to true or false")


def register_model_folder() -> None:
    """Make ``{models}/face_adapters`` a model folder of ComfyUI, with ``{models}/ipadapter``.

    Called once when ComfyUI loads the pack; calling it again changes nothing. Folders that the
    user's extra_model_paths.yaml gives stay, in front of these.
    """
    for name in (FOLDER, SHARED_FOLDER):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, name))
    folder_paths.folder_names_and_paths[FOLDER][1].update(SUFFIXES)


def adapter_files() -> list[str]:
    """The files that may be face adapters, relative to their folders and sorted."""
    names = {name for folder in _folders() for name in folder_paths.get_filename_list(folder)}
    return sorted(name for name in names if name.endswith(SUFFIXES))


def find_file(file: str) -> Path:
    """The adapter's file; raises :class:`SeFiError` where no folder has it."""
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    if not file:
        raise SeFiError(
            f"there is no face adapter in {folder}: put a FaceID file of IP-Adapter there, or a "
            "face adapter of this pack, and press R to refresh the lists; nothing is downloaded "
            "for you"
        )
    for registered in _folders():
        try:
            # A workflow may come from another operating system.
            path = folder_paths.get_full_path(registered, file.replace("\\", "/"))
        except ValueError:  # another drive
            path = None
        if path is not None and path.endswith(SUFFIXES):
            return Path(path)
    raise SeFiError(
        f"the face adapter {quoted(file)} is not in {folder}: press R to refresh the lists and "
        "choose another, or put the file there; nothing is downloaded for you"
    )


def fingerprint(file: str) -> str:
    """Another text whenever the file has changed; raises as :func:`find_file` does."""
    path = find_file(file)
    return f"{path} {_stamp(path)}"


def load_face_adapter(file: str, variant: str = AUTO) -> OpenedAdapter:
    """The adapter in this file. The last one is kept open while its file is the same.

    Raises :class:`SeFiError` for a file that is missing, damaged or of another kind.
    """
    check_choice("variant", variant, ASKED)
    path = find_file(file)
    return _opened(path, _stamp(path), variant)


def apply_face_adapter(
    model: ModelPatcher,
    opened: OpenedAdapter,
    photos: Sequence[Photo],
    wish: Wish,
    clip_vision: ClipVisionModel | None = None,
    region: torch.Tensor | None = None,
) -> tuple[ModelPatcher, torch.Tensor]:
    """A clone of MODEL that draws who is in the photos, and the faces that were seen, an IMAGE.

    ``region`` is a MASK. Raises :class:`SeFiError` for an adapter of another model, photos without
    a face, weights that are not for them, and what the adapter needs and is not there.
    """
    adapter = opened.adapter
    mask = region_of(region)
    weights = parse_weights(wish.weights, len(photos))
    layers = _fitting(model, opened)
    if adapter.takes_several and not weights and len(photos) > MOST_FACES:
        raise SeFiError(
            f"there are {len(photos)} photos, and this adapter sees {MOST_FACES} side by side: "
            f"connect at most {MOST_FACES}, or give weights, by which they are averaged"
        )
    seen = describe(adapter, photos, wish.detector, wish.choice, clip_vision)
    if wish.strength == 0:
        return model.clone(), seen.pictures
    tokens = image_tokens(adapter, seen, weights)
    clone = _with_lora(model, opened, layers, wish.lora_strength)
    pairs = {
        block: (tokens @ one.to_k.T, tokens @ one.to_v.T)
        for block, one in zip(layers, adapter.layers, strict=True)
    }
    beside = Beside(
        pairs, wish.strength, wish.start_percent, wish.end_percent, mask, with_text=wish.text
    )
    return add_beside(clone, beside), seen.pictures


def image_tokens(
    adapter: FaceAdapter, seen: Described, weights: Sequence[float] = ()
) -> torch.Tensor:
    """Image tokens (2, T, width): of the photos, and of no face, for negative conditionings.

    Photos are averaged by their weights, or seen side by side by an adapter that takes several.
    """
    faces = seen.embeddings
    if weights or not adapter.takes_several:
        faces = mixed(faces, weights, adapter.embedder.unit)
    faces = torch.stack([faces, torch.zeros_like(faces)])
    states = None
    if seen.states is not None:
        assert seen.no_states is not None
        states = torch.cat([mixed(seen.states, weights), seen.no_states])
    return adapter.tokens(faces, states)


class _Place(NamedTuple):
    """A transformer block's module path in the model, and its cross-attention."""

    path: str
    attention: Any


def _fitting(model: ModelPatcher, opened: OpenedAdapter) -> dict[Block, _Place]:
    """The model's transformer blocks in the order of the file, if the adapter fits them."""
    adapter, family = opened.adapter, family_of(model)
    if adapter.family != family:
        raise SeFiError(
            f"{opened.name} is a face adapter for {label_of(adapter.family)} and model is "
            f"{label_of(family)}: load a face adapter for it, or another checkpoint"
        )
    attentions = cross_attention_layers(model.model.diffusion_model)
    paths = {module: path for path, module in model.model.named_modules()}
    found = {
        block: _Place(paths[attentions[block]].removesuffix(".attn2"), attentions[block])
        for block in in_file_order(list(attentions))
    }
    fits = len(found) == len(adapter.layers) and all(
        place.attention.to_k.weight.shape[0] == len(layer.to_k)
        for place, layer in zip(found.values(), adapter.layers, strict=True)
    )
    if not fits:
        raise SeFiError(
            f"{opened.name} has {len(adapter.layers)} layers of other sizes than the "
            f"{len(found)} of model, which is no ordinary {label_of(family)}: load a face adapter "
            "that was made for it"
        )
    return found


def _with_lora(
    model: ModelPatcher, opened: OpenedAdapter, layers: Mapping[Block, _Place], strength: float
) -> ModelPatcher:
    """A clone with the LoRA of the adapter's file, unless the model has it already."""
    clone = model.clone()
    lora = opened.adapter.lora
    if not lora or strength == 0:
        return clone
    places = list(layers.values())
    weights: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    shapes = {key: value.shape for key, value in clone.model.state_dict().items()}
    for (number, name), (down, up) in lora.items():
        layer = f"{places[number].path}.{name}"
        key = f"{layer}.0.weight" if name.endswith("to_out") else f"{layer}.weight"
        if shapes.get(key) != (up.shape[0], down.shape[1]):
            raise SeFiError(
                f"the LoRA inside {opened.name} is of other sizes than model at {key}: load a face "
                "adapter that was made for it"
            )
        if _has(clone, key, down, up):
            logger.info(
                "SeFi Apply Face Adapter: model has the LoRA of %s, which is not loaded again.",
                opened.name,
            )
            return clone
        keys[layer] = key
        weights |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    clone.add_patches(comfy.lora.load_lora(weights, keys), strength)
    return clone


def _has(model: ModelPatcher, key: str, down: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether a weight is patched with these two; another file may have them in half precision."""
    for patch in model.patches.get(key, ()):
        halves = getattr(patch[1], "weights", None)
        if not isinstance(halves, (tuple, list)) or len(halves) < 2:
            continue
        if all(
            torch.is_tensor(one)
            and one.shape == own.shape
            and torch.allclose(one.cpu().float(), own, rtol=1e-2, atol=1e-4)
            for one, own in zip(halves, (up, down), strict=False)
        ):
            return True
    return False


@lru_cache(maxsize=1)
def _opened(path: Path, stamp: object, variant: str) -> OpenedAdapter:
    with torch.inference_mode(False):
        return OpenedAdapter(read_face_adapter(path, variant), path.name)


def _folders() -> list[str]:
    names = folder_paths.folder_names_and_paths
    return [FOLDER, *([SHARED_FOLDER] if SHARED_FOLDER in names else [])]


def _stamp(path: Path) -> tuple[int, int, int]:
    """Inode, size in bytes and time of the last change in nanoseconds."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
