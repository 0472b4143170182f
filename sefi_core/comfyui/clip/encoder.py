"""The CLIP side: a text encoder that also encodes what the placeholders of a prompt stand for.

The context that it returns is that of the prompt with the class words; it is signed, since prompts
with another identity, or with the class word itself, have the same one. Beside it, for every stage,
the same prompt is encoded with the identity's K vectors and with its V vectors in the place of the
placeholder, each in a pass of its own; they go with the conditioning as a payload.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from types import MethodType
from typing import Any

import torch
from comfy.sd import CLIP

from ...identity.identity import Identity
from ..unet.conditioning import CONDITIONING_KEY, REGISTRY, Payload, signed
from .embeddings import token_embeddings
from .tokens import Tokens, Vectors, placeholder_ids, placeholders_in, substitute, with_placeholders

REPLACED = "encode_token_weights"


@dataclass(frozen=True)
class AppliedIdentity:
    """An identity and how much of it to use.

    Strengths move the token embeddings on the line from the class word's (0) to the identity's
    (1); values outside weaken or exaggerate. Percents are of the sampling, 0 its start.
    """

    identity: Identity
    strength_k: float = 1.0
    strength_v: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def active(self, start: float, end: float) -> bool:
        """Whether the identity is used all the way from ``start`` to ``end`` percent."""
        changes_something = self.strength_k != 0 or self.strength_v != 0
        return changes_something and self.start_percent <= start and end <= self.end_percent


class IdentityEncoder:
    """Replaces the method ``encode_token_weights`` of ComfyUI's text encoder.

    ``text_encoder`` is ComfyUI's own, ``original`` its replaced method, and ``applied`` maps the
    identities' names to what is applied.
    """

    def __init__(
        self,
        original: Callable[[Tokens], tuple[Any, ...]],
        text_encoder: torch.nn.Module,
        applied: Mapping[str, AppliedIdentity],
    ) -> None:
        self.original = original
        self.text_encoder = text_encoder
        self.applied = dict(applied)

    def __call__(self, tokens: Tokens) -> tuple[Any, ...]:
        """Context, pooled output and, with placeholders in the prompt, a dict with the payload."""
        applied = {
            name: self.applied[name] for name in placeholders_in(tokens) if name in self.applied
        }
        if not applied:
            return self.original(tokens)
        context, pooled, *extra = self.original(tokens)
        payload = self._payload(tokens, applied, context, pooled)
        if payload["phases"]:
            context = payload["base"].clone()  # the registry must not keep the context itself alive
            REGISTRY.add(context, payload)
            pooled = payload["pooled"]  # not the class word's; see find_segments
            extra = [{**(extra[0] if extra else {}), CONDITIONING_KEY: [payload]}]
        return context, pooled, *extra

    def _payload(
        self,
        tokens: Tokens,
        applied: Mapping[str, AppliedIdentity],
        context: torch.Tensor,
        pooled: torch.Tensor | None,
    ) -> Payload:
        encoded: dict[object, tuple[torch.Tensor, torch.Tensor | None]] = {}

        def encode(
            role: str, stages: Mapping[str, int]
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            call = role, tuple(sorted(stages.items()))
            if call not in encoded:
                vectors = self._vectors(tokens, role, applied, stages)
                substituted = substitute(tokens, vectors)
                encoded[call] = self.original(substituted)[:2] if vectors else (context, pooled)
            return encoded[call]

        phases = []
        for start, end, names in _active_intervals(applied):
            counts = {name: applied[name].identity.stages for name in names}
            for stages in _stage_combinations(counts):
                phases.append(
                    {
                        "start_percent": start,
                        "end_percent": end,
                        "stages": [[stages[name], counts[name]] for name in names],
                        "key": encode("keys", stages)[0],
                        "value": encode("values", stages)[0],
                    }
                )
        for _, identity_pooled in encoded.values():
            if pooled is not None and not torch.equal(identity_pooled, pooled):
                pooled = identity_pooled
                break
        return {
            "names": " ".join(sorted(applied)),
            "base": signed(context, _signature(applied)),
            "pooled": pooled,
            "phases": phases,
        }

    def _vectors(
        self,
        tokens: Tokens,
        role: str,
        applied: Mapping[str, AppliedIdentity],
        stages: Mapping[str, int],
    ) -> Vectors:
        """The token embeddings of the identities that are active, at their strengths."""
        vectors = {}
        for name, stage in stages.items():
            strength = applied[name].strength_k if role == "keys" else applied[name].strength_v
            if strength == 0:
                continue  # the class word's ids stay
            identity = applied[name].identity
            learned = identity.key_vectors if role == "keys" else identity.value_vectors
            vectors[name] = {encoder: rows[stage] for encoder, rows in learned.items()}
            if strength != 1:
                for encoder, rows in vectors[name].items():
                    ids = placeholder_ids(tokens[encoder], name)
                    if not ids:
                        continue  # SDXL's two prompts may differ, and it is in the other one
                    class_word = token_embeddings(self.text_encoder, encoder, ids)
                    rows = torch.cat([rows, rows[-1:].expand(len(ids) - len(rows), -1)])
                    vectors[name][encoder] = torch.lerp(class_word, rows, strength)
        return vectors


def identity_encoder(clip: CLIP) -> IdentityEncoder | None:
    """The identity encoder of a CLIP that identities were applied to, else None."""
    encoder = vars(clip.cond_stage_model).get(REPLACED)
    return encoder if isinstance(encoder, IdentityEncoder) else None


def apply_to_clip(clip: CLIP, applied: AppliedIdentity) -> CLIP:
    """A clone of ``clip`` that also understands the placeholder of the identity.

    Identities applied before stay; one of the same name is replaced. The clone's text encoder is
    another object over the same layers. An object patch of the patcher would not do: nodes for
    hooks and devices give a CLIP a patcher with another model, and go on encoding with its own.
    """
    clone = with_placeholders(clip, [applied.identity])
    previous = identity_encoder(clip)
    # The encoder refers to the original only: a cycle would keep the weights of a checkpoint that
    # nobody uses any more.
    original = previous.text_encoder if previous else clip.cond_stage_model
    # The class's method, because the object may have one that ComfyUI left of a patch.
    method = MethodType(type(original).encode_token_weights, original)
    encoder = IdentityEncoder(
        clip.patcher.object_patches.get(REPLACED, method),
        original,
        {**(previous.applied if previous else {}), applied.identity.name: applied},
    )
    clone.cond_stage_model = copy.copy(original)
    setattr(clone.cond_stage_model, REPLACED, encoder)
    return clone


def _signature(applied: Mapping[str, AppliedIdentity]) -> bytes:
    """Eight bytes that tell what is applied, by its content."""
    digest = hashlib.blake2b(digest_size=8)
    for name, one in sorted(applied.items()):
        settings = one.strength_k, one.strength_v, one.start_percent, one.end_percent
        digest.update(repr((name, one.identity.class_word, settings)).encode())
        for vectors in (one.identity.key_vectors, one.identity.value_vectors):
            for _, rows in sorted(vectors.items()):
                digest.update(rows.contiguous().numpy().tobytes())
    return digest.digest()


def _active_intervals(
    applied: Mapping[str, AppliedIdentity],
) -> Iterator[tuple[float, float, list[str]]]:
    """The sampling cut where an identity starts or ends: (start, end, names of those active)."""
    cuts = sorted({cut for one in applied.values() for cut in (one.start_percent, one.end_percent)})
    for start, end in zip(cuts, cuts[1:], strict=False):
        names = sorted(name for name, one in applied.items() if one.active(start, end))
        if names:
            yield start, end, names


def _stage_combinations(counts: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The stages that identities with these numbers of stages are in together, noisiest first."""
    beginnings = {Fraction(stage, count) for count in counts.values() for stage in range(count)}
    for beginning in sorted(beginnings, reverse=True):
        yield {name: floor(beginning * count) for name, count in counts.items()}
