"""The oracle's attention with regions: softmax by hand, masks resized by matrices."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from sefi_ide.tests.comfy.oracle import Fixed, Oracle


def area(size: int, wanted: int) -> torch.Tensor:
    """(wanted, size): each cell is the mean of all that lie in it at least in part."""
    matrix = torch.zeros(wanted, size)
    for cell in range(wanted):
        first, last = cell * size // wanted, math.ceil((cell + 1) * size / wanted)
        matrix[cell, first:last] = 1 / (last - first)
    return matrix


def bilinear(size: int, wanted: int) -> torch.Tensor:
    """(wanted, size): each cell between the two whose centres are next to its own."""
    matrix = torch.zeros(wanted, size)
    for cell in range(wanted):
        at = min(max((cell + 0.5) * size / wanted - 0.5, 0), size - 1)
        low = int(at)
        matrix[cell, low] += 1 - (at - low)
        matrix[cell, min(low + 1, size - 1)] += at - low
    return matrix


def resize(plane: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A plane in another size, each side by itself."""
    for wanted in size:
        matrix = (area if plane.shape[0] >= wanted else bilinear)(plane.shape[0], wanted)
        plane = (matrix @ plane).T
    return plane


@dataclass
class RegionOracle(Oracle):
    """One or two people with ``masks`` by name, (masks, height, width) each."""

    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def shares(self, prompt, latent: int, size: tuple[int, int]):
        """The acting names and their share of each latent cell of the picture."""
        inside = [name for name in prompt.people if name in self.masks]
        always = [name for name in prompt.people if name not in self.masks]
        masks = [self.masks[name] for name in inside]
        largest = tuple(max(mask.shape[side] for mask in masks) for side in (1, 2))
        first, *rest = (
            resize(mask[latent % len(mask)].double().float(), largest) for mask in masks
        )
        second = rest[0] if rest else torch.zeros_like(first)
        both = (first + second - 1).clamp(min=0)
        acting = [
            ([], 1 - first - second + both),
            (inside[:1], first - both),
            (inside[1:], second - both),
            (inside, both),
        ]
        return [(always + names, resize(share, size)) for names, share in acting]

    def attention(self, prompt, timestep: int, x: torch.Tensor):
        if isinstance(prompt, Fixed) or not set(prompt.people) & set(self.masks):
            return super().attention(prompt, timestep, x)
        # What the oracle hands over is a view of the whole batch.
        count, of_picture, of_row = x.storage_offset(), x.stride(0), x.stride(2)
        size = of_picture // x.stride(1), x.stride(1) // of_row
        height, width = x.stride(1) // of_row, of_row
        latent, inside = divmod(count, of_picture)
        top, left = divmod(inside % x.stride(1), of_row)
        assert size[0] == x.shape[1]
        found = [
            (
                prompt.contexts(timestep, names),
                share[top : top + x.shape[2], left : left + x.shape[3]],
            )
            for names, share in self.shares(prompt, latent, (height, width))
        ]
        pooled = sum(texts.pooled * share.mean() for texts, share in found)
        return pooled, _blended(self.model.diffusion_model, found, x.shape[-2:])


@contextmanager
def _blended(unet: torch.nn.Module, found, size: tuple[int, int]):
    """Every cross-attention gives the sum of its attention to each of ``found``."""

    def instead(module, arguments, output):
        (x,) = arguments[:1]
        rows, columns = size
        while rows * columns > x.shape[1]:
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        assert rows * columns == x.shape[1]
        heads = module.heads
        q = module.to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        total = 0
        for texts, share in found:
            k, v = (
                project(context.to(x)).unflatten(-1, (heads, -1)).transpose(1, 2)
                for project, context in ((module.to_k, texts.key), (module.to_v, texts.value))
            )
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            total = total + attended * resize(share, (rows, columns)).reshape(1, -1, 1).to(x)
        return module.to_out(total)

    handles = [
        module.register_forward_hook(instead)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
