"""The kind of SeFi-IDE: token embeddings for K and for V, another pair for each stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...checks import check_choice, check_number
from ...dividing import DEFAULT_REGIONS, REGIONS
from ...identity.identity import Identity
from ...regions import region_of
from ...stage_strengths import checked_strengths, strengths_of_stages
from ..clip.embeddings import with_last_repeated
from ..clip.encoder import Role


@dataclass(frozen=True)
class AppliedIdentity:
    """An identity and how much of it to use; see :class:`clip.encoder.Applied`.

    Strengths move the token embeddings on the line from the class word's (0) to the identity's
    (1); values outside weaken or exaggerate. Percents are of the sampling, 0 its start.
    ``stage_strengths`` are factors on both strengths, the noisiest stage's first; see
    :mod:`sefi_core.stage_strengths`. An identity of one stage gets a stage for each of them.
    ``region`` is a MASK of the whole picture, outside which the class word is drawn, None for none.
    ``regions`` is "off" or "automatic": those of a prompt who have that and no ``region`` share the
    picture among them, where there are at least two.

    The mean over the stages, which is what the CLIP gives as an ordinary textual inversion, is that
    of what the stages have at their own strengths.
    """

    identity: Identity
    strength_k: float = 1.0
    strength_v: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    stage_strengths: tuple[float, ...] = ()
    region: torch.Tensor | None = None
    regions: str = DEFAULT_REGIONS

    def __post_init__(self) -> None:
        for name in ("strength_k", "strength_v"):
            check_number(name, getattr(self, name), -100.0, 100.0)
        for name in ("start_percent", "end_percent"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_choice("regions", self.regions, REGIONS)
        object.__setattr__(self, "region", region_of(self.region))
        strengths_of_stages(checked_strengths(self.stage_strengths), self.stages)

    @property
    def stages(self) -> int:
        """Number of stages, S."""
        of_identity = self.identity.stages
        return max(1, len(self.stage_strengths)) if of_identity == 1 else of_identity

    def strength(self, role: Role, stage: int | None) -> float:
        """How much of the identity goes into keys or values, in a stage or in the mean of all."""
        strengths = self._strengths(role)
        if stage is not None:
            return strengths[stage]
        if len(set(strengths)) == 1:
            return strengths[0]
        return math.fsum(strengths) / len(strengths)

    @property
    def automatic(self) -> bool:
        """Whether, without a region, it shares the picture with others of that kind."""
        return self.regions == "automatic"

    def acts(self) -> bool:
        """Whether a strength is not 0."""
        return any(self._strengths("key")) or any(self._strengths("value"))

    def rows(
        self, encoder: str, role: Role, stage: int | None, class_word: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """The vectors (vectors, width) of a stage, or of all stages in the mean, at the strength.

        See :meth:`clip.encoder.Applied.rows`.
        """
        vectors = self.identity.key_vectors if role == "key" else self.identity.value_vectors
        if encoder not in vectors:
            return None
        of_stages, strengths = vectors[encoder], self._strengths(role)
        if stage is not None:
            # One stage serves as many as there are strengths.
            rows = of_stages[min(stage, len(of_stages) - 1)]
            return _moved(rows, strengths[stage], class_word)
        if len(set(strengths)) == 1:
            return _moved(of_stages.mean(0), strengths[0], class_word)
        word = class_word()
        factors = torch.tensor(strengths)[:, None, None]
        rows = torch.stack([with_last_repeated(rows, len(word)) for rows in of_stages])
        return torch.lerp(word, rows, factors).mean(0)

    def _strengths(self, role: Role) -> tuple[float, ...]:
        """Of every stage, the least noisy first."""
        strength = self.strength_k if role == "key" else self.strength_v
        factors = strengths_of_stages(self.stage_strengths, self.stages)
        return tuple(strength * factor for factor in factors)


def _moved(
    rows: torch.Tensor, strength: float, class_word: Callable[[], torch.Tensor]
) -> torch.Tensor | None:
    """Rows on the line from the class word's to these, None for the class word itself."""
    if strength == 0:
        return None
    if strength == 1:
        return rows
    word = class_word()
    return torch.lerp(word, with_last_repeated(rows, len(word)), strength)
