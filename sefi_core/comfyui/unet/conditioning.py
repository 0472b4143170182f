"""What an encoded prompt with placeholders carries to the U-Net, and how it is found again.

A *payload* is a plain dict, so that conditioning can be copied, sliced and saved as ever:

- ``names``: names of the identities in the prompt, with spaces between them (core's Train LoRA node
  never comes back from a list of strings);
- ``base``: the context (1, tokens, width) that the text encoder returned, a copy: the prompt with
  the identities' V vectors, an ordinary textual inversion to everything that knows no payloads;
- ``pooled``: the pooled output (1, width) that came with it, None if there was none;
- ``tells``: False where that is the context of the class word as well (V at strength 0), so that
  only the conditioning's own dict tells of the identity;
- ``phases``: what to use when, a list of dicts of ``start_percent`` and ``end_percent`` of the
  sampling, ``stages`` (a list of [stage, number of stages], one per identity, all of which must be
  current), the contexts ``key`` and ``value`` (1, tokens, width), and ``pooled`` (1, width), the
  pooled output of the V prompt, or None. Where identities have regions, ``parts`` is a list of
  dicts of these three, one for each set of identities that act together somewhere, and ``share``
  (masks, height, width), how much of each place of the picture it is; a batch of masks is for the
  pictures of a batch, in turn. ``person`` in it is whose part of that share it is, or "" while it
  is not known who is where. The phase's own three are of all identities, for when the part of the
  picture that the model sees is not known;
- ``word``, which payloads of older versions lack: the prompt with class words, its ``context`` and
  ``pooled`` as above, and the ``places`` of the placeholders' tokens in it;
- ``automatic``, where people share the picture among them: their names, in the prompt's order, and
  the tokens in the context of each one's placeholder.

It travels in the conditioning's dict as a list under ``CONDITIONING_KEY``. Some nodes drop that
dict or pair it with another context, so a payload counts only where its base context is found, and
what has lost its dict is found in the :data:`REGISTRY`. Where a context was computed with, nothing
is found, and it stays the textual inversion that it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import torch

logger = logging.getLogger(__name__)

CONDITIONING_KEY = "sefi_identity"

UNUSED_SHARE = 1 / 16
"""Of the computer's memory, for payloads whose contexts were copied or are gone."""

Payload = dict[str, Any]

Marks = tuple[int, ...]
"""A fingerprint of each token of a context."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a floating-point number -> the type of its bits."""


def fingerprints(contexts: torch.Tensor) -> list[Marks]:
    """For each row of contexts (rows, tokens, width) the marks of its tokens.

    Two tokens have one mark if all bits of their numbers agree, and otherwise by a chance of one in
    2**63 only. Integer arithmetic is exact, so it is the same on every device.
    """
    bits = contexts.contiguous().view(_INTEGERS[contexts.element_size()])
    factors = torch.arange(1, 2 * contexts.shape[-1], 2, device=contexts.device)
    # Odd factors alone would leave the sum of highest bits; the square mixes all of them.
    numbers = bits.to(torch.int64) * 0x9E3779B1 + factors
    return [tuple(row) for row in (numbers * numbers * factors).sum(-1).tolist()]


class Known:
    """A payload that contexts are searched for."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.tells = bool(payload.get("tells", True))
        self._marks: dict[torch.dtype, Marks] = {}

    def marks(self, dtype: torch.dtype) -> Marks:
        """Those of its base context in a floating-point type."""
        if dtype not in self._marks:
            (self._marks[dtype],) = fingerprints(self.payload["base"].to("cpu", dtype))
        return self._marks[dtype]

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        tensors = [self.payload["base"]]
        for phase in self.payload["phases"]:
            parts = phase.get("parts", ())
            tensors += [one[role] for one in (phase, *parts) for role in ("key", "value")]
            tensors += [part["share"] for part in parts]
        if word := self.payload.get("word"):
            tensors.append(word["context"])
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


class Place(NamedTuple):
    """A known prompt and the token at which it begins in a context."""

    start: int
    known: Known


def find(marks: Marks, dtype: torch.dtype, own: Sequence[Known], registry: Registry) -> list[Place]:
    """The known prompts in a context, in the order of its tokens, none of which is in two.

    ``own`` are those of the conditioning's dict: they come before any that the registry knows, and
    then longer ones before shorter ones, which may be the beginning of a longer one.
    """
    ends: dict[int, list[Known]] = {}
    for known in own:
        ends.setdefault(known.marks(dtype)[-1], []).append(known)
    matches: list[tuple[int, int, Place]] = []
    for end, mark in enumerate(marks, 1):
        for rank, candidates in enumerate((ends.get(mark, ()), registry.ending_with(mark, dtype))):
            for known in candidates:
                wanted = known.marks(dtype)
                start = end - len(wanted)
                if start >= 0 and marks[start:end] == wanted:
                    matches.append((rank, -len(wanted), Place(start, known)))
    found: dict[int, Place] = {}
    free = [True] * len(marks)
    for _, length, place in sorted(matches, key=lambda match: match[:2]):
        part = slice(place.start, place.start - length)
        if all(free[part]):
            free[part] = [False] * -length
            found[place.start] = place
    return [found[start] for start in sorted(found)]


class Registry:
    """The payloads of encoded prompts, for conditioning that has lost its dict.

    A payload is kept as long as the context that it was registered with is in use somewhere; of
    the others the newest ``unused_bytes`` are kept, since a node may have copied the context.
    """

    def __init__(self, unused_bytes: float) -> None:
        self.unused_bytes = unused_bytes
        self._entries: list[tuple[weakref.ref[torch.Tensor], Known]] = []
        self._ends: dict[torch.dtype, dict[int, list[Known]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, context: torch.Tensor, payload: Payload) -> None:
        """Register the payload of a context; it replaces one that could not be told from it."""
        added, dtype = Known(payload), payload["base"].dtype
        marks = added.marks(dtype)
        entries = [(weakref.ref(context), added)]
        unused = forgotten = 0.0
        for used, known in self._entries:
            if known.payload["base"].dtype == dtype and known.marks(dtype) == marks:
                continue
            if used() is None:
                if not known.tells:
                    continue
                unused += known.nbytes
                if unused > self.unused_bytes:
                    forgotten += 1
                    continue
            entries.append((used, known))
        if forgotten:
            logger.info(
                "SeFi-IDE forgets the contexts of %d old prompts, which nothing seems to use.",
                forgotten,
            )
        self._entries = entries
        self._ends = {}

    def all(self) -> list[Known]:
        """Every payload that is registered."""
        return [known for _, known in self._entries]

    def of(self, context: torch.Tensor) -> Payload | None:
        """The payload that was registered with this very tensor."""
        return next((known.payload for used, known in self._entries if used() is context), None)

    def ending_with(self, mark: int, dtype: torch.dtype) -> Iterable[Known]:
        """Those whose base context has this mark last, the newest first."""
        if dtype not in self._ends:
            ends: dict[int, list[Known]] = {}
            for known in (known for _, known in self._entries if known.tells):
                ends.setdefault(known.marks(dtype)[-1], []).append(known)
            self._ends[dtype] = ends
        return self._ends[dtype].get(mark, ())


REGISTRY = Registry(UNUSED_SHARE * comfy.model_management.total_ram * 2**20)
"""Of all CLIPs: a MODEL also samples what was encoded behind another SeFi Apply Identity, such as
that of a first pass with another checkpoint, or this one before ComfyUI ran it again."""
