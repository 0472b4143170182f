"""A new identity on the line between two of one family, for keys and for values apart."""

from __future__ import annotations

from math import lcm

import torch

from ..checks import check_number
from ..digest import digest
from ..errors import SeFiError
from .identity import MAX_STAGES, Identity
from .thumbnail import side_by_side

MIXED_OF = "mixed_of"
"""In the training settings of a mixed identity: its parts and their shares of K and of V."""

MAX_PARTS = 100
_HASH_DIGITS = 16


def mix(
    first: Identity,
    second: Identity,
    ratio_k: float,
    ratio_v: float,
    name: str = "",
    class_word: str = "",
) -> Identity:
    """The identity that has gone a share of the way from ``first``, 0, to ``second``, 1.

    An identity that has no share, neither of K nor of V, takes no part. Between two that do:

    - the stages are the least number that both of theirs divide, at most
      :data:`identity.MAX_STAGES`, so that at every step the two are mixed that would be drawn then;
      beyond that number each gets the stage that is in force in its middle;
    - of the fewer vectors the last is repeated, as in a prompt;
    - the class word is ``class_word`` or, without one, theirs.

    Without a ``name`` it is called as both: ``anna_ben``. Raises :class:`SeFiError` for ratios
    outside 0 to 1 and identities that do not go together.
    """
    for label, ratio in (("ratio_k", ratio_k), ("ratio_v", ratio_v)):
        check_number(label, ratio, 0.0, 1.0)
    _check_alike(first, second)
    shares = ((first, 1 - ratio_k, 1 - ratio_v), (second, ratio_k, ratio_v))
    parts = [one for one, *of_one in shares if any(of_one)]
    if not class_word.strip():
        class_word = first.class_word
        if second.class_word != class_word:
            raise SeFiError(
                f"class_word is empty and the identities stand for different words, "
                f"{first.class_word} and {second.class_word}: write the one that the mixed "
                "identity shall stand for"
            )
    stages = min(MAX_STAGES, lcm(*(one.stages for one in parts)))
    vectors = max(one.vectors for one in parts)

    def between(role: str, ratio: float) -> dict[str, torch.Tensor]:
        start, end = (getattr(one, role) for one in (first, second))
        if ratio in (0, 1):
            chosen = end if ratio else start
            return {key: _spread(rows, stages, vectors) for key, rows in chosen.items()}
        return {
            key: torch.lerp(
                _spread(rows, stages, vectors), _spread(end[key], stages, vectors), ratio
            )
            for key, rows in start.items()
        }

    pictures = [one.thumbnail for one in parts if one.thumbnail is not None]
    return Identity(
        name=name or f"{first.name}_{second.name}",
        class_word=class_word,
        family=first.family,
        key_vectors=between("key_vectors", ratio_k),
        value_vectors=between("value_vectors", ratio_v),
        training={MIXED_OF: _shares(shares)},
        thumbnail=side_by_side(*pictures) if len(pictures) == 2 else next(iter(pictures), None),
        position_free=first.position_free,
    )


def _check_alike(first: Identity, second: Identity) -> None:
    second.check_fits(first.family, first.widths)
    if first.position_free != second.position_free:
        (predicted,) = (one for one in (first, second) if one.position_free)
        raise SeFiError(
            f"only {predicted.placeholder} is of SeFi Predict Identity, whose vectors hold a place "
            "in the prompt too, and the two cannot be mixed: mix two predicted identities, or two "
            "others"
        )


def _spread(rows: torch.Tensor, stages: int, vectors: int) -> torch.Tensor:
    """(stages, vectors, width): for each stage the one in its middle, and the last row repeated."""
    middles = [(2 * stage + 1) * len(rows) // (2 * stages) for stage in range(stages)]
    missing = vectors - rows.shape[1]
    return torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], 1)[middles]


def _shares(shares: tuple[tuple[Identity, float, float], ...]) -> list[dict[str, object]]:
    """The parts, with the parts of a mixed identity in its place; equal ones are added up."""
    found: dict[object, dict[str, object]] = {}
    for identity, k, v in shares:
        parts = _parts_of(identity)
        whole = digest([identity.key_vectors, identity.value_vectors])[:_HASH_DIGITS]
        for name, sha, part_k, part_v in parts or [(identity.name, whole, 1.0, 1.0)]:
            entry = found.setdefault(sha, {"name": name, "vectors_sha256": sha, "k": 0.0, "v": 0.0})
            for role, share in (("k", k * part_k), ("v", v * part_v)):
                before = entry[role]
                entry[role] = round(share + (before if isinstance(before, float) else 0.0), 6)
    return [entry for entry in found.values() if entry["k"] or entry["v"]]


def _parts_of(identity: Identity) -> list[tuple[str, str, float, float]]:
    """The parts of a mixed identity; none where the settings of a file say something else."""
    parts = identity.training.get(MIXED_OF)
    if not isinstance(parts, list) or len(parts) > MAX_PARTS:
        return []
    try:
        found = [(part["name"], part["vectors_sha256"], part["k"], part["v"]) for part in parts]
        for name, sha, k, v in found:
            if not isinstance(name, str) or not isinstance(sha, str):
                return []
            check_number("k", k, 0.0, 1.0)
            check_number("v", v, 0.0, 1.0)
    except (KeyError, TypeError, SeFiError):
        return []
    return found
