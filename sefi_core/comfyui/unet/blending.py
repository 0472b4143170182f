"""Cross-attention that is another one in each part of the picture.

All contexts of a batch, each once, go through the projections behind one another, as one row. Where
the layer then attends, keys and values are cut up again, and what the same queries get from each is
added up by the parts' shares of the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...regions import resized
from .capture import SHARE, Attend, Share, plain_attention


class Blend:
    """The shares of the parts in each row of a batch, at the size of any layer.

    ``shares`` are (parts, rows, height, width) for what the model sees of the picture. A row that
    has fewer parts has 0 for the rest; the first part counts in every row. ``indices`` (parts,
    rows) say which of the ``pieces`` contexts each of them attends to.
    """

    def __init__(self, shares: torch.Tensor, indices: torch.Tensor, pieces: int) -> None:
        self.shares = shares
        self.pieces = pieces
        self.indices = indices
        self.rows = [_rows_with(share) for share in shares]
        self._layers: dict[tuple[object, ...], torch.Tensor] = {}

    def of_layer(self, size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """Shares (parts, rows, queries, 1) on the device and of the type of ``like``."""
        key = size, like.device, like.dtype
        if key not in self._layers:
            planes = resized(self.shares.flatten(0, 1), size)
            shares = planes.view(*self.shares.shape[:2], -1, 1)
            self._layers[key] = shares.to(like)
        return self._layers[key]


class Blending:
    """Attention during one call of the U-Net; ``blend`` is of the layer that computes now."""

    def __init__(self) -> None:
        self.blend: Blend | None = None

    def attend(self, previous: Attend | None) -> Attend:
        """An ``attn2_replace`` patch around the one that was there, which sees one part a time."""

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
        ) -> torch.Tensor:
            blend = self.blend
            if blend is None:
                return (previous or plain_attention)(q, k, v, options)
            shares = blend.of_layer(tuple(options["activations_shape"][-2:]), q)
            keys_of, values_of = (one[0].unflatten(0, (blend.pieces, -1)) for one in (k, v))
            indices = blend.indices = blend.indices.to(q.device)
            output = torch.zeros_like(q)
            for number, (share, rows, index) in enumerate(
                zip(shares, blend.rows, indices, strict=True)
            ):
                seen_rows = rows if previous is None else slice(None)
                keys, values = keys_of[index[seen_rows]], values_of[index[seen_rows]]
                if previous is None:
                    attention = plain_attention(q[rows], keys, values, options)
                    output[rows].addcmul_(attention, share[rows])
                else:  # it may know its rows by their order
                    seen = {**options, SHARE: Share(number, len(shares), share)}
                    output.addcmul_(previous(q, keys, values, seen), share)
            return output

        return attend


def _rows_with(share: torch.Tensor) -> slice:
    """The rows from the first to the last in which a part has a share."""
    found: Sequence[int] = share.flatten(1).any(1).nonzero().flatten().tolist()
    return slice(found[0], found[-1] + 1)
