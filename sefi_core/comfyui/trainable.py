"""Gradients through ComfyUI's loaded models, with every weight frozen and none of them kept.

ComfyUI loads weights in inference mode, casts them layer by layer and may move them at any time,
so autograd can neither save nor trust them. Inside :func:`differentiable` every linear and
convolution layer therefore fetches its weight anew in the backward pass, through the same
``cast_bias_weight`` as in the forward pass: LoRA patches, offloading and lower precision behave
as in sampling, and not one byte of weights is saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPLayer
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import nn
from torch.utils.checkpoint import checkpoint


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that passes on the gradient of its input and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        with _cast(layer, x) as (weight, bias):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with _cast(ctx.layer, gradient) as (weight, _):
            return gradient @ weight, None


class _FrozenConv2d(torch.autograd.Function):
    """A convolution that passes on the gradient of its input and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        with _cast(layer, x) as (weight, bias):
            return layer._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = ctx.layer
        with _cast(layer, gradient) as (weight, _):
            return nn.grad.conv2d_input(
                ctx.shape,
                weight,
                gradient,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            ), None


@contextmanager
def _cast(
    layer: nn.Module, like: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A layer's weight and bias as ComfyUI would use them on the tensor ``like``."""
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    comfy.ops.run_every_op()  # where ComfyUI notices that the user has cancelled
    return _FrozenLinear.apply(x, layer)


def _conv2d(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    comfy.ops.run_every_op()
    return _FrozenConv2d.apply(x, layer)


def _group_norm(layer: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    with _cast(layer, x) as (weight, bias):
        return F.group_norm(x, layer.num_groups, _kept(weight), _kept(bias), layer.eps)


def _layer_norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    if layer.weight is None:
        return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    with _cast(layer, x) as (weight, bias):
        return F.layer_norm(x, layer.normalized_shape, _kept(weight), _kept(bias), layer.eps)


def _kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy that autograd may save; norms have few weights."""
    return None if tensor is None else tensor.clone()


def _clip_layer(
    layer: CLIPLayer,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    optimized_attention: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """``CLIPLayer.forward`` without its additions in place, which autograd forbids."""
    x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
    return x + layer.mlp(layer.layer_norm2(x))


_FORWARDS: tuple[tuple[type[nn.Module], Callable[..., torch.Tensor]], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _conv2d),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (CLIPLayer, _clip_layer),
)


@contextmanager
def differentiable(*models: nn.Module, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Make ComfyUI's modules differentiable in their inputs while the block runs.

    Temporary ``forward`` attributes on the modules do it; they are gone afterwards, whatever
    happens, and neither weights nor ``requires_grad`` are touched. With ``gradient_checkpointing``
    the U-Net's blocks compute their activations again in the backward pass, which takes less
    memory and about a third more time.
    """
    installed: list[nn.Module] = []

    def install(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        installed.append(module)

    try:
        for model in models:
            for module in model.modules():
                if "forward" in vars(module):
                    continue  # another training of the same model, or another pack's forward
                for kind, forward in _FORWARDS:
                    if isinstance(module, kind):
                        install(module, MethodType(forward, module))
                        break
                else:
                    if gradient_checkpointing and isinstance(
                        module, (ResBlock, BasicTransformerBlock)
                    ):
                        install(module, _checkpointed(module.forward))
        yield
    finally:
        for module in installed:
            del module.forward


def _checkpointed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        # The U-Net notes in the options where it is; the second pass must see this block's.
        kwargs = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in kwargs.items()
        }
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
