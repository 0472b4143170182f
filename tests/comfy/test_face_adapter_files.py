"""Files of face adapters: the LoRA inside, the face recogniser they name, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import comfy.lora
import comfy.sd
import folder_paths
import pytest
import torch
from sefi_ide.nodes.face_adapter import SeFiApplyFaceAdapter, SeFiLoadFaceAdapter
from sefi_ide.sefi_core.comfyui.face_adapters import OpenedAdapter
from sefi_ide.sefi_core.comfyui.unet.adapter import BESIDE_KEY
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face_adapter.files import (
    INFINITE_ID,
    PLUS_V2,
    PORTRAIT,
    Embedder,
    write_face_adapter,
)
from sefi_ide.sefi_core.faces.alignment import aligned
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.tests.comfy import adapting
from sefi_ide.tests.comfy.adapter_oracle import attentions
from sefi_ide.tests.comfy.adapting import LEFT, apply, close, differs, draw
from sefi_ide.tests.comfy.composition import VISIBLE
from sefi_ide.tests.comfy.random_checkpoint import of_all_families, of_families
from sefi_ide.tests.comfy.vision import vision_model
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tests.unit.recognition_models import save_recogniser

pytestmark = pytest.mark.usefixtures("inference_mode")

photos, embedder, vision = adapting.photos, adapting.embedder, adapting.vision
made, oracle = adapting.made, adapting.oracle


def merged(checkpoint, opened):
    """A fresh model with the LoRA added to its weights."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(checkpoint, embedding_directory=None)
    unet = model.model.diffusion_model
    unet.to(torch.float64).dtype = torch.float64
    cross = attentions(unet)
    names = {module: name for name, module in unet.named_modules()}
    for (number, place), (down, up) in opened.adapter.lora.items():
        block = names[cross[number]].removesuffix("attn2")
        layer = unet.get_submodule(block + place)
        layer = layer[0] if place.endswith("to_out") else layer
        layer.weight += (up.double() @ down.double()).to(layer.weight)
    return model


@of_all_families
def test_the_lora_inside_is_loaded_once(setting, mini_checkpoint, made, oracle, photos, caplog):
    caplog.set_level("INFO", logger="sefi_ide.sefi_core.comfyui.face_adapters")
    opened = made(rank=2)
    bare = OpenedAdapter(replace(opened.adapter, lora={}), opened.name)
    dense = merged(mini_checkpoint, opened)
    expected = draw(apply(dense, bare, photos, region=LEFT), setting.plain, setting.noise)
    once = apply(setting.plain.model, opened, photos, region=LEFT)
    close(draw(once, setting.plain, setting.noise), expected)
    without = apply(setting.plain.model, opened, photos, region=LEFT, lora_strength=0.0)
    assert not without.patches
    differs(draw(without, setting.plain, setting.noise), expected, VISIBLE / 10)
    assert not any("has the LoRA" in line for line in caplog.messages)

    twice = apply(once, opened, photos, region=1 - LEFT)
    assert {len(patches) for patches in twice.patches.values()} == {1}
    assert sum("has the LoRA of made.safetensors" in line for line in caplog.messages) == 1
    both = draw(twice, setting.plain, setting.noise)
    everywhere = draw(apply(dense, bare, photos), setting.plain, setting.noise)
    close(both, everywhere)

    # The separate file, as Load LoRA loads it.
    keys = comfy.lora.model_lora_keys_unet(setting.plain.model.model, {})
    named = {}
    for name, key in keys.items():
        if name.startswith("diffusion_model."):
            named.setdefault(key, name)
    paths = {module: path for path, module in setting.plain.model.model.named_modules()}
    order = attentions(setting.plain.model.model.diffusion_model)
    file = {}
    for (number, place), (down, up) in opened.adapter.lora.items():
        block = paths[order[number]].removesuffix("attn2")
        key = f"{block}{place}.0.weight" if place.endswith("out") else f"{block}{place}.weight"
        file[f"{named[key]}.lora_down.weight"] = down.half()
        file[f"{named[key]}.lora_up.weight"] = up.half()
    loaded = comfy.sd.load_lora_for_models(setting.plain.model, None, file, 1.0, 0)[0]
    again = apply(loaded, opened, photos, region=LEFT)
    assert {len(patches) for patches in again.patches.values()} == {1}
    close(draw(again, setting.plain, setting.noise), expected, 1e-3)


