"""Cross-attention that is another one in each part of the picture.

All contexts of a batch, each once, go through the projections behind one another, as one row. Where
the layer then attends, keys and values are cut up again. Each query asks only the parts that have a
share of its place, and what they give is added up by their shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...regions import resized
from .automatic import Reader
from .capture import SHARE, Attend, Layer, Share, looking, plain_attention

GATHERING = 16
"""How many queries cost what one more copy of a context's keys and values does, about."""

MOST_PIECES = 8
"""A part's queries are dealt into so many rows at most."""


class Deal(NamedTuple):
    """How the queries of a batch are dealt into rows of equal length, which one attention answers.

    ``queries`` (dealt rows, length) number the batch's queries, ``pieces`` (dealt rows) the context
    of each. ``answers`` are for each of the batch's queries where its answers stand among the dealt
    ones, (parts that meet at a place, rows, queries); ``weights`` (..., 1) are their shares, None
    where parts meet nowhere.
    """

    queries: torch.Tensor
    pieces: torch.Tensor
    answers: torch.Tensor
    weights: torch.Tensor | None


class Blend:
    """The shares of the parts in each row of a batch, at the size of any layer.

    ``shares`` are (parts, rows, height, width) for what the model sees of the picture. A row that
    has fewer parts has 0 for the rest. ``indices`` (parts, rows) say which of the ``pieces``
    contexts each of them attends to.
    """

    def __init__(self, shares: torch.Tensor, indices: torch.Tensor, pieces: int) -> None:
        self.shares = shares
        self.pieces = pieces
        self.indices = indices
        self._layers: dict[tuple[object, ...], torch.Tensor] = {}
        self._deals: dict[tuple[object, ...], Deal] = {}

    def of_layer(self, size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """Shares (parts, rows, queries, 1) on the device and of the type of ``like``."""
        key = size, like.device, like.dtype
        if key not in self._layers:
            self._layers[key] = self._resized(size)[..., None].to(like)
        return self._layers[key]

    def deal(self, size: tuple[int, int], like: torch.Tensor) -> Deal:
        """Which queries of a layer ask which context, on the device and of the type of ``like``."""
        key = size, like.device, like.dtype
        if key not in self._deals:
            deal = dealt(self._resized(size), self.indices.cpu())
            queries, pieces, answers = (one.to(like.device) for one in deal[:3])
            weights = None if deal.weights is None else deal.weights.to(like)
            self._deals[key] = Deal(queries, pieces, answers, weights)
        return self._deals[key]

    def _resized(self, size: tuple[int, int]) -> torch.Tensor:
        return resized(self.shares.flatten(0, 1), size).view(*self.shares.shape[:2], -1)


class Blending:
    """Attention during one call of the U-Net; ``blend`` is of the layer that computes now.

    ``reader`` reads the maps of the layers at :data:`capture.LEVELS` that attend to the rows' own
    contexts, as ``own`` says of each. ``height`` is that of the latents.
    """

    def __init__(self, reader: Reader | None, height: int) -> None:
        self.reader, self.height = reader, height
        self.blend: Blend | None = None
        self.own = False

    def attend(self, previous: Attend | None, read: bool = False) -> Attend:
        """An ``attn2_replace`` patch around the one that was there, which sees one part a time.

        ``read``: the layer may be read.
        """
        if read and self.reader:
            previous = looking(self._look, self.height, previous)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
        ) -> torch.Tensor:
            blend = self.blend
            if blend is None:
                return (previous or plain_attention)(q, k, v, options)
            size = tuple(options["activations_shape"][-2:])
            keys, values = (one[0].unflatten(0, (blend.pieces, -1)) for one in (k, v))
            if previous is None:
                deal = blend.deal(size, q)
                asked = _picked(q.flatten(0, 1), deal.queries)
                own_keys, own_values = (_picked(one, deal.pieces) for one in (keys, values))
                given = plain_attention(asked, own_keys, own_values, options)
                answers = _picked(given.flatten(0, 1), deal.answers)
                return answers[0] if deal.weights is None else (answers * deal.weights).sum(0)
            # A patch of another pack may know rows by their order, and queries by their place.
            shares = blend.of_layer(size, q)
            indices = blend.indices = blend.indices.to(q.device)
            output = torch.zeros_like(q)
            for number, (share, index) in enumerate(zip(shares, indices, strict=True)):
                seen = {**options, SHARE: Share(number, len(shares), share)}
                output.addcmul_(previous(q, keys[index], values[index], seen), share)
            return output

        return attend

    def _look(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.reader and self.own:
            self.reader.look(layer, q, k, v)


def _picked(rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """``rows[numbers]``, which takes twice as long on a CPU."""
    return rows.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)


def dealt(shares: torch.Tensor, indices: torch.Tensor) -> Deal:
    """The :class:`Deal` for ``shares`` (parts, rows, queries) and ``indices`` (parts, rows)."""
    rows, count = shares.shape[1:]
    hands: list[tuple[int, torch.Tensor]] = []
    for row in range(rows):
        for part, index in enumerate(indices[:, row].tolist()):
            queries = shares[part, row].nonzero().flatten()
            if len(queries):
                hands.append((index, queries + row * count))
    length = _length_of_rows([len(queries) for _, queries in hands])
    meeting = int((shares > 0).sum(0).max())
    answers = torch.zeros(meeting, rows * count, dtype=torch.long)
    weights = torch.zeros(meeting, rows * count)
    found = torch.zeros(rows * count, dtype=torch.long)
    owners = [
        (part, row) for row in range(rows) for part in range(len(shares)) if shares[part, row].any()
    ]
    dealt_queries, pieces = [], []
    for (index, queries), (part, row) in zip(hands, owners, strict=True):
        begin = length * len(pieces)
        copies = -(-len(queries) // length)
        padded = queries[torch.arange(copies * length).clamp(max=len(queries) - 1)]
        dealt_queries.append(padded.view(copies, length))
        pieces += [index] * copies
        at = found[queries]
        answers[at, queries] = begin + torch.arange(len(queries))
        weights[at, queries] = shares[part, row, queries - row * count].float()
        found[queries] += 1
    return Deal(
        torch.cat(dealt_queries),
        torch.tensor(pieces),
        answers.view(meeting, rows, count),
        None if meeting == 1 else weights.view(meeting, rows, count, 1),
    )


def _length_of_rows(counts: Sequence[int]) -> int:
    """The length of rows into which so many queries of each part go at the least cost."""
    candidates = {-(-count // parts) for count in counts for parts in range(1, MOST_PIECES + 1)}

    def cost(length: int) -> int:
        return sum(-(-count // length) for count in counts) * (length + GATHERING)

    return min(sorted(candidates, reverse=True), key=cost)
