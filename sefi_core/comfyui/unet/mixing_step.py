"""What passes from the text's picture to the identity's in one step of mixed attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.maps import attention_probabilities
from ...attention.mixing import hide, mixed, person_mask
from ...regions import resized
from ..base_model import Block
from .capture import Layer, Look, previous_patch
from .places import Place

Patch = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]
"""An ``attn1_patch``: what queries, keys and values are made of, and options."""

Rows = Sequence[tuple[int, Place]]
"""The rows of a call with an identity: their index, and what of the picture they are."""


@dataclass(frozen=True)
class MixSettings:
    """How pictures are mixed."""

    own: bool = True
    """Whether the text draws a picture of its own beside the identity's."""
    adain_keys: bool = False
    adain_values: bool = False
    start_percent: float = 0.0
    end_percent: float = 1.0
    hides: bool = True
    """Whether the face that the text draws is hidden from the identity's picture."""
    mask: torch.Tensor | None = None
    """Where that face is, (masks, height, width); None to find it by the class word."""
    of_others: bool = False
    """Whether the identity is one of other nodes, which patch the MODEL's attention to the text."""


class Step:
    """What one call of ComfyUI's for the text's picture has left to that for the identity's.

    ``size`` is that of the whole picture in latent cells, ``numbers`` are of the conditionings with
    an identity. ``latents`` are those of the current pass.
    """

    def __init__(
        self,
        settings: MixSettings,
        size: tuple[int, int],
        numbers: frozenset[int],
        latents: torch.Tensor,
        sigma: torch.Tensor,
    ) -> None:
        self.settings, self.size, self.numbers = settings, size, numbers
        self.latents, self.sigma = latents, sigma
        self.recording = True
        """Whether the text's picture is computed."""
        self.contexts: Mapping[int, torch.Tensor] = {}
        """Conditionings with an identity as the model gets them in the current pass."""
        self._tokens: dict[tuple[Block, Place], tuple[torch.Tensor, torch.Tensor]] = {}
        self._maps: dict[Place, list[torch.Tensor]] = {}
        self._masks: dict[tuple[Place, tuple[int, int]], torch.Tensor] = {}

    def patch(self, rows: Rows, count: int, taken: Mapping[Any, Any]) -> Patch:
        """What a call with ``count`` rows gets; blocks that others compute (``taken``) stay."""
        return (self._recording if self.recording else self._mixing)(rows, count, taken)

    def looking(self, rows: Rows, count: int, columns: Callable[[Place], list[int]]) -> Look:
        """Keeps where the text's picture looks at class words, the ``columns`` of its context."""

        def look(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
            if len(q) != count or len(k) != count:
                return
            for index, place in rows:
                if words := columns(place):
                    one = slice(index, index + 1)
                    attention = attention_probabilities(q[one], k[one], layer.heads).mean(1)
                    seen = attention[0, :, words].sum(-1).unflatten(0, layer.size)
                    self._maps.setdefault(place, []).append(seen)

        return look

    def _recording(self, rows: Rows, count: int, taken: Mapping[Any, Any]) -> Patch:
        """Keeps what the text's rows attend to."""

        def patch(
            n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            block = (*extra["block"], extra["block_index"])
            if previous_patch(taken, block) is None and len(context) == count:
                for index, place in rows:
                    keys = context[index : index + 1].clone()  # not the whole batch
                    values = keys if value is context else value[index : index + 1].clone()
                    self._tokens[block, place] = keys, values
            return n, context, value

        return patch

    def _mixing(self, rows: Rows, count: int, taken: Mapping[Any, Any]) -> Patch:
        """Has the identity's rows attend to that as well, and the others twice to their own."""
        adains = self.settings.adain_keys, self.settings.adain_values

        def patch(
            n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            block = (*extra["block"], extra["block_index"])
            places = {index: place for index, place in rows if (block, place) in self._tokens}
            if previous_patch(taken, block) or len(context) != count or not places:
                return n, context, value
            recorded = [
                {index: self._tokens[block, place][role] for index, place in places.items()}
                for role in (0, 1)
            ]
            mask = self._mask(places, context, tuple(extra["activations_shape"][-2:]))
            keys = _mixed(context, recorded[0], mask, adains[0])
            alike = value is context and adains[0] == adains[1]
            alike &= all(recorded[0][index] is recorded[1][index] for index in places)
            values = keys if alike else _mixed(value, recorded[1], mask, adains[1])
            if len(n) != count:
                keys, values = (_tiled(one, len(n) // count) for one in (keys, values))
            return n, keys, values

        return patch

    def _mask(
        self, places: Mapping[int, Place], context: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor | None:
        """Where the text's face is, (rows, tokens, 1) at a layer's size; None for nowhere."""
        if not self.settings.hides or size[0] * size[1] != context.shape[1]:
            return None
        found = {index: self._mask_at(place, size) for index, place in places.items()}
        known = {index: mask for index, mask in found.items() if mask is not None}
        if not known:
            return None
        nothing = context.new_zeros(size)
        masks = [known.get(index, nothing).to(context) for index in range(len(context))]
        return torch.stack(masks).flatten(1)[..., None]

    def _mask_at(self, place: Place, size: tuple[int, int]) -> torch.Tensor | None:
        if (place, size) not in self._masks:
            if self.settings.mask is not None:
                whole = resized(self.settings.mask, self.size)
                plane = whole[place.latent % len(whole)]
                plane = plane[place.top : place.top + place.height]
                plane = plane[:, place.left : place.left + place.width]
            elif place in self._maps:
                plane = person_mask(self._maps[place])
            else:
                return None
            self._masks[place, size] = resized(plane[None], size)[0]
        return self._masks[place, size]


def _mixed(
    own: torch.Tensor, text: Mapping[int, torch.Tensor], mask: torch.Tensor | None, adain: bool
) -> torch.Tensor:
    """Own tokens and the text's; where nothing was recorded, their own again."""
    texts = torch.cat([text.get(i, own[i : i + 1]).to(own) for i in range(len(own))])
    if mask is not None:
        texts = hide(texts, own, mask)
    return mixed(own, texts, adain)


def _tiled(both: torch.Tensor, tiles: int) -> torch.Tensor:
    """Both pictures' tokens for queries that were cut into tiles, as HyperTile does.

    Attention deals out the tokens of a row to its tiles in their order; each gets its part of
    either picture.
    """
    return both.unflatten(1, (2, tiles, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
