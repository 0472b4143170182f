"""The learned identity: two token embeddings per stage and text encoder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..errors import SeFiError, quoted
from ..families import label_of
from ..text.placeholders import check_class_word, check_name, placeholder_of
from .thumbnail import picture_in

MAX_VECTORS = 75
"""A prompt chunk of CLIP has room for 75 tokens, and the placeholder must fit into one."""

KINDS = ("tokens", "position-free")
"""Kinds of identity: token embeddings, and vectors that stand for token and position together."""

MAX_STAGES = 100
MAX_ENCODERS = 4
MAX_WIDTH = 8192
"""Several times what any training or text encoder has; a file may say anything."""

MAX_NESTING = 20
"""How deep the lists and dicts of the training settings may nest."""

_TOKEN = re.compile(r"\w+")


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
    """Base model family, an id of :data:`families.FAMILIES`."""
    key_vectors: dict[str, torch.Tensor]
    """Text encoder name ("l", "g") -> (stages, vectors, width): token embeddings for K prompts."""
    value_vectors: dict[str, torch.Tensor]
    """The same for V prompts."""
    training: dict[str, object] = field(default_factory=dict)
    """JSON-able settings that it was trained with."""
    thumbnail: bytes | None = None
    """A small JPEG or PNG file, as :func:`.thumbnail.thumbnail_of` makes it."""

    position_free: bool = False
    """Whether the vectors stand for the sum of a token embedding and its position's, as
    Face2Diffusion's do: the text encoder then adds no position to them."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "name", check_name(self.name))
        set_field(self, "class_word", check_class_word(self.class_word))
        if not isinstance(self.family, str) or not _TOKEN.fullmatch(self.family):
            raise SeFiError(f"{quoted(self.family)} is no base model family: give one such as sd1")
        set_field(self, "key_vectors", _private_embeddings("keys", self.key_vectors))
        values = _private_embeddings("values", self.value_vectors)
        set_field(self, "value_vectors", values)
        if not _shapes(self.key_vectors) == _shapes(self.value_vectors):
            raise SeFiError(
                f"the identity {self.name} is inconsistent: its keys have the shapes "
                f"{_shapes(self.key_vectors)} and its values {_shapes(self.value_vectors)}; train "
                "it again"
            )
        if len({tensor.shape[:2] for tensor in self.key_vectors.values()}) != 1:
            raise SeFiError(
                f"the identity {self.name} is inconsistent: its text encoders have different "
                f"stages or vectors, {_shapes(self.key_vectors)}; train it again"
            )
        try:
            training = json.loads(json.dumps(dict(self.training), allow_nan=False))
            if _nests_deeper(training, MAX_NESTING):
                raise ValueError(f"more than {MAX_NESTING} lists within each other")
        except (TypeError, ValueError, RecursionError) as error:
            raise SeFiError(
                f"the training settings of the identity {self.name} cannot be stored as JSON "
                f"({error}); use plain finite numbers, texts and lists"
            ) from error
        set_field(self, "training", training)
        if self.thumbnail is not None:
            picture_in(self.thumbnail)

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`: how its placeholder's places are filled."""
        return KINDS[self.position_free]

    @property
    def placeholder(self) -> str:
        """``"<name>"``."""
        return placeholder_of(self.name)

    @property
    def stages(self) -> int:
        """Number of stages, S."""
        return next(iter(self.key_vectors.values())).shape[0]

    @property
    def vectors(self) -> int:
        """Token embeddings per stage, the same for K and V."""
        return next(iter(self.key_vectors.values())).shape[1]

    @property
    def widths(self) -> dict[str, int]:
        """Text encoder name -> width of its token embeddings."""
        return {encoder: tensor.shape[2] for encoder, tensor in self.key_vectors.items()}

    @property
    def predicted(self) -> bool:
        """Whether a face encoder has made it, and no training after that."""
        return "encoder" in self.training and "steps_done" not in self.training

    def renamed(self, name: str) -> Identity:
        """The same identity under another name, and so another placeholder."""
        return replace(self, name=name)

    def same_content(self, other: Identity) -> bool:
        """Whether the two agree in everything that a file holds."""
        return (
            all(
                getattr(self, name) == getattr(other, name)
                for name in ("name", "class_word", "family", "training", "thumbnail", "kind")
            )
            and _equal(self.key_vectors, other.key_vectors)
            and _equal(self.value_vectors, other.value_vectors)
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


def _private_embeddings(
    role: str, embeddings: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Checked float32 CPU copies, sorted by encoder, that no inference mode clings to."""
    if not isinstance(embeddings, Mapping) or not embeddings:
        raise SeFiError(f"the identity has no {role}: train it again")
    if len(embeddings) > MAX_ENCODERS:
        raise SeFiError(
            f"the {role} are of {len(embeddings)} text encoders where at most {MAX_ENCODERS} are "
            "possible; train the identity again"
        )
    copies = {}
    for encoder, tensor in sorted(embeddings.items()):
        if not _TOKEN.fullmatch(encoder):
            raise SeFiError(f"the identity has an ill-named text encoder, {quoted(encoder)}")
        if not tensor.is_floating_point() or tensor.ndim != 3 or 0 in tensor.shape:
            raise SeFiError(
                f"the {role} of text encoder {encoder} have shape {tuple(tensor.shape)} and type "
                f"{tensor.dtype} where (stages, vectors, width) of floats is needed; train the "
                "identity again"
            )
        stages, vectors, width = tensor.shape
        if stages > MAX_STAGES or vectors > MAX_VECTORS or width > MAX_WIDTH:
            raise SeFiError(
                f"the {role} have {stages} stages and {vectors} vectors per token of width {width} "
                f"where at most {MAX_STAGES}, {MAX_VECTORS} and {MAX_WIDTH} are possible; train "
                "the identity again"
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


def _nests_deeper(value: object, levels: int) -> bool:
    """Whether dicts and lists nest deeper than ``levels``."""
    if not isinstance(value, (dict, list)):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_nests_deeper(child, levels - 1) for child in children)


def _shapes(embeddings: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {encoder: tuple(tensor.shape) for encoder, tensor in embeddings.items()}


def _describe(family: str, widths: Mapping[str, int]) -> str:
    encoders = ", ".join(f"{encoder} {width}" for encoder, width in sorted(widths.items()))
    return f"{label_of(family)} (token embeddings: {encoders})"


def _equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether two dicts of tensors agree in keys, shapes and every value."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[key]) for key, tensor in first.items()
    )
