"""Everything that can be set about the training of a face adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...checks import check_choice, check_number, check_whole
from ...face2diffusion.training.settings import check_bools, check_texts
from ...learning.settings import DTYPES
from ..files import FACEID, INFINITE_ID, PLUS, PLUS_V2

PUBLISHED = Path(__file__).with_name("infinite_id.json")
"""What is published of Infinite-ID's training; the rest are the defaults."""

TRAINED = (FACEID, PLUS, PLUS_V2, INFINITE_ID)
"""The variants that can be trained."""

_WHOLE = {
    "seed": (0, 2**31 - 1),
    "tokens": (1, 64),
    "depth": (1, 64),
    "steps": (1, 10_000_000),
    "batch": (1, 65_536),
    "resolution": (0, 4096),
    "validate_every": (1, 10_000_000),
    "validation_people": (0, 100_000),
}
_NUMBERS = {
    "learning_rate": (1e-9, 10.0),
    "weight_decay": (0.0, 1.0),
    "drop": (0.0, 1.0),
}


@dataclass(frozen=True)
class AdapterTraining:
    """All settings. Building impossible ones raises :class:`SeFiError`."""

    seed: int = 0
    variant: str = FACEID
    """One of :data:`TRAINED`; the others look at pictures, with a CLIP."""
    tokens: int = 4
    """Image tokens of a face; Infinite-ID has four times as many for the picture besides."""
    depth: int = 4
    """Layers of what looks at a CLIP's states."""
    text: bool = True
    """Whether the prompt's attention is there while it is trained; off in the paper."""
    drop: float = 0.05
    """How often the face is left out, so that it can be guided by."""

    steps: int = 100_000
    batch: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.01

    class_word: str = "person"
    template: str = "a photo of <name>"
    captions: bool = True
    """Whether what the data says of a photo is put into its prompt."""
    dtype: str = "auto"
    """What the Stable Diffusion computes in: one of :data:`DTYPES`."""
    resolution: int = 0
    """Side of the square training pictures, in pixels; 0 is the model family's own."""

    validate_every: int = 1000
    validation_people: int = 16
    """People that are kept out of the training; at most a fifth of all."""
    validation_prompt: str = "a photo of a person at the beach"

    def __post_init__(self) -> None:
        for name, (least, most) in _WHOLE.items():
            check_whole(name, getattr(self, name), least, most)
        for name, (least, most) in _NUMBERS.items():
            check_number(name, getattr(self, name), least, most)
        check_choice("variant", self.variant, TRAINED)
        check_choice("dtype", self.dtype, DTYPES)
        check_bools(self, ("text", "captions"))
        check_texts(self.template, self.class_word, self.validation_prompt)

    @property
    def looks_at_pictures(self) -> bool:
        """Whether the variant needs a CLIP vision model."""
        return self.variant != FACEID

    def as_json(self) -> dict[str, Any]:
        """For the file of the adapter, and for a settings file."""
        return asdict(self)
