"""Small ONNX files with the input of face recognition models, whose answer is known."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save_recogniser(path: Path, side=112, listed=("weight",), weight=None) -> Path:
    """A model that gives the mean of each channel, times ``weight`` (3, 3), as an embedding (1, 3).

    ``listed`` are listed as inputs, though ``weight`` is a weight and of others there is none.
    """
    weight = np.eye(3, dtype=np.float32) if weight is None else weight
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["fc1"]),
    ]
    inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, side, side])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 3]) for name in listed]
    output = helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [1, 3])
    weights = [numpy_helper.from_array(weight, "weight")]
    graph = helper.make_graph(nodes, "recogniser", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
