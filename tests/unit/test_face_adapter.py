"""Files and networks of face adapters, against what is computed from their tensors by hand."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face_adapter.files import (
    FACEID,
    PLUS,
    PLUS_V2,
    PORTRAIT,
    UNNORM,
    VARIANTS,
    Embedder,
    in_file_order,
    read_face_adapter,
    write_face_adapter,
)
from sefi_ide.sefi_core.face_adapter.mixing import mixed, parse_weights
from sefi_ide.tests.unit.face_adapter_files import (
    FACE,
    LAYERS,
    PUBLISHED,
    WIDTHS,
    adapter_for,
    published_tensors,
)

NAMES = {
    FACEID: "ip-adapter-faceid_{}",
    PORTRAIT: "ip-adapter-faceid-portrait_{}",
    PLUS: "ip-adapter-faceid-plus_{}",
    PLUS_V2: "ip-adapter-faceid-plusv2_{}",
    UNNORM: "ip-adapter-faceid-portrait_{}_unnorm",
}
KINDS = [
    *((variant, "sd1") for variant in PUBLISHED if variant != UNNORM),
    *((variant, "sdxl") for variant in PUBLISHED),
    (FACEID, "sd2"),
]


def normed(x, tensors, name):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(x, tensors, name):
    x = x @ tensors[f"{name}.weight"].T
    return x + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else x


def perceived(tokens, sequence, tensors, prefix, depth):
    seen = linear(sequence, tensors, f"{prefix}proj_in")
    for layer in (f"{prefix}layers.{n}." for n in range(depth)):
        own = normed(tokens, tensors, f"{layer}0.norm2")
        both = torch.cat([normed(seen, tensors, f"{layer}0.norm1"), own], dim=1)
        key, value = linear(both, tensors, f"{layer}0.to_kv").chunk(2, -1)
        query = linear(own, tensors, f"{layer}0.to_q")
        heads = []
        for start in range(0, query.shape[-1], 64):
            one = slice(start, start + 64)
            scores = query[..., one] @ key[..., one].transpose(1, 2) / math.sqrt(64)
            heads.append(scores.softmax(-1) @ value[..., one])
        tokens = tokens + linear(torch.cat(heads, -1), tensors, f"{layer}0.to_out")
        thought = gelu(linear(normed(tokens, tensors, f"{layer}1.0"), tensors, f"{layer}1.1"))
        tokens = tokens + linear(thought, tensors, f"{layer}1.3")
    return normed(linear(tokens, tensors, f"{prefix}proj_out"), tensors, f"{prefix}norm_out")


def expected_tokens(variant, tensors, faces, states, width):
    tensors = {key.removeprefix("image_proj."): value for key, value in tensors.items()}
    if variant == UNNORM:
        latents = tensors["latents"].expand(len(faces), -1, -1)
        return perceived(latents, faces, tensors, "", 1)
    tokens = linear(gelu(linear(faces, tensors, "proj.0")), tensors, "proj.2")
    tokens = normed(tokens.reshape(len(faces), -1, width), tensors, "norm")
    if variant in (PLUS, PLUS_V2):
        found = perceived(tokens, states, tensors, "perceiver_resampler.", 1)
        return found if variant == PLUS else tokens + found
    return tokens


@pytest.mark.parametrize(("variant", "family"), KINDS)
def test_a_published_file(tmp_path, variant, family):
    """Its variant and family are told, and its tokens are those of the formula."""
    tensors = published_tensors(variant, family, rank=2 if variant == FACEID else 0)
    path = tmp_path / (NAMES[variant].format(family) + ".safetensors")
    safetensors.torch.save_file(tensors, path)
    adapter = read_face_adapter(path)
    assert (adapter.variant, adapter.family) == (variant, family)
    assert adapter.embedder == Embedder("insightface", "w600k_r50.onnx", 512, variant != UNNORM)
    generator = torch.Generator().manual_seed(3)
    people = 3 if adapter.takes_several else 1
    faces = torch.randn(2, people, FACE, generator=generator)
    states = torch.randn(2, 9, 1280, generator=generator) if adapter.looks_at_pictures else None
    found = adapter.tokens(faces, states)
    wanted = expected_tokens(variant, tensors, faces, states, WIDTHS[family])
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    assert len(adapter.layers) == LAYERS[family]
    for number, layer in enumerate(adapter.layers):
        assert torch.equal(layer.to_k, tensors[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"])
        assert torch.equal(layer.to_v, tensors[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"])
    assert len(adapter.lora) == (8 * LAYERS[family] if variant == FACEID else 0)
    for (number, name), lora in adapter.lora.items():
        place = 2 * number + int(name[4]) - 1
        prefix = f"ip_adapter.{place}.{name.partition('.')[2]}_lora"
        assert torch.equal(lora.down, tensors[f"{prefix}.down.weight"])
        assert torch.equal(lora.up, tensors[f"{prefix}.up.weight"])


def test_bin_files_and_the_other_names_of_keys(tmp_path):
    tensors = published_tensors(FACEID, "sd1")
    whole = read_face_adapter(saved(tmp_path / "a.safetensors", tensors))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    torch.save(parts, tmp_path / "b.bin")
    renamed = {
        key.replace("image_proj.", "image_proj_model.").replace(
            "ip_adapter.", "adapter_modules."
        ): v
        for key, v in tensors.items()
    }
    for path in (tmp_path / "b.bin", saved(tmp_path / "c.safetensors", renamed)):
        again = read_face_adapter(path)
        faces = torch.ones(1, 1, FACE)
        assert torch.equal(again.tokens(faces, None), whole.tokens(faces, None))
        for one, other in zip(again.layers, whole.layers, strict=True):
            assert torch.equal(one.to_k, other.to_k) and torch.equal(one.to_v, other.to_v)


def saved(path, tensors, metadata=None):
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def test_plus_and_plus_v2_are_told_by_name_or_asked_for(tmp_path):
    tensors = published_tensors(PLUS, "sd1")
    for name, variant in (
        ("ip-adapter-faceid-plusv2_sd15", PLUS_V2),
        ("IP-Adapter-FaceID-Plus_V2", PLUS_V2),
        ("ip-adapter-faceid-plus_sd15", PLUS),
    ):
        assert (
            read_face_adapter(saved(tmp_path / f"{name}.safetensors", tensors)).variant == variant
        )
    renamed = saved(tmp_path / "mine.safetensors", tensors)
    with pytest.raises(SeFiError, match="plus or plus v2 adapter, .*: set variant"):
        read_face_adapter(renamed)
    assert read_face_adapter(renamed, PLUS_V2).variant == PLUS_V2


SMALL = Embedder("sefi", "faces.safetensors", 10, False, "ab" * 32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_own_file_is_the_same_again(tmp_path, variant, family):
    made = adapter_for(variant, family, [8, 16, 8], 24, SMALL, states=20, rank=2)
    write_face_adapter(made, tmp_path / "own.safetensors", {"steps": 3})
    again = read_face_adapter(tmp_path / "own.safetensors")
    assert (again.variant, again.family, again.embedder) == (variant, family, SMALL)
    faces, states = torch.ones(2, 1, 10), torch.ones(2, 5, 20)
    torch.testing.assert_close(again.tokens(faces, states), made.tokens(faces, states))
    assert [layer.to_k.shape[0] for layer in again.layers] == [8, 16, 8]
    for one, other in zip(again.layers, made.layers, strict=True):
        torch.testing.assert_close(one.to_v, other.to_v)
    assert set(again.lora) == set(made.lora) and len(again.lora) == 24


def test_the_order_of_a_file():
    """Written down from IP-Adapter's files; the middle is last."""
    sd1 = [("input", n, 0) for n in (1, 2, 4, 5, 7, 8)]
    sd1 += [("output", n, 0) for n in range(3, 12)] + [("middle", 0, 0)]
    assert in_file_order(sorted(sd1)) == sd1
    sdxl = [
        ("input", n, i) for n, depth in ((4, 2), (5, 2), (7, 10), (8, 10)) for i in range(depth)
    ]
    sdxl += [
        ("output", n, i)
        for n, depth in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2))
        for i in range(depth)
    ]
    sdxl += [("middle", 0, i) for i in range(10)]
    assert in_file_order(sorted(sdxl)) == sdxl
    numbers = {block: 2 * n + 1 for n, block in enumerate(sdxl)}
    assert numbers["input", 8, 0] == 29 and numbers["output", 3, 0] == 109
    assert numbers["middle", 0, 9] == 139


