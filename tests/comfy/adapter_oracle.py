"""The oracle's attention with face adapters: an attention by hand behind every cross-attention."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sefi_ide.tests.comfy.region_oracle import RegionOracle, resize

PARTS = ("input_blocks", "output_blocks", "middle_block")


def attentions(unet) -> list[torch.nn.Module]:
    """Cross-attention layers in the order of IP-Adapter's files: the middle is last."""
    found = []
    for part in PARTS:
        names = [
            name
            for name, _ in unet.named_modules()
            if name.startswith(part) and name.endswith("attn2")
        ]
        found += sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    return [unet.get_submodule(name) for name in found]


@dataclass
class Adapted:
    """Image tokens (T, width) for positive and negative, and the weights (channels, width)."""

    tokens: torch.Tensor
    no_tokens: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    strength: float = 1.0
    region: torch.Tensor | None = None
    text: bool = True
    start: float = 0.0
    end: float = 1.0


@dataclass
class AdapterOracle(RegionOracle):
    """Adapters act on every prompt; those of ``negative`` get the tokens of no face."""

    adapted: list[Adapted] = field(default_factory=list)
    negative: list[object] = field(default_factory=list)

    def attention(self, prompt, timestep: int, x: torch.Tensor):
        pooled, attending = super().attention(prompt, timestep, x)
        # What the oracle hands over is a view of the whole batch.
        size = x.stride(1) // x.stride(2), x.stride(2)
        latent, inside = divmod(x.storage_offset(), x.stride(0))
        top, left = divmod(inside % x.stride(1), x.stride(2))
        percent = 1 - timestep / 999
        seen = []
        for one in self.adapted:
            if not one.start - 1e-9 <= percent <= one.end + 1e-9:
                continue
            share = torch.ones(x.shape[-2:])
            if one.region is not None:
                share = resize(one.region[latent % len(one.region)], size)
                share = share[top : top + x.shape[2], left : left + x.shape[3]]
            seen.append((one, share))
        is_negative = any(prompt is one for one in self.negative)
        return pooled, self._both(attending, seen, is_negative, x.shape[-2:])

    @contextmanager
    def _both(self, attending, seen, is_negative: bool, size):
        handles = []

        def beside(number: int):
            def hook(module, arguments, output):
                x = arguments[0]
                rows, columns = size
                while rows * columns > x.shape[1]:
                    rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
                assert rows * columns == x.shape[1]
                heads = module.heads
                q = module.to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                if not all(one.text for one, _ in seen):
                    output = module.to_out(torch.zeros_like(x))
                for one, share in seen:
                    tokens = (one.no_tokens if is_negative else one.tokens).to(x)
                    k, v = (
                        (tokens @ weight.to(x).T)[None].unflatten(-1, (heads, -1)).transpose(1, 2)
                        for weight in one.layers[number]
                    )
                    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
                    found = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
                    found = found * resize(share, (rows, columns)).reshape(1, -1, 1).to(x)
                    output = output + one.strength * F.linear(found, module.to_out[0].weight)
                return output

            return hook

        with attending:
            # Behind those of the identities, which may give another output.
            for number, module in enumerate(attentions(self.model.diffusion_model)):
                handles.append(module.register_forward_hook(beside(number)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
