"""The kind of SeFi-IDE: token embeddings for K and for V, another pair for each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...checks import check_number
from ...identity.identity import Identity
from ..clip.embeddings import with_last_repeated
from ..clip.encoder import Role


@dataclass(frozen=True)
class AppliedIdentity:
    """An identity and how much of it to use; see :class:`clip.encoder.Applied`.

    Strengths move the token embeddings on the line from the class word's (0) to the identity's
    (1); values outside weaken or exaggerate. Percents are of the sampling, 0 its start.
    """

    identity: Identity
    strength_k: float = 1.0
    strength_v: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        for name in ("strength_k", "strength_v"):
            check_number(name, getattr(self, name), -100.0, 100.0)
        for name in ("start_percent", "end_percent"):
            check_number(name, getattr(self, name), 0.0, 1.0)

    @property
    def stages(self) -> int:
        """Number of stages, S."""
        return self.identity.stages

    def strength(self, role: Role) -> float:
        """How much of the identity goes into keys or values."""
        return self.strength_k if role == "key" else self.strength_v

    def acts(self) -> bool:
        """Whether a strength is not 0."""
        return self.strength_k != 0 or self.strength_v != 0

    def rows(
        self, encoder: str, role: Role, stage: int | None, class_word: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """The vectors (vectors, width) of a stage, or of all stages in the mean, at the strength.

        See :meth:`clip.encoder.Applied.rows`.
        """
        strength = self.strength(role)
        vectors = self.identity.key_vectors if role == "key" else self.identity.value_vectors
        if strength == 0 or encoder not in vectors:
            return None
        rows = vectors[encoder].mean(0) if stage is None else vectors[encoder][stage]
        if strength == 1:
            return rows
        word = class_word()
        return torch.lerp(word, with_last_repeated(rows, len(word)), strength)
