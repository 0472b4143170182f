"""Recognition models are found, opened and read as they should be."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces import recognition
from sefi_ide.sefi_core.faces.recognition import (
    INSIGHT,
    KINDS,
    SFACE,
    FaceEncoder,
    find_model,
    without_weight_inputs,
)
from sefi_ide.tests.unit.recognition_models import save_recogniser

pytestmark = pytest.mark.filterwarnings("error")


def test_weights_are_no_inputs_any_more_and_nothing_else_changes(tmp_path):
    """As the onnx package does it, for weights that are read, and for some that are not."""
    path = save_recogniser(tmp_path / "model.onnx", listed=("weight", "nobodys"))
    wanted = onnx.load(path)
    assert [one.name for one in wanted.graph.input] == ["data", "weight", "nobodys"]
    del wanted.graph.input[1:]
    assert onnx.load_from_string(without_weight_inputs(path.read_bytes())) == wanted


def test_long_graphs_have_long_lengths(tmp_path):
    """The length of a graph is written anew, in as many bytes as it needs."""
    for size in (1, 100, 10_000, 3_000_000):
        extra = numpy_helper.from_array(np.zeros(size, np.uint8), "extra")
        node = helper.make_node("Identity", ["x"], ["y"])
        one, other, out = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "w", "y")
        )
        graph = helper.make_graph([node], "g", [one, other], [out], [extra])
        model = helper.make_model(graph)
        found = onnx.load_from_string(without_weight_inputs(model.SerializeToString()))
        del model.graph.input[1:]
        assert found == model


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"hello, world", b":\xff\xff\x03abc"])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    path = tmp_path / SFACE.files[0]
    path.write_bytes(content)
    with pytest.raises(SeFiError, match="put a fresh copy of the file there") as error:
        FaceEncoder(SFACE, path, use_gpu=False)
    assert str(path) in str(error.value)


def test_a_cut_off_model_is_named(tmp_path):
    path = save_recogniser(tmp_path / SFACE.files[0])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SeFiError, match="put a fresh copy"):
        FaceEncoder(SFACE, path, use_gpu=False)


def test_another_models_file_is_named(tmp_path):
    path = save_recogniser(tmp_path / SFACE.files[0], side=64)
    with pytest.raises(SeFiError, match="it takes"):
        FaceEncoder(SFACE, path, use_gpu=False)


@pytest.mark.parametrize(
    ("kind", "seen"), [(SFACE, [10, 20, 250]), (INSIGHT, [-0.92, -0.84, 0.96])]
)
def test_channels_are_rgb_and_scaled_as_the_model_wants_them(tmp_path, kind, seen):
    """The model gives the mean of each channel that it is shown."""
    encoder = FaceEncoder(kind, save_recogniser(tmp_path / "model.onnx"), use_gpu=False)
    face = np.zeros((112, 112, 3), np.uint8) + np.array([10, 20, 250], np.uint8)
    wanted = np.array(seen) / np.linalg.norm(seen)
    np.testing.assert_allclose(encoder.embed(face), wanted, atol=5e-3)


def test_an_embedding_that_is_not_a_number_is_refused(tmp_path):
    path = save_recogniser(tmp_path / "model.onnx", weight=np.full((3, 3), np.nan, np.float32))
    with pytest.raises(SeFiError, match="not a number"):
        FaceEncoder(SFACE, path, use_gpu=False).embed(np.ones((112, 112, 3), np.uint8))


def test_without_onnxruntime_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(SeFiError, match="pip install onnxruntime"):
        FaceEncoder(SFACE, save_recogniser(tmp_path / "model.onnx"), use_gpu=False)


def test_files_are_found_where_packs_and_people_put_them(tmp_path):
    assert find_model(SFACE, [tmp_path]) is None and find_model(INSIGHT, [tmp_path]) is None
    int8, full = tmp_path / SFACE.files[1], tmp_path / SFACE.files[0]
    int8.touch()
    assert find_model(SFACE, [tmp_path / "none", tmp_path]) == int8
    full.touch()
    assert find_model(SFACE, [tmp_path]) == full
    places = ("buffalo_l", "models/antelopev2/antelopev2", "models/buffalo_l")
    for place, name in zip(places, INSIGHT.files, strict=True):  # the later, the better
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / name).touch()
        assert find_model(INSIGHT, [tmp_path]) == folder / name


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_likeness_is_0_for_a_stranger_and_1_for_the_person(kind):
    assert kind.likeness(kind.different) == 0 and kind.likeness(kind.same) == pytest.approx(1)
    assert kind.likeness(1.0) > 1


def test_sfaces_scale_is_the_measured_one():
    assert SFACE.likeness(0.06 + 0.71 / 2) == pytest.approx(0.5)
    assert recognition.SIDE == 112
