"""Everything that can be set about the training of a face encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ...checks import check_choice, check_number, check_whole
from ...errors import SeFiError, quoted
from ...learning.settings import DTYPES
from ...text.placeholders import check_class_word, expand_template
from ..files import CROPS
from ..networks import EncoderShape

PUBLISHED = Path(__file__).with_name("face2diffusion.json")
"""What is published of Face2Diffusion's training; the rest are the defaults."""

_WHOLE = {
    "seed": (0, 2**31 - 1),
    "encoder_steps": (1, 10_000_000),
    "encoder_batch": (2, 65_536),
    "mapping_steps": (1, 10_000_000),
    "mapping_batch": (1, 65_536),
    "vectors": (1, 16),
    "stages": (1, 20),
    "resolution": (0, 4096),
    "validate_every": (1, 10_000_000),
    "validation_people": (0, 100_000),
}
_NUMBERS = {
    "encoder_learning_rate": (1e-9, 10.0),
    "encoder_weight_decay": (0.0, 1.0),
    "margin": (0.0, 1.5),
    "scale": (1.0, 1024.0),
    "mapping_learning_rate": (1e-9, 10.0),
    "mapping_weight_decay": (0.0, 1.0),
    "background_weight": (0.0, 1e3),
    "expression_dropout": (0.0, 1.0),
    "dropout": (0.0, 0.9),
    "flip": (0.0, 1.0),
}
_BOOLS = ("keys_apart", "position_free", "masked", "class_guided", "captions", "another_photo")


@dataclass(frozen=True)
class EncoderTraining:
    """All settings. Building impossible ones raises :class:`SeFiError`."""

    seed: int = 0
    shape: EncoderShape = field(default_factory=EncoderShape)
    crop: str = "aligned"
    """What the encoder looks at: one of :data:`files.CROPS`."""
    class_word: str = "person"

    encoder_steps: int = 30_000
    encoder_batch: int = 128
    encoder_learning_rate: float = 0.01
    encoder_weight_decay: float = 5e-4
    margin: float = 0.5
    """Of ArcFace, in radians."""
    scale: float = 64.0
    """Of ArcFace's cosines."""
    flip: float = 0.5
    """How often a face is mirrored."""

    mapping_steps: int = 100_000
    mapping_batch: int = 8
    mapping_learning_rate: float = 1e-5
    mapping_weight_decay: float = 0.01
    vectors: int = 2
    """Token embeddings of a placeholder."""
    stages: int = 1
    """Parts of the denoising with embeddings of their own; 1 in the paper."""
    keys_apart: bool = False
    """Whether K and V have embeddings of their own, as in SeFi-IDE."""
    position_free: bool = True
    """Whether they take the place of token and position embedding together, as in the paper."""
    dtype: str = "auto"
    """One of :data:`DTYPES`: what the encoder computes in while it is trained, and the Stable
    Diffusion while a mapping is; "auto" is fp32 for the encoder, and as ComfyUI does."""
    resolution: int = 0
    """Side of the square training pictures, in pixels; 0 is the model family's own."""
    template: str = "a photo of <name>"
    masked: bool = True
    """Whether the noise loss looks at the face only, or at all of the picture."""
    background_weight: float = 0.0
    """Of the noise loss outside the face, where it is ``masked``."""
    class_guided: bool = False
    """Class-guided denoising regularisation: outside the face the model shall go on drawing what
    it draws for the class word (section 3.4). Then the background counts 1, or its weight."""
    captions: bool = True
    """Whether what the data says of a photo is put into its prompt."""
    expression_dropout: float = 0.2
    """How often an expression that the data has is left out (section 3.3)."""
    dropout: float = 0.1
    another_photo: bool = False
    """Whether features come from another photo of the person than the one to be drawn."""

    validate_every: int = 1000
    validation_people: int = 16
    """People that are kept out of the training; at most a fifth of all."""
    validation_prompt: str = "a photo of <name> at the beach"

    def __post_init__(self) -> None:
        if isinstance(self.shape, Mapping):
            try:
                object.__setattr__(self, "shape", EncoderShape(**self.shape))
            except (TypeError, ValueError) as error:
                raise SeFiError(f"shape is no shape of an encoder ({error}): mend it") from error
        if not isinstance(self.shape, EncoderShape):
            raise SeFiError(
                f"shape is {quoted(self.shape)}: write a JSON object, for example "
                '{"kind": "cnn", "widths": [24, 48, 72, 96]}'
            )
        for name, (least, most) in _WHOLE.items():
            check_whole(name, getattr(self, name), least, most)
        for name, (least, most) in _NUMBERS.items():
            check_number(name, getattr(self, name), least, most)
        check_choice("crop", self.crop, CROPS)
        check_choice("dtype", self.dtype, DTYPES)
        check_bools(self, _BOOLS)
        check_texts(self.template, self.class_word, self.validation_prompt)

    @property
    def needs_masks(self) -> bool:
        """Whether the mapping's loss tells the face from the rest of the picture."""
        return self.masked or self.class_guided

    def as_json(self) -> dict[str, Any]:
        """For the file of the encoder, and for a settings file."""
        return asdict(self)


def check_bools(settings: object, names: Sequence[str]) -> None:
    """Raises :class:`SeFiError` unless these settings are true or false."""
    for name in names:
        if not isinstance(getattr(settings, name), bool):
            raise SeFiError(f"{name} is {getattr(settings, name)!r}: set it to true or false")


def check_texts(template: object, class_word: object, validation_prompt: object) -> None:
    """Raises :class:`SeFiError` for prompts that are none, and for a class word that is none."""
    for name, text in (("template", template), ("validation_prompt", validation_prompt)):
        if not isinstance(text, str):
            raise SeFiError(f"{name} is {quoted(text)}: write a text")
    expand_template(str(template), "name")
    check_class_word(class_word)  # pyright: ignore[reportArgumentType]


def read_settings(path: Path | None, changes: Mapping[str, Any]) -> EncoderTraining:
    """The settings of a JSON file with ``changes``; see :func:`settings_of`."""
    return settings_of(EncoderTraining, path, changes)


S = TypeVar("S")


def settings_of(kind: type[S], path: Path | None, changes: Mapping[str, Any]) -> S:
    """Settings of a dataclass ``kind`` from a JSON file, where there is one, with ``changes``.

    Raises :class:`SeFiError` for a file that cannot be read, and for settings that do not exist.
    """
    given: dict[str, Any] = {}
    if path is not None:
        try:
            given = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise SeFiError(
                f"the settings file {path} cannot be read ({error}): mend it"
            ) from error
        if not isinstance(given, dict):
            raise SeFiError(f"the settings file {path} is no JSON object: write one")
    given = {**given, **changes}
    known = {one.name for one in fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(given) - known):
        raise SeFiError(
            f"there is no setting {', '.join(unknown)}: choose from {', '.join(sorted(known))}"
        )
    return kind(**given)


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Settings from a command line, ``NAME=VALUE`` each; what is no JSON is a text."""
    found: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
