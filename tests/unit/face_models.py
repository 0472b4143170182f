"""Small ONNX files with the inputs and outputs of insightface's det_10g and 2d106det.

The detector takes every red square on the 32 pixel grid of its input for a face, and the landmark
model answers with the same points whatever it sees: so what must come out is known.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Distances from the square's upper left corner, in units of 32 pixels of the network's input.
BOX = (1.5, 2.0, 1.5, 2.0)  # to the left, top, right and bottom of the box
FIVE = ((-0.6, -0.5), (0.6, -0.5), (0.0, 0.2), (-0.5, 1.0), (0.5, 1.0))


def landmarks_106() -> np.ndarray:
    """A jaw line of 33 points and 73 points within, in [-1, 1] of the landmark model's input."""
    jaw = np.linspace(0, np.pi, 33)
    outline = np.stack([0.4 * np.cos(jaw), 0.6 * np.sin(jaw)], 1)
    inner = np.random.default_rng(0).uniform(-0.2, 0.2, (73, 2))
    return np.concatenate([outline, inner]).astype(np.float32)


def save_detector(path: Path, box=BOX, five=FIVE) -> Path:
    """SCRFD: nine outputs for strides 8, 16 and 32 with two anchors, and any input size."""
    nodes, constants, outputs = [], [], {}

    def constant(name: str, value) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    for stride in (8, 16, 32):
        pooled = f"pooled{stride}"
        nodes.append(
            helper.make_node(
                "AveragePool",
                ["input.1"],
                [pooled],
                kernel_shape=[stride] * 2,
                strides=[stride] * 2,
            )
        )
        for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
            weights = np.zeros((2 * width, 3, 1, 1), np.float32)
            bias = np.zeros(2 * width, np.float32)
            if kind == "score" and stride == 32:
                weights[0, :, 0, 0] = 0.5, -0.5, 0.0  # red less green, the first anchor only
            elif kind == "bbox":
                bias[:4] = box
            elif kind == "kps":
                bias[:10] = np.ravel(five)
            name = f"{kind}_{stride}"
            nodes += [
                helper.make_node(
                    "Conv",
                    [pooled, constant(f"{name}_w", weights), constant(f"{name}_b", bias)],
                    [f"{name}_nchw"],
                ),
                helper.make_node(
                    "Transpose", [f"{name}_nchw"], [f"{name}_nhwc"], perm=[0, 2, 3, 1]
                ),
                helper.make_node(
                    "Reshape", [f"{name}_nhwc", constant(f"{name}_shape", [-1, width])], [name]
                ),
            ]
            outputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
    order = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    picture = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"])
    return _save(path, nodes, [picture], [outputs[name] for name in order], constants)


def save_landmarks(path: Path) -> Path:
    """2d106det: input 1 x 3 x 192 x 192, output 1 x 212."""
    nodes = [
        helper.make_node("Flatten", ["data"], ["flat"]),
        helper.make_node("ReduceMin", ["flat"], ["least"], axes=[1]),
        helper.make_node("Mul", ["least", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "points"], ["fc1"]),
    ]
    constants = [
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(landmarks_106().reshape(1, 212), "points"),
    ]
    picture = helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 192, 192])
    points = helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [1, 212])
    return _save(path, nodes, [picture], [points], constants)


def red_squares(height: int, width: int, *corners: tuple[int, int], side: int = 32) -> np.ndarray:
    """A grey RGB picture with a red square at each (x, y) corner, uint8."""
    picture = np.full((height, width, 3), 128, np.uint8)
    for x, y in corners:
        picture[y : y + side, x : x + side] = 255, 0, 0
    return picture


def _save(path: Path, nodes, inputs, outputs, constants) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
