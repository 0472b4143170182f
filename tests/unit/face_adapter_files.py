"""Files of IP-Adapter's layout and face adapters with random weights, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sefi_ide.sefi_core.face_adapter.files import (
    FACEID,
    INFINITE_ID,
    PLUS,
    PLUS_V2,
    PORTRAIT,
    UNNORM,
    Embedder,
    FaceAdapter,
    Layer,
    Lora,
)
from sefi_ide.sefi_core.face_adapter.networks import (
    FaceProjection,
    PairProjection,
    PlusProjection,
    Resampler,
    Sizes,
)

PUBLISHED = (FACEID, PORTRAIT, PLUS, PLUS_V2, UNNORM)
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
LAYERS = {"sd1": 16, "sd2": 16, "sdxl": 70}
FACE = 512


def perceiver_tensors(prefix, inner, width, looks_at, depth, normal):
    """Written down from the published keys and shapes."""
    tensors = {
        f"{prefix}proj_in.weight": normal(inner, looks_at),
        f"{prefix}proj_in.bias": normal(inner),
        f"{prefix}proj_out.weight": normal(width, inner),
        f"{prefix}proj_out.bias": normal(width),
        f"{prefix}norm_out.weight": 1 + normal(width),
        f"{prefix}norm_out.bias": normal(width),
    }
    for layer in (f"{prefix}layers.{n}." for n in range(depth)):
        for name in ("0.norm1", "0.norm2", "1.0"):
            tensors[f"{layer}{name}.weight"] = 1 + normal(inner)
            tensors[f"{layer}{name}.bias"] = normal(inner)
        for name, shape in {
            "0.to_q": (inner, inner),
            "0.to_kv": (2 * inner, inner),
            "0.to_out": (inner, inner),
            "1.1": (4 * inner, inner),
            "1.3": (inner, 4 * inner),
        }.items():
            tensors[f"{layer}{name}.weight"] = normal(*shape)
    return tensors


def published_tensors(variant, family, channels=8, depth=1, rank=0, seed=1):
    """The tensors of a published file, flat; channels and depth are smaller than there."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * (0.3 / shape[-1] ** 0.5)

    width = WIDTHS[family]
    if variant == UNNORM:
        projection = {"latents": normal(1, 16, 1280)}
        projection |= perceiver_tensors("", 1280, width, FACE, depth, normal)
    else:
        tokens = 16 if variant == PORTRAIT else 4
        projection = {
            "proj.0.weight": normal(2 * FACE, FACE),
            "proj.0.bias": normal(2 * FACE),
            "proj.2.weight": normal(tokens * width, 2 * FACE),
            "proj.2.bias": normal(tokens * width),
            "norm.weight": 1 + normal(width),
            "norm.bias": normal(width),
        }
        if variant in (PLUS, PLUS_V2):
            projection |= perceiver_tensors(
                "perceiver_resampler.", width, width, 1280, depth, normal
            )
    tensors = {f"image_proj.{key}": value for key, value in projection.items()}
    for number in range(2 * LAYERS[family]):
        if number % 2:
            for name in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{number}.{name}.weight"] = normal(channels, width)
        if rank:
            for name in ("to_q", "to_k", "to_v", "to_out"):
                inputs = width if number % 2 and name in ("to_k", "to_v") else channels
                prefix = f"ip_adapter.{number}.{name}_lora"
                tensors[f"{prefix}.down.weight"] = normal(rank, inputs)
                tensors[f"{prefix}.up.weight"] = normal(channels, rank)
    return tensors


def adapter_for(
    variant: str,
    family: str,
    channels: Sequence[int],
    context: int,
    embedder: Embedder,
    *,
    states: int = 0,
    width: int = 64,
    rank: int = 0,
    seed: int = 5,
) -> FaceAdapter:
    """A small adapter for a U-Net whose layers have these ``channels`` and take ``context``.

    With a ``rank`` it has a LoRA on all attentions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = 16 if variant in (PORTRAIT, UNNORM) else 4
        sizes = Sizes(embedder.width, width, tokens, states, depth=2)
        if variant in (PLUS, PLUS_V2):
            projection: torch.nn.Module = PlusProjection(sizes, variant == PLUS_V2)
        elif variant == UNNORM:
            projection = Resampler(sizes)
        elif variant == INFINITE_ID:
            projection = PairProjection(sizes)
        else:
            projection = FaceProjection(sizes)
        with torch.no_grad():
            for parameter in projection.parameters():
                parameter.copy_((parameter * 1.5).half())
        layers = [Layer(*(_half(count, width) * width**-0.5 for _ in "kv")) for count in channels]
        lora = {}
        for number, count in enumerate(channels):
            for name in ("q", "k", "v", "out") if rank else ():
                for attention in (1, 2):
                    inputs = context if attention == 2 and name in "kv" else count
                    lora[number, f"attn{attention}.to_{name}"] = Lora(
                        _half(rank, inputs) * 0.1, _half(count, rank) * 0.1
                    )
        return FaceAdapter(
            variant, family, projection.eval().requires_grad_(False), layers, lora, embedder
        )


def _half(*shape: int) -> torch.Tensor:
    """Numbers that half precision has."""
    return torch.randn(shape).half().float()
