"""What is optimised: the per-stage vectors, or a self-attention block that makes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Vectors = dict[str, torch.Tensor]
"""Text encoder -> token embeddings (stages, vectors, width)."""

Start = Mapping[str, torch.Tensor]

Units = Mapping[str, float]
"""Text encoder -> what a step of the learning rate is measured in, 1 where there is none.

Encoders differ in the size of their token embeddings, and AdamW moves every number by the learning
rate: measured in units of that size, one learning rate fits all.
"""

PARAMETRISATIONS: tuple[str, ...] = ("offsets", "direct", "shared", "self-attention")


class OffsetVectors(nn.Module):
    """One set of vectors for K and one for V, and for each stage an offset from them.

    What every stage needs is learned from every step, as in textual inversion; the offsets hold
    what differs between stages. AdamW moves every number by the learning rate, so a stage's
    vectors move by the common part's step and by ``OFFSET_STEP`` of it.
    """

    OFFSET_STEP = 0.25
    """A step of the offsets over one of the common vectors."""

    def __init__(self, keys: Start, values: Start, units: Units) -> None:
        super().__init__()
        own = {name: units.get(name, 1.0) for name in keys}
        self.keys, self.values = (_Offset(start, own, self.OFFSET_STEP) for start in (keys, values))

    def forward(self) -> tuple[Vectors, Vectors]:
        """The current (keys, values)."""
        return self.keys(), self.values()


class _Offset(nn.Module):
    """The mean of ``start`` over the stages, and each stage's offset from it."""

    def __init__(self, start: Start, units: Units, offset_step: float) -> None:
        super().__init__()
        self.units = units
        self.offset_units = {name: unit * offset_step for name, unit in units.items()}
        mean = {name: rows.mean(dim=0, keepdim=True) for name, rows in start.items()}
        rest = {name: rows - mean[name] for name, rows in start.items()}
        self.common = _in_units(mean, self.units)
        self.offsets = _in_units(rest, self.offset_units)

    def forward(self) -> Vectors:
        return {
            name: self.common[name] * unit + self.offsets[name] * self.offset_units[name]
            for name, unit in self.units.items()
        }


class DirectVectors(nn.Module):
    """The K and V vectors are the parameters: every stage has its own, and learns alone."""

    def __init__(self, keys: Start, values: Start, units: Units) -> None:
        super().__init__()
        self.units = dict(units)
        self.keys, self.values = (_in_units(start, units) for start in (keys, values))

    def forward(self) -> tuple[Vectors, Vectors]:
        """The current (keys, values)."""
        return _out_of_units(self.keys, self.units), _out_of_units(self.values, self.units)


class SharedVectors(nn.Module):
    """The same vectors for K and V: textual inversion, and ProSpect with more than one stage."""

    def __init__(self, keys: Start, values: Start, units: Units) -> None:
        super().__init__()
        self.units = dict(units)
        middle = {name: torch.lerp(keys[name], values[name], 0.5) for name in keys}
        self.vectors = _in_units(middle, units)

    def forward(self) -> tuple[Vectors, Vectors]:
        """The current (keys, values), one and the same dict."""
        vectors = _out_of_units(self.vectors, self.units)
        return vectors, vectors


def _in_units(start: Start, units: Units) -> nn.ParameterDict:
    return nn.ParameterDict(
        {name: rows.detach() / units.get(name, 1.0) for name, rows in start.items()}
    )


def _out_of_units(parameters: nn.ParameterDict, units: Units) -> Vectors:
    return {name: rows * units.get(name, 1.0) for name, rows in parameters.items()}


class SelfAttentionVectors(nn.Module):
    """A trainable transformer block turns the start vectors into the K and V vectors.

    SeFi-IDE's figure draws such a block between the class word's embedding and the ten vectors.
    Every vector is one token of the block and tells by a learned embedding which stage and role
    it is for. The block starts as the identity, so training starts at the start vectors. Its
    parameters are weights and not embeddings, so ``units`` do not matter.
    """

    HEAD_WIDTH = 64

    def __init__(self, keys: Start, values: Start, units: Units) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {name: _Block(torch.stack([keys[name], values[name]])) for name in keys}
        )

    def forward(self) -> tuple[Vectors, Vectors]:
        """The current (keys, values)."""
        made = {name: block() for name, block in self.blocks.items()}
        return {n: pair[0] for n, pair in made.items()}, {n: pair[1] for n, pair in made.items()}


class _Block(nn.Module):
    """One pre-norm transformer block over the tokens of ``start`` (2, stages, vectors, width)."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        width = start.shape[-1]
        self.start: torch.Tensor
        self.register_buffer("start", start.detach().clone())
        self.places = nn.Parameter(torch.randn(start.shape) * start.std().clamp_min(1e-4))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        heads = max(1, width // SelfAttentionVectors.HEAD_WIDTH)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        widening, narrowing = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(widening, nn.GELU(), narrowing)
        for last in (self.attention.out_proj, narrowing):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self) -> torch.Tensor:
        x = (self.start + self.places).flatten(0, 2)[None]
        normed = self.norms[0](x)
        change = self.attention(normed, normed, normed, need_weights=False)[0]
        change = change + self.feed_forward(self.norms[1](x + change))
        return self.start + change[0].view_as(self.start)


def build_parametrisation(
    kind: str, keys: Start, values: Start, seed: int, units: Units | None = None
) -> nn.Module:
    """A parametrisation of ``PARAMETRISATIONS`` that starts at these vectors.

    Its random weights come from ``seed``; the global random state stays as it is. ``units`` are
    those of the learning rate, where the parameters are embeddings. With one stage there is
    nothing to set off, and "offsets" is "direct".
    """
    if kind == "offsets" and all(len(rows) == 1 for rows in keys.values()):
        kind = "direct"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kinds = (OffsetVectors, DirectVectors, SharedVectors, SelfAttentionVectors)
        return dict(zip(PARAMETRISATIONS, kinds, strict=True))[kind](keys, values, units or {})
