"""The networks of Face2Diffusion: what a face is (MSID encoder), and as which words (mapping).

Module names are those of the published files, whose weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 112
"""Height and width in pixels of the faces that the encoders take."""

EXPRESSION_WIDTH = 64
"""Numbers that describe an expression, as 3-D face reconstructors give them."""


PLACE_WIDTH = 32
"""Numbers that are read at each place of :attr:`EncoderShape.grid`."""


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder, by default those of the published one.

    ``kind`` "vit" is a vision transformer of ``depth`` blocks whose class token is read after each
    block of ``taps`` (counted from 0); "cnn" has a stage of convolutions for each of ``widths``,
    and is read after each of them, and after the last at ``grid`` x ``grid`` places, too.
    """

    kind: Literal["vit", "cnn"] = "vit"
    patch: int = 8
    width: int = 384
    depth: int = 12
    heads: int = 12
    taps: tuple[int, ...] = (2, 5, 8, 11)
    widths: tuple[int, ...] = ()
    grid: int = 0

    @property
    def features(self) -> int:
        """How many numbers describe a face."""
        if self.kind == "vit":
            return len(self.taps) * self.width
        return sum(self.widths) + self.grid**2 * PLACE_WIDTH

    def build(self) -> nn.Module:
        """The network, faces (B, 3, SIDE, SIDE) in [-1, 1] to (B, features)."""
        return MSIDEncoder(self) if self.kind == "vit" else ConvolutionEncoder(self)

    def as_json(self) -> dict[str, Any]:
        """For a file's metadata; ``EncoderShape(**json)`` is the same again."""
        return asdict(self)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for sizes that no such network has; a file may say anything."""
        for name in ("taps", "widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = (self.patch, self.width, self.depth, self.heads, *self.widths)
        if not all(isinstance(size, int) and 0 < size <= 4096 for size in whole) or (
            self.kind not in ("vit", "cnn")
            or max(self.depth, len(self.widths)) > 64
            or not (isinstance(self.grid, int) and 0 <= self.grid <= 16)
            or not (self.widths if self.kind == "cnn" else self.taps)
            or not set(self.taps) <= set(range(self.depth))
            or self.width % self.heads
        ):
            raise ValueError(f"an encoder of the shape {self}")


class MSIDEncoder(nn.Module):
    """Multi-scale identity encoder: a vision transformer, read at several depths (section 3.2).

    Shallow layers know fine details, deep ones who it is; each is normalised on its own.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.taps, width = shape.taps, shape.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // shape.patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, shape.patch, stride=shape.patch)}
        )
        self.blocks = nn.ModuleList(_Block(width, shape.heads) for _ in range(shape.depth))
        self.norms = nn.ModuleDict(
            {
                f"layer_{tap}": nn.Sequential(nn.BatchNorm1d(width), nn.LayerNorm(width))
                for tap in shape.taps
            }
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Features (B, taps x width) of faces (B, 3, SIDE, SIDE) in [-1, 1]."""
        patches = self.patch_embed["proj"](faces).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(faces), -1, -1), patches], dim=1) + self.pos_embed
        read = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.taps:
                read.append(self.norms[f"layer_{number}"](x[:, 0]))
        return torch.cat(read, dim=1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class ConvolutionEncoder(nn.Module):
    """The same idea in a small network: the mean over the picture after each stage, normalised.

    A mean does not say how far apart the eyes are: with a ``grid`` the last stage is read at its
    places as well.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in shape.widths)
        before = 3
        for width in shape.widths:
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            )
            before = width
        self.grid = shape.grid
        if self.grid:
            self.at_places = nn.Conv2d(before, PLACE_WIDTH, 1)
            self.places_norm = nn.BatchNorm1d(self.grid**2 * PLACE_WIDTH)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Features (B, :attr:`EncoderShape.features`) of faces (B, 3, SIDE, SIDE) in [-1, 1]."""
        x, read = faces, []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            read.append(norm(x.mean((2, 3))))
        if self.grid:
            places = F.adaptive_avg_pool2d(self.at_places(x), self.grid)
            read.append(self.places_norm(places.flatten(1)))
        return torch.cat(read, dim=1)


class Output(NamedTuple):
    """What one head of a mapping gives: a token embedding for one place of the placeholder.

    ``encoder`` is the text encoder ("l", "g"), ``role`` what it is for ("both" in the paper);
    ``stages`` above 1 give another embedding of ``width`` for each stage. Heads of the same encoder
    and role follow each other in the prompt.
    """

    name: str
    encoder: str
    width: int
    role: Literal["both", "key", "value"] = "both"
    stages: int = 1


PUBLISHED_OUTPUTS = (Output("i2t_first", "l", 768), Output("i2t_last", "l", 768))
"""Two embeddings of Stable Diffusion 1.x, of the published ``mapping.pt``."""


class Mapping(nn.Module):
    """Features of a face to token embeddings (section 3.1), with an expression (section 3.3).

    ``null_exp`` stands for an expression that is left to the prompt.
    """

    def __init__(
        self,
        features: int,
        outputs: Sequence[Output],
        expression: int = EXPRESSION_WIDTH,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        sizes = [(output.stages, output.width) for output in self.outputs]
        if (
            not sizes
            or len(sizes) > 256
            or not all(0 < s <= 100 and 0 < w <= 8192 for s, w in sizes)
        ):
            raise ValueError(f"a mapping with the outputs {self.outputs}")
        self.null_exp = nn.Parameter(torch.zeros(expression))
        for output in self.outputs:
            head = _Head(features + expression, features, output.stages * output.width, dropout)
            self.add_module(output.name, head)

    def forward(
        self, features: torch.Tensor, expression: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Head name -> (B, stages, width), for features (B, F).

        ``expression`` (B, 64) may be None; rows of NaN are left to the prompt too.
        """
        null = self.null_exp.expand(len(features), -1)
        if expression is None:
            expression = null
        told = torch.where(expression.isnan().any(1, keepdim=True), null, expression)
        x = torch.cat([features, told], dim=1)
        return {
            output.name: self.get_submodule(output.name)(x).unflatten(1, (output.stages, -1))
            for output in self.outputs
        }

    def rows_of(
        self, found: dict[str, torch.Tensor], row: int, stage: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Of what :meth:`forward` gave, the K and V embeddings (vectors, width) of one face in a
        stage, by text encoder; one and the same where all heads are for both."""
        rows: dict[str, dict[str, list[torch.Tensor]]] = {"key": {}, "value": {}}
        for output in self.outputs:
            for role, of_encoder in rows.items():
                if output.role in (role, "both"):
                    one = found[output.name][row, min(stage, output.stages - 1)]
                    of_encoder.setdefault(output.encoder, []).append(one)
        key, value = (
            {encoder: torch.stack(heads) for encoder, heads in of_encoder.items()}
            for of_encoder in rows.values()
        )
        return (key, key) if all(output.role == "both" for output in self.outputs) else (key, value)

    def vectors_of(
        self, found: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The same of the first face in all stages, K and V as (stages, vectors, width)."""
        stages = range(max(output.stages for output in self.outputs))
        keys, values = (
            {encoder: torch.stack([one[encoder] for one in rows]) for encoder in rows[0]}
            for rows in zip(*(self.rows_of(found, 0, stage) for stage in stages), strict=True)
        )
        return keys, values


class _Head(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(before, hidden), nn.Dropout(dropout), nn.LeakyReLU(0.2))
                for before in (inputs, hidden)
            )
        )
        self.fc_out = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_out(self.layers(x))
