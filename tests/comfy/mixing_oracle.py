"""The oracle's mixed attention: keys and values are mixed behind the projections, softmax by hand.

Latents have twice the channels here: those of the identity's picture, then those of the text's, so
that areas, guidance and steps treat both alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from sefi_ide.tests.comfy.oracle import Oracle, Texts, timestep_of
from sefi_ide.tests.comfy.region_oracle import resize


class ClassWord:
    """A prompt whose people are their class word."""

    def __init__(self, prompt) -> None:
        self.prompt = prompt
        self.base, _, self.pooled = self.contexts(0)

    def contexts(self, timestep: int) -> Texts:
        if not getattr(self.prompt, "people", None):
            return self.prompt.contexts(timestep)
        return self.prompt.contexts(timestep, ())


@dataclass
class MixedOracle(Oracle):
    """``adain`` has the letters of what is moved, ``k`` and ``v``.

    ``hidden``: a mask (height, width) of the picture in latent cells, a function that makes one
    of the maps (height, width) of the attention to the word at ``place``, or None.
    """

    own: bool = False
    adain: str = ""
    hidden: torch.Tensor | Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    place: int = 0
    start: float = 0.0
    end: float = 1.0

    def sample_both(self, noise, sigmas, guidance) -> tuple[torch.Tensor, torch.Tensor]:
        """The identity's pictures and the text's."""
        both = self.sample(torch.cat([noise, noise], dim=1), sigmas, guidance)
        return tuple(both.chunk(2, dim=1))

    def unet(self, x, sigma, region, size=None):
        drawn_from, text_from = x.chunk(2, dim=1)
        if not self.own:
            text_from = drawn_from
        unet = self.model.diffusion_model
        words = replace(region, prompt=ClassWord(region.prompt))
        recorded: dict[str, torch.Tensor] = {}
        maps: dict[str, torch.Tensor] = {}
        with recording(unet, recorded), looking(unet, maps, self.place, x.shape[-2:]):
            text = super().unet(text_from, sigma, words, size)
        percent = 1 - timestep_of(sigma, self.sigmas) / 999
        if not getattr(region.prompt, "people", None) or not self.start <= percent <= self.end:
            return torch.cat([super().unet(drawn_from, sigma, region, size), text], dim=1)
        mask = self.hidden
        if callable(mask):
            mask = mask(list(maps.values()))
        elif mask is not None and region.area is not None:
            rows, columns, top, left = region.area
            mask = mask[top : top + rows, left : left + columns]
        with mixing(unet, recorded, self.adain, mask, x.shape[-2:]):
            drawn = super().unet(drawn_from, sigma, region, size)
        return torch.cat([drawn, text], dim=1)


def grid(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Height and width of a layer with so many tokens."""
    rows, columns = size
    while rows * columns > tokens:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    assert rows * columns == tokens
    return rows, columns


def split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def hooked(unet, ending: str, hook, chosen=lambda name: True):
    modules = [(n, m) for n, m in unet.named_modules() if n.endswith(ending) and chosen(n)]
    handles = [
        module.register_forward_hook(lambda *call, name=name: hook(name, *call))
        for name, module in modules
    ]
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(unet, recorded: dict[str, torch.Tensor]):
    """What each self-attention projects to keys and values."""

    def keep(name, module, arguments, output):
        recorded[name] = output

    with hooked(unet, "attn1.to_k", keep), hooked(unet, "attn1.to_v", keep):
        yield


def middle_ones(unet) -> list[str]:
    """Of the transformers in a row the one in the middle."""
    rows: dict[str, list[str]] = {}
    for name, _ in unet.named_modules():
        if name.endswith(".attn2"):
            rows.setdefault(name.split(".transformer_blocks")[0], []).append(name)
    return [names[len(names) // 2] for names in rows.values()]


@contextmanager
def looking(unet, maps: dict[str, torch.Tensor], place: int, size: tuple[int, int]):
    """How much each place of a layer at half or a quarter of the size looks at one token."""
    middle = middle_ones(unet)

    def keep(name, module, arguments, output):
        x = arguments[0]
        rows, columns = grid(size, x.shape[1])
        if round(size[0] / rows) in (2, 4):
            keys = keys_of[name]
            scores = split(module.to_q(x), module.heads) @ split(keys, module.heads).mT
            weights = (scores / math.sqrt(x.shape[-1] // module.heads)).softmax(-1)
            maps[name] = weights.mean(1)[0, :, place].reshape(rows, columns)

    keys_of: dict[str, torch.Tensor] = {}

    def keep_keys(name, module, arguments, output):
        keys_of[name.removesuffix(".to_k")] = output

    with (
        hooked(unet, "attn2.to_k", keep_keys),
        hooked(unet, ".attn2", keep, lambda name: name in middle),
    ):
        yield


@contextmanager
def mixing(unet, recorded, adain: str, mask: torch.Tensor | None, size: tuple[int, int]):
    """Every self-attention attends to its own keys and values and to those recorded."""

    def attend(name, module, arguments, output):
        x = arguments[0]
        both = {}
        for letter, project in (("k", module.to_k), ("v", module.to_v)):
            own, text = project(x), recorded[f"{name}.to_{letter}"].to(x)
            if mask is not None:
                share = resize(mask, grid(size, x.shape[1])).reshape(1, -1, 1).to(x)
                text = share * own + (1 - share) * text
            if letter in adain:
                own = own - own.mean(1, keepdim=True) + text.mean(1, keepdim=True)
            both[letter] = split(torch.cat([own, text], dim=1), module.heads)
        q = split(module.to_q(x), module.heads)
        scores = q @ both["k"].mT / math.sqrt(q.shape[-1])
        return module.to_out((scores.softmax(-1) @ both["v"]).transpose(1, 2).flatten(2))

    with hooked(unet, ".attn1", attend):
        yield


def person_mask(maps: list[torch.Tensor]) -> torch.Tensor:
    """The product's rule, once more: 0 up to 0.35 of the highest attention, 1 from 0.65 on."""
    size = max(tuple(one.shape) for one in maps)
    planes = [resize(one.float(), size) for one in maps]
    mean = sum(plane / plane.max() for plane in planes) / len(planes)
    return ((mean / mean.max() - 0.35) / 0.3).clamp(0, 1)
