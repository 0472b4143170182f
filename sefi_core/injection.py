"""What identities change in a prompt's row of the U-Net's batch.

ComfyUI's blocks offer four places to change what a row attends to: the contexts that keys and
values come from (``attn2_patch``), an attention beside the text's and where a token acts (an
``attn2_replace`` around what is there), and the row itself (``attn1_patch``). An :class:`Injection`
is of the first place, with the pooled output that goes with its contexts, and of the third by its
parts; a :class:`Beside` of the second; mixed attention is of the last, and not in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Crowd:
    """The people of one prompt who share the picture; where each is turns out while sampling.

    ``columns`` are the tokens in the prompt of each one's placeholder, by name.
    """

    columns: Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Part:
    """Contexts for a part of the picture; ``share`` (masks, height, width) is how much of it.

    ``person``, where the prompt has a :class:`Crowd`, is whose part of that share it is; "" where
    it is not known yet who is where.
    """

    key: torch.Tensor
    value: torch.Tensor
    pooled: torch.Tensor | None
    share: torch.Tensor
    person: str | None = None


@dataclass(frozen=True, eq=False)
class Injection:
    """Other contexts (1, tokens, width) for keys and values, between two noise levels (sigmas).

    The paper's injection: ``K = W_k c_K[s(t)]``, ``V = W_v c_V[s(t)]``. ``pooled`` (1, width) is
    the V prompt's pooled output, None where there is none. Where identities have regions, attention
    is the sum of those of the ``parts`` by their shares; these contexts are for when the place in
    the picture is not known.
    """

    lowest: float
    highest: float
    key: torch.Tensor
    value: torch.Tensor
    pooled: torch.Tensor | None = None
    parts: Sequence[Part] = ()
    crowd: Crowd | None = None

    def acts_at(self, sigma: float) -> bool:
        """Whether a noise level is one of its own; both ends are."""
        return self.lowest <= sigma <= self.highest


@dataclass(frozen=True, eq=False)
class Beside:
    """An attention beside the text's, between two percents of a sampling, from 0 to 1.

    ``Attn(Q, K_text, V_text) + strength * region * Attn(Q, K', V')``, or without ``with_text`` the
    second alone. ``layers`` has K' and V' for a transformer block (part, number, index), each
    (2, tokens, channels): the first is for conditionings, the second for negative ones. ``region``
    (masks, height, width) is of the whole picture, one mask for each of a batch in turn; None is
    everywhere.
    """

    layers: Mapping[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor]]
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    region: torch.Tensor | None = None
    with_text: bool = True


@dataclass(frozen=True, eq=False)
class Segment:
    """A known prompt in a row: its tokens, and what is injected there, noisiest first.

    A noise level between two injections belongs to the noisier one. ``pooled`` (1, width) is the
    pooled output that left the text encoder with the prompt, None where there was none.
    """

    start: int
    end: int
    injections: Sequence[Injection]
    pooled: torch.Tensor | None = None

    def at(self, sigma: float) -> Injection | None:
        """What acts at a noise level."""
        return next((one for one in self.injections if one.acts_at(sigma)), None)


Row = Sequence[Segment]
"""The known prompts of one row of the batch, in the order of their tokens."""

Choice = Mapping[Injection, Part]
"""The part of each injection that has parts."""

EVERYWHERE: Choice = {}
"""None of them: all identities act."""


def swapped(
    context: torch.Tensor,
    row: Row,
    sigma: float,
    moved: Callable[[torch.Tensor], torch.Tensor],
    choice: Choice = EVERYWHERE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contexts of keys and of values that a context (1, tokens, width) becomes.

    ``moved`` brings a tensor to the device and type of the context.
    """
    keys, values = [], []
    done = 0
    for segment in row:
        injection = segment.at(sigma)
        if injection is None:
            continue
        chosen = choice.get(injection, injection)
        keys += [context[:, done : segment.start], moved(chosen.key)]
        values += [context[:, done : segment.start], moved(chosen.value)]
        done = segment.end
    rest = context[:, done:]
    return torch.cat([*keys, rest], dim=1), torch.cat([*values, rest], dim=1)


ShareOf = Callable[[Injection, Part], torch.Tensor]
"""A part's share (height, width) of what a row sees."""


def variants(row: Row, sigma: float, share_of: ShareOf) -> list[tuple[Choice, torch.Tensor | None]]:
    """What a row attends to in its parts: a part of every injection, and its share of each cell.

    Parts that nothing is seen of are left out; a row without parts has one, whose share is None.
    """
    found: list[tuple[Choice, torch.Tensor | None]] = [(EVERYWHERE, None)]
    for injection in dict.fromkeys(segment.at(sigma) for segment in row):
        if injection is None or not injection.parts:
            continue
        shares = [(part, share_of(injection, part)) for part in injection.parts]
        found = [
            ({**choice, injection: part}, both)
            for choice, before in found
            for part, share in shares
            for both in (share if before is None else before * share,)
            if both.any()
        ]
    return found


def pooled_swapped(
    vector: torch.Tensor,
    row: Row,
    sigma: float,
    moved: Callable[[torch.Tensor], torch.Tensor],
    share_of: ShareOf | None = None,
) -> torch.Tensor:
    """What a row's vector (1, width) becomes, which begins with a prompt's pooled output.

    So does SDXL's, and sizes follow. The pooled output is another's, and stays, where no known
    prompt of the row came with these very numbers. With regions it is the mean of those of the
    parts by how much of what the row sees they are; without ``share_of`` all identities act.
    """
    for segment in row:
        injection = segment.at(sigma)
        if injection is None or injection.pooled is None or segment.pooled is None:
            continue
        pooled = moved(segment.pooled)
        width = pooled.shape[1]
        if torch.equal(vector[:, :width], pooled):
            new = moved(injection.pooled)
            if share_of is not None and injection.parts:
                of_parts = [
                    float(share_of(injection, part).mean()) * moved(part.pooled)
                    for part in injection.parts
                    if part.pooled is not None
                ]
                new = torch.stack(of_parts).sum(0)
            return torch.cat([new, vector[:, width:]], dim=1)
    return vector
