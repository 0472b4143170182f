"""Gradients through ComfyUI's loaded models, with every weight frozen and none of them copied.

ComfyUI loads weights in inference mode, which autograd refuses to save, and casts many of them for
one layer's moment only. Inside :func:`differentiable` a weight that is used as it is gets another
tensor on the same memory, which autograd may save. Where ComfyUI would prepare a weight (LoRA
patches, offloading, another precision) linear and convolution layers fetch it anew in the backward
pass, as for a forward pass; only norms, whose weights are few, keep a copy of it till then.
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
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import nn
from torch.utils.checkpoint import checkpoint


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that passes on the gradient of its input and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return _linear_output(layer, x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight, bias, stream = _fetch(ctx.layer, gradient)
        output = gradient @ weight
        comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)
        return output, None


class _FrozenConv2d(torch.autograd.Function):
    """A convolution that passes on the gradient of its input and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return _conv2d_output(layer, x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = ctx.layer
        weight, bias, stream = _fetch(layer, gradient)
        output = torch.conv_transpose2d(
            gradient,
            weight,
            None,
            layer.stride,
            layer.padding,
            _unseen(layer, ctx.shape),
            layer.groups,
            layer.dilation,
        )
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return output, None


def _unseen(layer: nn.Conv2d, shape: torch.Size) -> list[int]:
    """How many last rows and columns of an input (B, C, h, w) a strided convolution leaves out."""
    if layer.stride == (1, 1):
        return [0, 0]
    padding: Any = layer.padding  # numbers in all that ComfyUI builds, never a word
    return [
        (shape[2 + axis] + 2 * padding[axis] - reach - 1) % layer.stride[axis]
        for axis, reach in enumerate(
            dilation * (kernel - 1)
            for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)
        )
    ]


def _ordinary_weight(layer: nn.Module, like: torch.Tensor) -> nn.Parameter | None:
    """A layer's weight where ComfyUI would do no more than cast it to the type of ``like``.

    None where it does more. Every layer of every step asks this; attributes of modules are slow.
    """
    weight = layer._parameters.get("weight")
    if (
        type(weight) is nn.Parameter  # not quantised
        and weight.device == like.device
        and not (layer.weight_function or layer.bias_function)
        and "_v" not in vars(layer)  # in dynamic VRAM
    ):
        return weight
    return None


def _shared(
    layer: nn.Module, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """A layer's weight and bias as tensors that autograd may save, on the memory of the layer's.

    None if they are not usable on the tensor ``like`` as they are.
    """
    weight, bias = _ordinary_weight(layer, like), layer._parameters.get("bias")
    if weight is None or weight.dtype != like.dtype:
        return None
    if bias is None:
        return _on_the_memory_of(weight), None
    if bias.dtype != like.dtype:
        return None
    return _on_the_memory_of(weight), _on_the_memory_of(bias)


def _on_the_memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in the same place, without the mark of inference mode."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor)  # pyright: ignore[reportArgumentType]  # PyTorch takes tensors too


def _fetch(layer: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """A layer's weight, bias and stream as ComfyUI would use them on the tensor ``like``.

    To be given back with ``uncast_bias_weight``. Ordinary weights are cast without ComfyUI's
    preparations, which take longer than a small layer.
    """
    weight = _ordinary_weight(layer, like)
    if weight is None:
        own = getattr(layer, "cast_bias_weight", None)  # layers of GGUF files unpack theirs so
        with torch.inference_mode():  # samplers have made ComfyUI's cast buffers in it
            if own is not None:
                return *own(like), None
            return comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    bias = layer._parameters.get("bias")
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype), None


def _linear_output(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight, bias, stream = _fetch(layer, x)
    output = F.linear(x, weight, bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return output


def _conv2d_output(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    weight, bias, stream = _fetch(layer, x)
    output = layer._conv_forward(x, weight, bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return output


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    comfy.ops.run_every_op()  # where ComfyUI notices that the user has cancelled
    if shared := _shared(layer, x):
        return F.linear(x, *shared)
    if x.requires_grad and torch.is_grad_enabled():
        return _FrozenLinear.apply(x, layer)
    with torch.no_grad():
        return _linear_output(layer, x)


def _conv2d(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    comfy.ops.run_every_op()
    if shared := _shared(layer, x):
        return layer._conv_forward(x, *shared)
    if x.requires_grad and torch.is_grad_enabled():
        return _FrozenConv2d.apply(x, layer)
    with torch.no_grad():
        return _conv2d_output(layer, x)


def _group_norm(layer: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    if shared := _shared(layer, x):
        return F.group_norm(x, layer.num_groups, *shared, layer.eps)
    weight, bias, stream = _fetch(layer, x)
    output = F.group_norm(x, layer.num_groups, _kept(weight), _kept(bias), layer.eps)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return output


def _layer_norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    if layer.weight is None:
        return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    if shared := _shared(layer, x):
        return F.layer_norm(x, layer.normalized_shape, *shared, layer.eps)
    weight, bias, stream = _fetch(layer, x)
    output = F.layer_norm(x, layer.normalized_shape, _kept(weight), _kept(bias), layer.eps)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return output


def _embedding(layer: nn.Embedding, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Rows of a frozen table, looked up in inference mode as a sampler does."""
    with torch.inference_mode():
        rows = type(layer).forward(layer, ids, **options)
    return rows.clone()


def _kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy that autograd may save; norms have few weights."""
    return None if tensor is None else tensor.clone()


def _clip_layer(
    layer: CLIPLayer,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    optimized_attention: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """``CLIPLayer.forward`` without its additions in place, which autograd forbids.

    The attention is PyTorch's, as ComfyUI chooses it on a GPU; on the CPU its choice is slower.
    """
    x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
    return x + layer.mlp(layer.layer_norm2(x))


_FORWARDS: tuple[tuple[type[nn.Module], Callable[..., torch.Tensor]], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _conv2d),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.Embedding, _embedding),
    (CLIPLayer, _clip_layer),
)


def _differentiable_forward(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """What takes the place of a module's ``forward``, None to leave it."""
    for kind, forward in _FORWARDS:
        if isinstance(module, kind):
            return forward
    # In quantised checkpoints linear layers, the ordinary ones too, are of a class of their own.
    is_linear = isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
    return _linear if is_linear else None


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module's ``forward`` is not its class's.

    An attribute alone says nothing: a LoRA in bypass mode leaves the class's method as one.
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


@contextmanager
def differentiable(*models: nn.Module, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Make ComfyUI's modules differentiable in their inputs while the block runs.

    Temporary ``forward`` attributes on the modules do it; they are gone afterwards, whatever
    happens, and neither weights nor ``requires_grad`` are touched. With ``gradient_checkpointing``
    the U-Net's blocks compute their activations again in the backward pass, which takes less
    memory and more time.
    """
    installed: list[nn.Module] = []

    def install(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        installed.append(module)

    try:
        for model in models:
            for module in model.modules():
                if _is_replaced(module):
                    continue  # another training of the same model, or another pack's forward
                if forward := _differentiable_forward(module):
                    install(module, MethodType(forward, module))
                elif gradient_checkpointing and isinstance(
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
        output: Any = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return output

    return run
