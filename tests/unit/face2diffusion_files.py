"""Files and encoders of Face2Diffusion's layout with random weights, for tests."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from sefi_ide.sefi_core.face2diffusion.files import FaceEncoder
from sefi_ide.sefi_core.face2diffusion.networks import EncoderShape, Mapping, Output

TAPS = (2, 5, 8, 11)


def normal(shape, generator, scale=0.05):
    return torch.randn(shape, generator=generator) * scale


def msid_tensors():
    """Tensors of ``msid.pt``, written down from its published keys and shapes."""
    g = torch.Generator().manual_seed(1)
    state = {
        "cls_token": normal((1, 1, 384), g),
        "pos_embed": normal((1, 197, 384), g),
        "patch_embed.proj.weight": normal((384, 3, 8, 8), g),
        "patch_embed.proj.bias": normal((384,), g),
        "norm.weight": normal((384,), g),
        "norm.bias": normal((384,), g),
    }
    for block in (f"blocks.{i}." for i in range(12)):
        for name, shape in {
            "attn.qkv": (1152, 384),
            "attn.proj": (384, 384),
            "mlp.fc1": (1536, 384),
            "mlp.fc2": (384, 1536),
        }.items():
            state[f"{block}{name}.weight"] = normal(shape, g)
            state[f"{block}{name}.bias"] = normal(shape[:1], g)
        for name in ("norm1", "norm2"):
            state[f"{block}{name}.weight"] = 1 + normal((384,), g)
            state[f"{block}{name}.bias"] = normal((384,), g)
    for tap in TAPS:
        for part in (0, 1):
            state[f"norms.layer_{tap}.{part}.weight"] = 1 + normal((384,), g)
            state[f"norms.layer_{tap}.{part}.bias"] = normal((384,), g)
        state[f"norms.layer_{tap}.0.running_mean"] = normal((384,), g)
        state[f"norms.layer_{tap}.0.running_var"] = 1 + normal((384,), g).abs()
        state[f"norms.layer_{tap}.0.num_batches_tracked"] = torch.tensor(7)
    return state


def mapping_tensors():
    """The same of ``mapping.pt``."""
    g = torch.Generator().manual_seed(2)
    state = {"null_exp": normal((64,), g, 1.0)}
    for head in ("i2t_first", "i2t_last"):
        for layer, shape in (
            ("layers.0.0", (1536, 1600)),
            ("layers.1.0", (1536, 1536)),
            ("fc_out", (768, 1536)),
        ):
            state[f"{head}.{layer}.weight"] = normal(shape, g)
            state[f"{head}.{layer}.bias"] = normal(shape[:1], g)
    return state


def small(**changes):
    """An encoder of its own kind: SDXL's two text encoders, K and V apart, five stages."""
    torch.manual_seed(4)
    shape = EncoderShape("cnn", widths=(4, 6))
    outputs = [
        Output("l_key", "l", 8, "key", 5),
        Output("l_value", "l", 8, "value", 1),
        Output("g_both", "g", 12, "both", 5),
    ]
    mapping = Mapping(shape.features, outputs, 3)
    encoder = shape.build()
    made = {"family": "sdxl", "crop": "head", "position_free": False, "class_word": "cat"}
    return FaceEncoder(encoder.eval(), mapping.eval(), shape, **{**made, **changes})


def encoder_for(family, widths, stages=1, vectors=2, seed=5, expression=64, **changes):
    """A small encoder for a model of a family whose token embeddings have these ``widths``.

    Of two photos it says clearly different things, about as large as token embeddings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = EncoderShape("cnn", widths=(4, 6))
        outputs = [
            Output(f"{encoder}_{role}_{number}", encoder, width, role, stages)
            for encoder, width in widths.items()
            for role in ("key", "value")
            for number in range(vectors)
        ]
        mapping = Mapping(shape.features, outputs, expression)
        with torch.no_grad():
            mapping.null_exp.normal_()
            for parameter in mapping.parameters():
                parameter *= 2
        return FaceEncoder(shape.build().eval(), mapping.eval(), shape, family, **changes)


def save_published(folder, mapping="mapping.pt"):
    """The published two files with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(msid_tensors(), folder / "msid.pt")
    torch.save(mapping_tensors(), folder / mapping)


def save_expression(path, numbers=64, side=112, inputs=1, scale=1.0):
    """A model of expressions that gives the mean colour times a matrix, which is returned."""
    weight = np.linspace(-scale, scale, 3 * numbers, dtype=np.float32).reshape(3, numbers)
    names = ["face", "other"][:inputs]
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["face"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["numbers"]),
        ],
        "expression",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, side, side])
            for name in names
        ],
        [helper.make_tensor_value_info("numbers", TensorProto.FLOAT, [1, numbers])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return weight