@of_families("sd1")
def test_insightfaces_recogniser(setting, made, tmp_path, monkeypatch):
    """The very file that the adapter names, on an aligned face, of length 1 or as it is."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    picture = drawn(96)
    (face,) = YuNetDetector().detect(picture)
    seen = (aligned(picture, face.points).astype(float) - 127.5) / 127.5
    image = torch.from_numpy(picture)[None].float() / 255
    seen_mean = torch.from_numpy(seen.mean((0, 1))).float()
    pack = tmp_path / "insightface" / "models" / "buffalo_l"
    save_recogniser(pack / "w600k_mbf.onnx")
    for unit in (True, False):
        opened = made(embedder=Embedder("insightface", "w600k_r50.onnx", 3, unit))
        given = {"model": [setting.plain.model], "face_adapter": [opened], "photos": [image]}
        if not (pack / "w600k_r50.onnx").exists():
            with pytest.raises(SeFiError, match="sees faces with w600k_r50.onnx, which was not"):
                SeFiApplyFaceAdapter.execute(**given)
            save_recogniser(pack / "w600k_r50.onnx")
        model, faces = SeFiApplyFaceAdapter.execute(**given).result
        assert faces.shape == (1, 112, 112, 3)
        wanted = seen_mean / seen_mean.norm() if unit else seen_mean
        tokens = opened.adapter.tokens(wanted.view(1, 1, 3), None)[0]
        (beside,) = model.model_options["transformer_options"][BESIDE_KEY]
        layers = list(beside.layers.values())
        torch.testing.assert_close(
            layers[0][0][0], tokens @ opened.adapter.layers[0].to_k.T, atol=1e-3, rtol=1e-3
        )
    short = made(embedder=Embedder("insightface", "w600k_r50.onnx", 4))
    with pytest.raises(SeFiError, match="gives 3 numbers and this adapter takes 4: put the model"):
        SeFiApplyFaceAdapter.execute([setting.plain.model], [short], [image])


@of_families("sd1")
def test_what_does_not_fit_is_one_sentence(setting, made, photos, vision, embedder, encoder_folder):
    good = made()
    adapter = good.adapter
    blank = torch.zeros(1, 64, 64, 3)

    def named(**changes):
        return OpenedAdapter(replace(adapter, **changes), "x.safetensors")

    for opened, settings, said in (
        (named(family="sdxl"), {}, "is a face adapter for SDXL and model is SD 1.x: load"),
        (named(layers=adapter.layers[:-1]), {}, "layers of other sizes than the 7 of model"),
        (named(layers=adapter.layers[::-1]), {}, "layers of other sizes"),
        (good, {"weights": "1, 2"}, "weights has more than 1 entries for 1 photos"),
        (good, {"strength": float("nan")}, "strength is not a number"),
        (good, {"start_percent": 0.5, "end_percent": 0.5}, "the range is empty"),
        (good, {"text": "no"}, "text is 'no': set it to true or false"),
        (good, {"region": torch.full((1, 2, 2), float("nan"))}, "region holds values"),
        (made(PLUS_V2), {}, r"clip_vision is empty and this adapter \(plus v2\) looks at"),
        (named(embedder=replace(embedder, file="no.safetensors")), {}, "encoder no.safetensors"),
        (named(embedder=replace(embedder, sha256="0" * 64)), {}, "is another file than the one"),
        (named(embedder=replace(embedder, width=9)), {}, "gives 10 numbers and this adapter takes"),
        (good, {"photos": blank, "masks": None, "detector": "yunet"}, "no face was found in photo"),
    ):
        with pytest.raises(SeFiError, match=said) as caught:
            apply(setting.plain.model, opened, photos, **settings)
        assert str(caught.value).startswith("SeFi Apply Face Adapter: ")
        assert "\n" not in str(caught.value)
    six = photos[0].repeat(2, 1, 1, 1), photos[1].repeat(2, 1, 1)
    with pytest.raises(SeFiError, match="there are 6 photos, and this adapter sees 5"):
        apply(setting.plain.model, made(PORTRAIT), six, 6)
    picture = torch.from_numpy(drawn(96))[None].float() / 255
    with pytest.raises(SeFiError, match="clip_vision gives 128 numbers and this adapter takes 64"):
        apply(
            setting.plain.model, made(INFINITE_ID), photos, photos=picture, masks=None,
            clip_vision=vision_model(hidden_size=128),
        )  # fmt: skip


@of_families("sd1")
def test_files_of_both_folders(setting, made, photos, tmp_path, monkeypatch):
    ours, others = tmp_path / "face_adapters", tmp_path / "ipadapter"
    ours.mkdir(), others.mkdir()
    names = folder_paths.folder_names_and_paths
    monkeypatch.setitem(names, "face_adapters", ([str(ours)], {".safetensors", ".bin"}))
    monkeypatch.setitem(names, "ipadapter", ([str(others)], {".safetensors", ".bin"}))
    with pytest.raises(SeFiError, match="there is no face adapter in .*: put a FaceID file"):
        SeFiLoadFaceAdapter.execute("")
    write_face_adapter(made().adapter, ours / "one.safetensors")
    write_face_adapter(made(seed=8).adapter, others / "two.safetensors")
    schema = SeFiLoadFaceAdapter.GET_SCHEMA()
    assert schema.inputs[0].options == ["one.safetensors", "two.safetensors"]
    (opened,) = SeFiLoadFaceAdapter.execute("two.safetensors").result
    assert opened.name == "two.safetensors"
    model = apply(setting.plain.model, opened, photos)
    differs(
        draw(model, setting.plain, setting.noise),
        draw(setting.plain.model, setting.plain, setting.noise),
    )
    assert SeFiLoadFaceAdapter.validate_inputs("two.safetensors") is True
    assert "is not in" in str(SeFiLoadFaceAdapter.validate_inputs("three.bin"))
    before = SeFiLoadFaceAdapter.fingerprint_inputs("two.safetensors")
    write_face_adapter(made(seed=9).adapter, others / "two.safetensors")
    assert SeFiLoadFaceAdapter.fingerprint_inputs("two.safetensors") != before
    with pytest.raises(SeFiError, match="^SeFi Load Face Adapter: variant is 'x'"):
        SeFiLoadFaceAdapter.execute("two.safetensors", "x")
