"""What an encoded prompt with placeholders carries to the U-Net, and how it is found again.

A *payload* is a plain dict, so that conditioning can be copied, sliced and saved as ever:

- ``names``: names of the identities in the prompt, with spaces between them (core's Train LoRA node
  never comes back from a list of strings);
- ``base``: the context (1, tokens, width) of the same prompt with the class words, a copy of the
  conditioning's own context, so everything that knows nothing of payloads sees ordinary text;
  :func:`signed`, so that sentences which differ in the placeholder only can be told apart;
- ``pooled``: the pooled output (1, width) that the text encoder returned with it, or None;
- ``phases``: what to use when, a list of dicts of ``start_percent`` and ``end_percent`` of the
  sampling, ``stages`` (a list of [stage, number of stages], one per identity, all of which must be
  current), and the contexts ``key`` and ``value`` (1, tokens, width).

It travels in the conditioning's dict as a list under ``CONDITIONING_KEY``. Some nodes drop that
dict or pair it with another context, so a payload counts only where its base context is found.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

CONDITIONING_KEY = "sefi_identity"

Payload = dict[str, Any]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a floating-point number -> the type that counts in units of its last place."""


def signed(context: torch.Tensor, signature: bytes) -> torch.Tensor:
    """A copy of a context (1, tokens, width) with ``signature``, a few bytes, in its last token.

    Its first number, and one more for every bit that is 1, are moved by one unit in the last place.
    """
    bits = [1, *(byte >> place & 1 for byte in signature for place in range(8))]
    context = context.clone()
    numbers = context[0, -1, : len(bits)].view(_INTEGERS[context.element_size()])
    numbers += torch.tensor(bits[: len(numbers)], dtype=numbers.dtype, device=numbers.device)
    return context


class Registry:
    """The payloads of encoded prompts, for conditioning that has lost its dict.

    A payload is kept as long as the context that it was registered with is in use somewhere; of
    the others the newest ``unused_bytes`` are kept, since a node may have copied the context.
    """

    def __init__(self, unused_bytes: int = 128 << 20) -> None:
        self.unused_bytes = unused_bytes
        self._entries: list[tuple[weakref.ref[torch.Tensor], Payload]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Payload]:
        """All payloads, the newest first."""
        return iter([payload for _, payload in self._entries])

    def add(self, context: torch.Tensor, payload: Payload) -> None:
        """Register the payload of a context; it replaces one that could not be told from it."""
        entries = [(weakref.ref(context), payload)]
        unused = 0
        for used, other in self._entries:
            if _equal(other["base"], payload["base"]):
                continue
            unused += 0 if used() is not None else _bytes(other)
            if used() is not None or unused <= self.unused_bytes:
                entries.append((used, other))
        self._entries = entries


REGISTRY = Registry()
"""Of all CLIPs: a MODEL also samples what was encoded behind another SeFi Apply Identity, such as
that of a first pass with another checkpoint, or this one before ComfyUI ran it again."""


class Segment(NamedTuple):
    """A payload and the token at which its base context begins in a longer context."""

    start: int
    payload: Payload

    @property
    def end(self) -> int:
        return self.start + self.payload["base"].shape[1]


def find_segments(
    context: torch.Tensor, conditioning: Mapping[str, Any], registered: Iterable[Payload]
) -> list[Segment]:
    """The payloads that apply to a context (1, tokens, width), in the order of its tokens.

    The context begins with the prompt that ``conditioning``, its dict, belongs to: there the
    dict's own payloads count. Without any, a registered payload counts if the dict's pooled output
    is the payload's: a node that rounds contexts wipes signatures out, and then the prompt that
    says the class word itself differs in the pooled output only. What ConditioningConcat appended
    are other prompts, whose dicts are gone: there every payload counts.
    """
    own = conditioning.get(CONDITIONING_KEY) or []
    registered = list(registered)
    pooled = conditioning.get("pooled_output")
    first = own or [
        payload for payload in registered if pooled is None or _equal(pooled, payload["pooled"])
    ]
    found = [Segment(0, payload) for payload in first if 0 in _starts(context, payload)]
    found += [
        Segment(start, payload)
        for payload in (*own, *registered)
        for start in _starts(context, payload)
        if start > 0
    ]
    segments: list[Segment] = []
    for segment in sorted(found, key=lambda segment: segment.start):  # stable: newest first
        if not segments or segment.start >= segments[-1].end:
            segments.append(segment)
    return segments


def _starts(context: torch.Tensor, payload: Payload) -> list[int]:
    """The tokens of the context at which the payload's base context begins."""
    base = payload["base"]
    length = base.shape[1]
    if context.shape[0] != 1 or length > context.shape[1] or base.shape[2] != context.shape[2]:
        return []
    # The last token has seen the whole prompt, so it tells most contexts apart by itself.
    ends = (context[0] == base[0, -1].to(context)).all(dim=-1).nonzero().flatten().tolist()
    starts = [end + 1 - length for end in ends if end + 1 >= length]
    base = base.to(context) if starts else base
    return [start for start in starts if torch.equal(context[:, start : start + length], base)]


def _bytes(payload: Payload) -> int:
    contexts = [payload["base"]]
    contexts += [phase[role] for phase in payload["phases"] for role in ("key", "value")]
    return sum({id(context): context.nbytes for context in contexts}.values())


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second.to(first))
