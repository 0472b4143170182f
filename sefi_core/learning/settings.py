"""Everything a user can set about a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from ..checks import check_choice, check_number, check_whole
from ..errors import SeFiError
from ..identity.identity import MAX_VECTORS, Identity
from ..stages import TRAINING_TIMESTEPS
from ..text.captions import AUTO
from .parametrisation import PARAMETRISATIONS

BACKGROUND_TARGETS = ("photo", "class word")
"""What the picture outside the mask should be: the photo, or what the model itself would draw."""

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = ("auto", *TORCH_DTYPES)

CHECKPOINTING = ("auto", "on", "off")
"""Whether the U-Net is computed once more in the backward pass, to save memory."""

DEFAULT_TEMPLATES = (
    "a photo of <name>",
    "a picture of <name>",
    "a portrait of <name>",
    "a photo of the face of <name>",
)


_WHOLE = {
    "steps": (1, 1_000_000),
    "seed": (0, 2**64 - 1),
    "stages": (1, TRAINING_TIMESTEPS),
    "vectors": (1, MAX_VECTORS),
    "batch_size": (1, 1024),
    "resolution": (0, 16384),
    "preview_every": (0, 1_000_000),
    "predicted_steps": (1, 1_000_000),
}
_NUMBERS = {
    "learning_rate": (1e-9, 1e3),
    "attention_weight": (0.0, 1e6),
    "leak_weight": (0.0, 1e6),
    "background_weight": (0.0, 1e6),
    "predicted_learning_rate": (1e-9, 1e3),
}


@dataclass(frozen=True)
class TrainingSettings:
    """Everything a user can set about a training. Building impossible ones raises SeFiError."""

    steps: int = 100
    seed: int = 0
    stages: int = 5
    """Parts of the denoising with vectors of their own, 5 in the paper."""
    vectors: int = 1
    """Token embeddings for K and for V in each stage. A class word of more tokens has one for
    each of them, whatever is set here."""
    parametrisation: str = "offsets"
    learning_rate: float = 5e-3
    """Of AdamW, in the units of :data:`parametrisation.Units`."""
    batch_size: int = 1
    attention_weight: float = 0.003
    """The paper's lambda, at its own value."""
    leak_weight: float = 3.0
    """Of the placeholder's share of attention outside the face mask; nothing without a mask."""
    background_weight: float = 0.0
    """Of the noise loss outside the face mask; nothing without a mask."""
    background_target: str = "photo"
    """One of :data:`BACKGROUND_TARGETS`. "class word" is class-guided denoising regularisation
    (Face2Diffusion, arXiv 2403.05094), with a weight of 1 where ``background_weight`` is 0."""
    resolution: int = 0
    """Side of the square training pictures, in pixels; 0 is the model family's own."""
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    captions: tuple[str, ...] = (AUTO,)
    """What the photos show beside the identity: one for each photo, or one for all."""
    dtype: str = "auto"
    gradient_checkpointing: str = "auto"
    """One of :data:`CHECKPOINTING`; True and False, as it was once, are "on" and "off"."""
    preview_every: int = 25
    """Steps between preview pictures, some of which are left out where they cost too much; 0 for
    none."""

    predicted_steps: int = 25
    """In place of ``steps`` for an identity that a face encoder has predicted."""
    predicted_learning_rate: float = 5e-3
    """In place of ``learning_rate`` for such an identity."""

    def __post_init__(self) -> None:
        for name, (least, most) in _WHOLE.items():
            check_whole(name, getattr(self, name), least, most)
        for name, (least, most) in _NUMBERS.items():
            check_number(name, getattr(self, name), least, most)
        if isinstance(self.gradient_checkpointing, bool):
            as_ever = "on" if self.gradient_checkpointing else "off"
            object.__setattr__(self, "gradient_checkpointing", as_ever)
        check_choice("background_target", self.background_target, BACKGROUND_TARGETS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("gradient_checkpointing", self.gradient_checkpointing, CHECKPOINTING)
        if 0 < self.resolution < 64:
            raise SeFiError(
                f"resolution is {self.resolution}: set it to 64 pixels or more, or to 0 for the "
                "model's own"
            )
        check_choice("parametrisation", self.parametrisation, PARAMETRISATIONS)
        if not self.templates:
            raise SeFiError('templates is empty: write at least one line, "a photo of <name>"')

    def going_on_from(self, start: Identity | None) -> TrainingSettings:
        """The settings for a training that begins at an identity: fewer steps for one that
        was predicted, which is nearly there."""
        if start is None or not start.predicted:
            return self
        return replace(self, steps=self.predicted_steps, learning_rate=self.predicted_learning_rate)

    def with_captions(self, captions: tuple[str, ...]) -> TrainingSettings:
        """The same for photos of which something else is known."""
        return replace(self, captions=captions)

    def as_json(self) -> dict[str, object]:
        """The settings for an identity's file."""
        return {
            **asdict(self),
            "templates": list(self.templates),
            "captions": list(self.captions),
        }
