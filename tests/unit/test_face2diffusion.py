"""Face2Diffusion's networks and files, against the same computed from the weights by their names.

The weights are random, in the published files' layout; nobody's published weights are here.
"""

import json

import pytest
import safetensors.torch
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import (
    read_face_encoder,
    read_published,
    write_face_encoder,
)
from sefi_ide.sefi_core.face2diffusion.networks import PUBLISHED_OUTPUTS, EncoderShape, Mapping
from sefi_ide.tests.unit.face2diffusion_files import (
    TAPS,
    mapping_tensors,
    msid_tensors,
    small,
)


@pytest.fixture(scope="module")
def msid():
    return msid_tensors()


@pytest.fixture(scope="module")
def mapping():
    return mapping_tensors()


@pytest.fixture(scope="module")
def published(msid, mapping, tmp_path_factory):
    folder = tmp_path_factory.mktemp("face2diffusion")
    torch.save({f"module.{key}": value for key, value in msid.items()}, folder / "msid.pt")
    torch.save(mapping, folder / "mapping.pt")
    return read_published(folder / "msid.pt", folder / "mapping.pt")


@pytest.fixture(scope="module")
def faces():
    return torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(3)) * 2 - 1


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x, state, name, eps):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def reference_features(state, faces):
    """The encoder as section 3.2 and the files' shapes describe it, head by head."""
    patches = faces.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, 14, 14, 8, 8)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(faces), 196, 192)
    flat = {
        "p.weight": state["patch_embed.proj.weight"].reshape(384, 192),
        "p.bias": state["patch_embed.proj.bias"],
    }
    x = torch.cat([state["cls_token"].repeat(len(faces), 1, 1), linear(patches, flat, "p")], 1)
    x = x + state["pos_embed"]
    read = []
    for i in range(12):
        b = f"blocks.{i}."
        q, k, v = linear(layer_norm(x, state, b + "norm1", 1e-6), state, b + "attn.qkv").split(
            384, -1
        )
        heads = []
        for h in range(12):
            part = slice(32 * h, 32 * h + 32)
            weights = (q[..., part] @ k[..., part].mT / 32**0.5).softmax(-1)
            heads.append(weights @ v[..., part])
        x = x + linear(torch.cat(heads, -1), state, b + "attn.proj")
        inner = linear(layer_norm(x, state, b + "norm2", 1e-6), state, b + "mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = x + linear(inner, state, b + "mlp.fc2")
        if i in TAPS:
            n, cls = f"norms.layer_{i}.", x[:, 0]
            cls = (cls - state[n + "0.running_mean"]) / (state[n + "0.running_var"] + 1e-5).sqrt()
            cls = cls * state[n + "0.weight"] + state[n + "0.bias"]
            read.append(layer_norm(cls, state, n + "1", 1e-5))
    return torch.cat(read, 1)


def reference_embedding(state, head, features, expression):
    x = torch.cat([features, expression], -1)
    for layer in ("layers.0.0", "layers.1.0"):
        x = linear(x, state, f"{head}.{layer}")
        x = torch.where(x > 0, x, 0.2 * x)
    return linear(x, state, f"{head}.fc_out")


@torch.no_grad()
def test_the_published_encoder_agrees_with_its_description(published, msid, faces):
    found = published.encoder(faces)
    assert found.shape == (2, 1536)
    torch.testing.assert_close(found, reference_features(msid, faces), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_expression", (False, True))
@torch.no_grad()
def test_two_vectors_of_the_mean_of_the_photos(published, msid, mapping, faces, with_expression):
    told = torch.linspace(-1, 1, 64) if with_expression else None
    keys, values = published.predict(faces, told)
    features = reference_features(msid, faces).mean(0)
    told = mapping["null_exp"] if told is None else told
    wanted = [
        reference_embedding(mapping, head, features, told) for head in ("i2t_first", "i2t_last")
    ]
    assert keys["l"].shape == (1, 2, 768)
    torch.testing.assert_close(keys["l"][0], torch.stack(wanted), atol=1e-4, rtol=1e-4)
    assert torch.equal(keys["l"], values["l"])
    assert keys["l"].data_ptr() != values["l"].data_ptr()


def test_an_expression_that_is_no_number_is_left_to_the_prompt(published):
    features = torch.randn(2, 1536)
    told = torch.randn(2, 64)
    told[1] = float("nan")
    both = published.mapping(features, told)["i2t_first"]
    alone = published.mapping(features[1:])["i2t_first"]
    torch.testing.assert_close(both[1:], alone)
    assert not torch.equal(both[:1], published.mapping(features[:1])["i2t_first"])


def test_an_own_file_gives_the_same_encoder_again(tmp_path, faces):
    file = tmp_path / "encoder.safetensors"
    first = small()
    write_face_encoder(first, file, {"steps": 3})
    again = read_face_encoder(file)
    assert (again.family, again.crop, again.position_free, again.class_word) == (
        "sdxl",
        "head",
        False,
        "cat",
    )
    for mine, its in zip(first.predict(faces), again.predict(faces), strict=True):
        assert mine.keys() == its.keys() == {"l", "g"}
        for encoder, width in (("l", 8), ("g", 12)):
            assert its[encoder].shape == (5, 1, width)
            torch.testing.assert_close(mine[encoder], its[encoder], atol=1e-2, rtol=1e-2)
    keys, values = again.predict(faces)
    assert not torch.equal(keys["l"], values["l"])
    assert torch.equal(keys["g"], values["g"])
    assert torch.equal(values["l"], values["l"][:1].expand(5, -1, -1))


def test_there_are_as_many_features_as_announced():
    shape = EncoderShape("cnn", widths=(4, 6))
    faces = torch.randn(3, 3, 112, 112)
    assert shape.build()(faces).shape == (3, shape.features) == (3, 10)
    assert EncoderShape().features == 1536
    assert EncoderShape(**json.loads(json.dumps(shape.as_json()))) == shape


@pytest.mark.parametrize("harm", ("missing", "cut", "another", "width", "nan", "code", "shape"))
def test_a_bad_published_file_is_one_sentence(harm, msid, mapping, tmp_path):
    files = {"msid": tmp_path / "msid.pt", "mapping": tmp_path / "mapping.pt"}
    state = dict(mapping)
    if harm == "width":
        state["i2t_last.fc_out.weight"] = state["i2t_last.fc_out.weight"][:100]
    elif harm == "nan":
        state["null_exp"] = state["null_exp"] / 0 * 0
    elif harm == "another":
        state = {"x": torch.zeros(2)}
    elif harm == "code":
        state = {"x": print}
    elif harm == "shape":
        state = [1, 2]
    torch.save(msid, files["msid"])
    if harm != "missing":
        torch.save(state, files["mapping"])
    if harm == "cut":
        files["mapping"].write_bytes(files["mapping"].read_bytes()[:-100])
    with pytest.raises(SeFiError, match=r"mapping\.pt cannot be used as a face encoder .*: put"):
        read_published(files["msid"], files["mapping"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    (
        ({"format": "other"}, "is a safetensors file, but no face encoder: choose"),
        ({"format_version": "2"}, "update SeFi-IDE to load it"),
        ({"family": "flux"}, "cannot be used as a face encoder"),
        ({"family": "sd1"}, "cannot be used as a face encoder"),
        ({"crop": "feet"}, "cannot be used as a face encoder"),
        ({"outputs": "[]"}, "cannot be used as a face encoder"),
        ({"encoder": '{"kind": "vit"}'}, "cannot be used as a face encoder"),
        ({"encoder": '{"kind": 3, "size": 2}'}, "cannot be used as a face encoder"),
        ({"encoder": '{"kind": "vit", "depth": 1000000000}'}, "cannot be used as a face encoder"),
        ({"encoder": '{"kind": "cnn", "widths": [4, "6"]}'}, "cannot be used as a face encoder"),
    ),
)
def test_a_bad_own_file_is_one_sentence(change, sentence, tmp_path):
    file = tmp_path / "encoder.safetensors"
    write_face_encoder(small(), file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors, file, metadata | change)
    with pytest.raises(SeFiError, match=sentence):
        read_face_encoder(file)


def test_what_a_norm_has_counted_keeps_its_range(tmp_path):
    """Beyond what half precision can say, on both sides."""
    file, made = tmp_path / "encoder.safetensors", small()
    counted = [value for key, value in made.encoder.named_buffers() if "running_var" in key]
    for value, small_or_large in zip(counted, [1e5, 1e-9] * len(counted), strict=False):
        value.fill_(small_or_large)
    write_face_encoder(made, file)
    again = dict(read_face_encoder(file).encoder.named_buffers())
    assert counted
    for key, value in made.encoder.named_buffers():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_has_not_been_learned_is_not_written(tmp_path, value):
    made = small()
    with torch.no_grad():
        next(made.mapping.parameters()).fill_(value)
    with pytest.raises(SeFiError, match="the face encoder has weights .*: train again"):
        write_face_encoder(made, tmp_path / "encoder.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_published_heads_are_the_paper_s():
    shape = EncoderShape()
    parameters = sum(p.numel() for p in Mapping(shape.features, PUBLISHED_OUTPUTS).parameters())
    assert parameters == 2 * (1600 * 1536 + 1536 + 1536**2 + 1536 + 1536 * 768 + 768) + 64