def without(tensors, *starts):
    return {key: value for key, value in tensors.items() if not key.startswith(starts)}


BROKEN = {
    "no layers": (lambda t: without(t, "ip_adapter."), "is no face adapter"),
    "no projection": (lambda t: without(t, "image_proj."), "is no face adapter"),
    "a picture's adapter": (
        lambda t: without(t, "image_proj.") | {"image_proj.proj.weight": torch.ones(8, 8)},
        "is no face adapter",
    ),
    "a layer is missing": (lambda t: without(t, "ip_adapter.7."), r"ip_adapter\.7\.to_k_ip"),
    "the last layer is missing": (lambda t: without(t, "ip_adapter.31."), "15 layers for tokens"),
    "no values": (lambda t: without(t, "ip_adapter.9.to_v"), r"ip_adapter\.9 has no"),
    "narrow layer": (
        lambda t: t | {"ip_adapter.3.to_k_ip.weight": torch.ones(8, 700)},
        r"ip_adapter\.3 takes tokens of 700 and 768 numbers",
    ),
    "layer of self-attention": (
        lambda t: t | {"ip_adapter.4.to_k_ip.weight": torch.ones(8, 768)},
        r"ip_adapter\.4\.to_k_ip\.weight is not as",
    ),
    "other embedding": (
        lambda t: t
        | {"image_proj.proj.0.weight": torch.ones(512, 256),
           "image_proj.proj.0.bias": torch.ones(512),
           "image_proj.proj.2.weight": torch.ones(4 * 768, 512)},
        "takes embeddings of 256 numbers",
    ),
    "other bias": (
        lambda t: t | {"image_proj.proj.0.bias": torch.ones(3)},
        "the tensors of image_proj are others",
    ),
    "no bias": (lambda t: without(t, "image_proj.norm.bias"), "the tensors of image_proj"),
    "odd width": (
        lambda t: t | {"image_proj.proj.2.weight": torch.ones(5, 1024)},
        "the tensors of image_proj",
    ),
    "half a LoRA": (
        lambda t: t | {"ip_adapter.2.to_q_lora.down.weight": torch.ones(2, 8)},
        r"LoRA at block 1 \(attn1\.to_q\) is not whole",
    ),
    "a projection that ends early": (
        lambda t: without(t, "image_proj.proj.2."), "cannot be used as a face adapter",
    ),
    "a norm without a side": (
        lambda t: t | {"image_proj.norm.weight": torch.tensor(1.0)}, "cannot be used",
    ),
    "a resampler without sides": (
        lambda t: without(t, "image_proj.")
        | {"image_proj.latents": torch.ones(1, 4, 8),
           "image_proj.proj_in.weight": torch.tensor(1.0)},
        "cannot be used",
    ),
    "more layers than memory": (
        lambda t: t | {"image_proj.perceiver_resampler.layers.3000.0.norm1.weight": torch.ones(8)},
        "is a FaceID plus or plus v2|cannot be used|tensors of image_proj",
    ),
    "a layer far away": (
        lambda t: t | {f"ip_adapter.{'9' * 5000}.to_k_ip.weight": torch.ones(8, 768)},
        None,  # it is no layer, and the others are whole
    ),
    "not a number": (
        lambda t: t | {"image_proj.norm.bias": torch.full((768,), float("nan"))},
        "values that are not numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gets_one_sentence(tmp_path, case):
    change, said = BROKEN[case]
    path = saved(tmp_path / "x.safetensors", change(published_tensors(FACEID, "sd1")))
    if said is None:
        assert len(read_face_adapter(path).layers) == 16
        return
    with pytest.raises(SeFiError, match=said) as caught:
        read_face_adapter(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_truncated_foreign_and_newer_files(tmp_path):
    path = saved(tmp_path / "whole.safetensors", published_tensors(FACEID, "sd1"))
    content = path.read_bytes()
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        for name in ("cut.safetensors", "cut.bin"):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(SeFiError, match="cannot be used as a face adapter .*: put a fresh"):
                read_face_adapter(tmp_path / name)
    torch.save({"image_proj": {"a": object}}, tmp_path / "code.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({5: torch.ones(1)}, tmp_path / "numbers.bin")
    for name in ("code.bin", "list.bin", "numbers.bin"):
        with pytest.raises(SeFiError, match="cannot be used as a face adapter"):
            read_face_adapter(tmp_path / name)
    made = adapter_for(FACEID, "sd1", [8], 24, SMALL)
    write_face_adapter(made, tmp_path / "own.safetensors")
    with safetensors.safe_open(tmp_path / "own.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for changes, said in (
        ({"format_version": "2"}, "has format version '2' .*: update SeFi-IDE"),
        ({"family": "sd9"}, "sd9"),
        ({"variant": "face"}, "cannot be used"),
        ({"embedder": "{}x"}, "cannot be used"),
        ({"embedder": '{"kind": "dlib", "file": "x", "width": 10}'}, "dlib"),
        ({"embedder": '{"file": "/etc/x.onnx"}'}, "no file's name"),
        ({"embedder": '{"file": "../x.onnx"}'}, "no file's name"),
        ({"embedder": '{"file": "\\\\\\\\host\\\\x.onnx"}'}, "no file's name"),
        ({"embedder": '{"kind": "sface", "file": "C:x.onnx"}'}, "no file's name"),
        ({"embedder": '{"file": 5}'}, "without a file"),
        ({"embedder": '{"unit": "no"}'}, "not told"),
        ({"embedder": '{"width": -4}'}, "-4 numbers"),
    ):
        other = saved(tmp_path / "other.safetensors", tensors, {**metadata, **changes})
        with pytest.raises(SeFiError, match=said):
            read_face_adapter(other)


def test_eight_bit_weights_are_read(tmp_path):
    tensors = published_tensors(FACEID, "sd1")
    name = "ip_adapter.1.to_k_ip.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    found = read_face_adapter(saved(tmp_path / "x.safetensors", tensors))
    assert torch.equal(found.layers[0].to_k, tensors[name].float())


def test_what_has_not_been_learned_is_not_written(tmp_path):
    made = adapter_for(FACEID, "sd1", [8], 24, SMALL)
    for value in (float("nan"), 1e6):
        with torch.no_grad():
            next(made.projection.parameters()).fill_(value)
        with pytest.raises(SeFiError, match="the face adapter has weights .*: train again"):
            write_face_adapter(made, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights():
    assert parse_weights("", 3) == ()
    assert parse_weights("1, 0.5", 2) == (1.0, 0.5)
    for text, said in (
        ("1", "weights has 1 entries for 2 photos: write"),
        ("1, 2, 3", "weights has more than 2 entries"),
        ("0 0", "weights are all 0"),
        ("-1, 1", "a number of weights is -1"),
        ("one, 2", "weights has 'one' where a number is needed"),
        ("nan, 1", "not a number"),
    ):
        with pytest.raises(SeFiError, match=said):
            parse_weights(text, 2)


def test_embeddings_are_averaged_by_their_weights():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(mixed(rows, ()), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(mixed(rows, (3.0, 1.0)), torch.tensor([[0.75, 0.25]]))
    unit = mixed(rows, (3.0, 1.0), unit=True)
    torch.testing.assert_close(unit, torch.tensor([[3.0, 1.0]]) / math.sqrt(10))
    assert torch.equal(mixed(rows, (0.0, 2.0), unit=True), rows[1:])
    with pytest.raises(SeFiError, match="cancel each other out"):
        mixed(torch.stack([rows[0], -rows[0]]), (), unit=True)
