"""Everything a user can set about a training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import SeFiError, quoted
from ..identity.identity import MAX_VECTORS
from ..stages import TRAINING_TIMESTEPS
from ..text.captions import AUTO
from .parametrisation import PARAMETRISATIONS

DTYPES = ("auto", "fp32", "fp16", "bf16")

DEFAULT_TEMPLATES = (
    "a photo of <name>",
    "a picture of <name>",
    "a portrait of <name>",
    "a photo of the face of <name>",
)


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
    resolution: int = 512
    """Side of the square training pictures, in pixels."""
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    captions: tuple[str, ...] = (AUTO,)
    """What the photos show beside the identity: one for each photo, or one for all."""
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    preview_every: int = 50
    """Steps between preview pictures; 0 for none."""

    def __post_init__(self) -> None:
        least = {"preview_every": 0, "resolution": 64}
        least |= dict.fromkeys(("steps", "stages", "vectors", "batch_size"), 1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SeFiError(f"{name} is {getattr(self, name)}: set it to {bound} or more")
        for name, bound in {"stages": TRAINING_TIMESTEPS, "vectors": MAX_VECTORS}.items():
            if getattr(self, name) > bound:
                raise SeFiError(f"{name} is {getattr(self, name)}: set it to {bound} or less")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SeFiError(f"learning_rate is {self.learning_rate}: set it above 0, such as 0.005")
        for name in ("attention_weight", "leak_weight", "background_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SeFiError(f"{name} is {getattr(self, name)}: set it to 0 or more")
        choices = {"dtype": DTYPES, "parametrisation": PARAMETRISATIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SeFiError(
                    f"{name} is {quoted(getattr(self, name))}: choose one of {', '.join(allowed)}"
                )
        if not self.templates:
            raise SeFiError('templates is empty: write at least one line, "a photo of <name>"')

    def as_json(self) -> dict[str, object]:
        """The settings for an identity's file."""
        return {
            **asdict(self),
            "templates": list(self.templates),
            "captions": list(self.captions),
        }
