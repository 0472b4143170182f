"""What identities change in a prompt's row of the U-Net's batch.

ComfyUI's blocks offer four places to change what a row attends to: the contexts that keys and
values come from (``attn2_patch``), an attention beside the text's (``attn2_output_patch``), where a
token acts (an ``attn2_replace`` around what is there), and a companion row (``attn1_patch``). An
:class:`Injection` is of the first place, with the pooled output that goes with its contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Injection:
    """Other contexts (1, tokens, width) for keys and values, between two noise levels (sigmas).

    The paper's injection: ``K = W_k c_K[s(t)]``, ``V = W_v c_V[s(t)]``. ``pooled`` (1, width) is
    the V prompt's pooled output, None where there is none.
    """

    lowest: float
    highest: float
    key: torch.Tensor
    value: torch.Tensor
    pooled: torch.Tensor | None = None

    def acts_at(self, sigma: float) -> bool:
        """Whether a noise level is one of its own; both ends are."""
        return self.lowest <= sigma <= self.highest


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


def swapped(
    context: torch.Tensor,
    row: Row,
    sigma: float,
    moved: Callable[[torch.Tensor], torch.Tensor],
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
        keys += [context[:, done : segment.start], moved(injection.key)]
        values += [context[:, done : segment.start], moved(injection.value)]
        done = segment.end
    rest = context[:, done:]
    return torch.cat([*keys, rest], dim=1), torch.cat([*values, rest], dim=1)


def pooled_swapped(
    vector: torch.Tensor,
    row: Row,
    sigma: float,
    moved: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What a row's vector (1, width) becomes, which begins with a prompt's pooled output.

    So does SDXL's, and sizes follow. The pooled output is another's, and stays, where no known
    prompt of the row came with these very numbers.
    """
    for segment in row:
        injection = segment.at(sigma)
        if injection is None or injection.pooled is None or segment.pooled is None:
            continue
        pooled = moved(segment.pooled)
        width = pooled.shape[1]
        if torch.equal(vector[:, :width], pooled):
            return torch.cat([moved(injection.pooled), vector[:, width:]], dim=1)
    return vector
