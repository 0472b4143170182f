"""Who is in a photo, as a face adapter wants it: an embedding, and a CLIP's view of the face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import numpy as np
import torch
from comfy.clip_vision import ClipVisionModel

from ..errors import SeFiError
from ..face2diffusion.crops import Choice, aligned_face, as_input, face_in, seen_in
from ..face2diffusion.files import FaceEncoder as MSIDFile
from ..face2diffusion.networks import SIDE
from ..face_adapter.files import INFINITE_ID, Embedder, FaceAdapter
from ..faces.face import Detector
from ..faces.recognition import INSIGHT, KINDS, FaceEncoder, find_model
from ..images import pixels_of
from ..learning.photos import Photo
from .face_encoders import FOLDER as ENCODERS
from .face_encoders import load_face_encoder, open_encoder
from .faces import model_folders, open_detector, progress_of
from .likeness import FOLDER as RECOGNISERS

CLIP_SIDE = 224
"""Height and width in pixels of the aligned face that a CLIP sees."""

Looks = Callable[[Photo, str], tuple[torch.Tensor, torch.Tensor]]
"""A photo and its name in errors to an embedding (F,) and what was seen, (112, 112, 3)."""


class Described(NamedTuple):
    """``embeddings`` (N, F) and what was seen, ``pictures`` (N, s, s, 3), of N photos.

    ``states`` (N, n, C) are a CLIP's of the faces, ``no_states`` (1, n, C) those of no picture.
    """

    embeddings: torch.Tensor
    pictures: torch.Tensor
    states: torch.Tensor | None = None
    no_states: torch.Tensor | None = None


def describe(
    adapter: FaceAdapter,
    photos: Sequence[Photo],
    detector: str,
    choice: Choice,
    clip_vision: ClipVisionModel | None = None,
) -> Described:
    """What the adapter is told of photos, with a progress bar and cancelling.

    Raises :class:`SeFiError` for a photo without the face that is meant, a recogniser that is not
    there, and for no CLIP, or the wrong one, where the adapter looks at pictures.
    """
    finder = open_detector(detector, "head")
    look = embedding_with(adapter.embedder, finder, choice)
    if adapter.looks_at_pictures and clip_vision is None:
        raise SeFiError(
            f"clip_vision is empty and this adapter ({adapter.variant}) looks at pictures: connect "
            "Load CLIP Vision with CLIP ViT-H"
        )
    on_photo = progress_of(len(photos))
    embeddings, pictures, faces = [], [], []
    for number, photo in enumerate(photos, 1):
        name = f"photo {number}"
        embedding, picture = look(photo, name)
        embeddings.append(embedding)
        if adapter.looks_at_pictures:
            face = face_in(photo, finder, choice, name)
            picture = aligned_face(photo.picture, face, CLIP_SIDE)
            faces.append(picture)
        pictures.append(picture)
        on_photo(number)
    found = Described(torch.stack(embeddings), torch.stack(pictures))
    if clip_vision is None or not faces:
        return found
    states = clip_states(clip_vision, adapter.variant, torch.stack(faces))
    wanted = _states_of(adapter)
    if states.shape[-1] != wanted:
        raise SeFiError(
            f"clip_vision gives {states.shape[-1]} numbers and this adapter takes {wanted}: load "
            "the CLIP vision model that it was trained with, mostly CLIP ViT-H"
        )
    return found._replace(states=states[1:], no_states=states[:1])


@torch.inference_mode()
def clip_states(clip_vision: ClipVisionModel, variant: str, faces: torch.Tensor) -> torch.Tensor:
    """A CLIP's states (1 + N, n, C) of no picture, which is of its mean colour, and of N faces.

    ``faces`` (N, side, side, 3) are aligned. Infinite-ID looks at the last states, FaceID plus at
    those of the layer before.
    """
    mean = torch.tensor(clip_vision.image_mean).expand(1, *faces.shape[1:3], 3)
    output = clip_vision.encode_image(torch.cat([mean, faces]))
    name = "last_hidden_state" if variant == INFINITE_ID else "penultimate_hidden_states"
    return output[name].float().cpu()


def embedding_with(embedder: Embedder, detector: Detector, choice: Choice) -> Looks:
    """How an adapter's face recogniser sees photos.

    Raises :class:`SeFiError` if it is not there.
    """
    if embedder.kind == "sefi":
        return seen_by_encoder(_face_encoder(embedder), embedder.unit, detector, choice)
    return seen_by_recogniser(_recogniser(embedder), embedder, detector, choice)


def seen_by_encoder(encoder: MSIDFile, unit: bool, detector: Detector, choice: Choice) -> Looks:
    """How the first network of a face encoder of this pack sees photos."""

    def look(photo: Photo, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        picture = seen_in(photo, encoder.crop, detector, choice, name).picture
        with torch.inference_mode():
            features = encoder.encoder(as_input(picture[None]))[0].float()
        return (features / features.norm() if unit else features), picture

    return look


def seen_by_recogniser(
    recogniser: FaceEncoder, embedder: Embedder, detector: Detector, choice: Choice
) -> Looks:
    """How an ONNX model sees the aligned faces of photos."""

    def look(photo: Photo, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        picture = aligned_face(photo.picture, face_in(photo, detector, choice, name), SIDE)
        pixels = pixels_of(picture).numpy()
        found = recogniser.embed(pixels) if embedder.unit else recogniser.features(pixels)
        if len(found) != embedder.width:
            raise SeFiError(
                f"{recogniser.path} gives {len(found)} numbers and this adapter takes "
                f"{embedder.width}: put the model there that the adapter was trained with"
            )
        return torch.from_numpy(found).float(), picture

    return look


def open_embedder(path: Path) -> tuple[Embedder, Callable[[Detector, Choice], Looks]]:
    """What an adapter is to be trained with: an ONNX recogniser, or a face encoder of this pack.

    The second makes of a detector how photos are seen. Raises :class:`SeFiError` for other files.
    """
    if path.suffix == ".safetensors":
        opened = open_encoder([path])
        (name, sha), encoder = opened.files[0], opened.encoder
        embedder = Embedder("sefi", name, encoder.shape.features, False, sha)
        return embedder, partial(seen_by_encoder, encoder, False)
    kind = next((kind for kind in KINDS.values() if path.name in kind.files), None)
    if kind is None or not path.is_file():
        known = ", ".join(name for kind in KINDS.values() for name in kind.files)
        raise SeFiError(
            f"{path} is no face recogniser that is known by its name: give the path of one of "
            f"{known}, or of a face encoder of this pack (.safetensors)"
        )
    recogniser = FaceEncoder(kind, path, not comfy.model_management.cpu_mode())
    width = len(recogniser.embed(np.full((SIDE, SIDE, 3), 90, np.uint8)))
    embedder = Embedder(kind.id, path.name, width, True)
    return embedder, partial(seen_by_recogniser, recogniser, embedder)


def _face_encoder(embedder: Embedder) -> MSIDFile:
    try:
        opened = load_face_encoder(embedder.file)
    except SeFiError as error:
        raise SeFiError(
            f"this adapter sees faces with the encoder {embedder.file}, which cannot be opened "
            f"({error})"
        ) from error
    if embedder.sha256 and opened.files[0][1] != embedder.sha256:
        raise SeFiError(
            f"{embedder.file} in models/{ENCODERS} is another file than the one that this adapter "
            "was trained with: put that one there, under this name"
        )
    if opened.encoder.shape.features != embedder.width:
        raise SeFiError(
            f"{embedder.file} gives {opened.encoder.shape.features} numbers and this adapter takes "
            f"{embedder.width}: put the encoder there that the adapter was trained with"
        )
    return opened.encoder


def _recogniser(embedder: Embedder) -> FaceEncoder:
    path = _found(embedder)
    if path is None:
        folder = (
            model_folders()[0] / "models" / "buffalo_l"
            if embedder.kind == INSIGHT.id
            else model_folders(RECOGNISERS)[0]
        )
        raise SeFiError(
            f"this adapter sees faces with {embedder.file}, which was not found: put it into "
            f"{folder}; nothing is downloaded for you"
        )
    use_gpu = not comfy.model_management.cpu_mode()
    return _opened(embedder.kind, path, path.stat().st_mtime_ns, use_gpu)


def _found(embedder: Embedder) -> Path | None:
    """The recogniser's file; insightface's say different things, so it is this very one."""
    kind = KINDS[embedder.kind]
    if kind is INSIGHT:
        return find_model(replace(kind, files=(embedder.file,)), model_folders())
    return find_model(kind, model_folders(RECOGNISERS))


def _states_of(adapter: FaceAdapter) -> int:
    """The width of the CLIP states that a projection takes."""
    names = ("perceiver_resampler.proj_in.weight", "clip.proj_in.weight")
    state = adapter.projection.state_dict()
    return next(state[name].shape[1] for name in names if name in state)


@lru_cache(maxsize=1)
def _opened(kind: str, path: Path, changed: int, use_gpu: bool) -> FaceEncoder:
    return FaceEncoder(KINDS[kind], path, use_gpu)
