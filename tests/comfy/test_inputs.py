"""Values that links and JSON bring past the nodes' widgets: one sentence, or the same as absent."""

from __future__ import annotations

import math

import comfy.sd
import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.nodes.attention_map import SeFiAttentionMap
from sefi_ide.nodes.embedding_files import SeFiExportEmbedding, SeFiLoadEmbedding
from sefi_ide.nodes.face_adapter import SeFiApplyFaceAdapter, SeFiLoadFaceAdapter
from sefi_ide.nodes.face_mask import SeFiFaceMask
from sefi_ide.nodes.identity_files import SeFiLoadIdentity, SeFiSaveIdentity
from sefi_ide.nodes.likeness import SeFiLikeness
from sefi_ide.nodes.mix_identities import SeFiMixIdentities
from sefi_ide.nodes.mixed_attention import SeFiMixedAttention
from sefi_ide.nodes.predict_identity import SeFiLoadFaceEncoder, SeFiPredictIdentity
from sefi_ide.nodes.prompt_score import SeFiPromptScore
from sefi_ide.nodes.train_identities import SeFiTrainIdentities
from sefi_ide.nodes.train_identity import SeFiTrainIdentity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.face_adapters import OpenedAdapter
from sefi_ide.sefi_core.comfyui.face_encoders import OpenedEncoder
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face_adapter.files import FACEID, Embedder
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy.vision import vision_model
from sefi_ide.tests.unit.face2diffusion_files import encoder_for
from sefi_ide.tests.unit.face_adapter_files import adapter_for

from .training_runs import HIDDEN, photo_and_mask, run


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(mini_checkpoint, embedding_directory=None)[:3]


@pytest.fixture(scope="module")
def anna(models):
    rows = {"l": class_word_embedding(models[1], "person")["l"][None]}
    return Identity("anna", "person", "sd1", rows, rows)


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strength_k": NAN}, "strength_k is not a number (NaN)"),
        ({"strength_v": math.inf}, "strength_v"),
        ({"strength_v": "1"}, "strength_v is '1'"),
        ({"start_percent": NAN}, "start_percent"),
        ({"end_percent": -0.5}, "end_percent"),
        ({"end_percent": 50}, "end_percent is 50: set it to 1 or less"),
        ({"identity": "anna"}, "identity is a str"),
        ({"identity": None}, "the identity input is empty"),
    ],
)
def test_apply(models, anna, changes, said):
    inputs = {"identity": anna, **changes}
    with pytest.raises(SeFiError, match=r"^SeFi Apply Identity: ") as caught:
        SeFiApplyIdentity.execute(models[0], models[1], **inputs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectory": "none"}, "trajectory is 'none': choose one of own, same"),
        ({"adain_mean": None}, "adain_mean is 'None': choose one of off, keys, values"),
        ({"face_hidden": 7}, "face_hidden is '7': choose one of automatic, off"),
        ({"identity": "me"}, "identity is 'me': choose one of SeFi, other nodes"),
        ({"start_percent": NAN}, "start_percent is not a number (NaN)"),
        ({"end_percent": 50}, "end_percent is 50: set it to 1 or less"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "the range is empty, start_percent 0.6 to"),
        ({"face_mask": torch.ones(1, 4, 4) * NAN}, "face_mask holds values that are not numbers"),
        ({"face_mask": torch.ones(0, 4, 4)}, "face_mask is a batch of no masks"),
    ],
)
def test_mixed_attention(models, changes, said):
    with pytest.raises(SeFiError, match=r"^SeFi Mixed Attention: ") as caught:
        SeFiMixedAttention.execute(models[0], **changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_apply_without_its_optional_inputs(models, anna):
    for inputs in ({}, {"start_percent": None, "end_percent": None}):
        model, clip = SeFiApplyIdentity.execute(models[0], models[1], anna, **inputs).result
        assert model is not models[0] and clip is not models[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 2**31}, "batch_size is 2147483648: set it to 1024 or less"),
        ({"steps": 0}, "steps is 0: set it to 1 or more"),
        ({"steps": 2.5}, "steps is 2.5: set it to a whole number"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": NAN}, "learning_rate"),
        ({"leak_weight": -1.0}, "leak_weight"),
        ({"dtype": "fp8"}, "dtype is 'fp8': choose one of"),
        ({"parametrisation": "magic"}, "parametrisation"),
        ({"identity": "anna"}, "identity is a str"),
        ({"resolution": 2**20}, "resolution"),
        ({"name": "con"}, "con"),  # Windows keeps it for itself, so the file could not be saved
    ],
)
def test_train(models, changes, said):
    with pytest.raises(SeFiError, match=r"^SeFi Train Identity: ") as caught:
        run(models, **changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def optional_inputs() -> set[str]:
    schema = SeFiTrainIdentity.GET_SCHEMA()
    return {one.id for one in schema.inputs if one.optional}


def test_advanced_inputs_are_optional(encoder_folder):
    for node in (
        SeFiTrainIdentity,
        SeFiApplyIdentity,
        SeFiMixIdentities,
        SeFiLoadEmbedding,
        SeFiFaceMask,
        SeFiAttentionMap,
        SeFiLoadFaceEncoder,
        SeFiPredictIdentity,
        SeFiLoadFaceAdapter,
        SeFiApplyFaceAdapter,
    ):
        for one in node.GET_SCHEMA().inputs:
            assert one.optional or not getattr(one, "advanced", False), (node, one.id)


@pytest.mark.parametrize("value", ["missing", None])
def test_train_without_its_optional_inputs(models, value, monkeypatch):
    """As a prompt for the API that was saved before they were there, and as switch nodes give."""
    seen = []
    monkeypatch.setattr(
        "sefi_ide.nodes.train_identity.learn",
        lambda *args, **_: seen.append(args),
    )
    inputs = dict(zip(("model", "clip", "vae"), ([one] for one in models), strict=True))
    inputs |= {"photos": [photo_and_mask()[0]], "name": ["anna"], "class_word": ["person"]}
    inputs |= {"captions": [""], "steps": [3], "seed": [0]}
    if value is None:
        inputs |= {name: [None] for name in optional_inputs()}
    node = SeFiTrainIdentity.PREPARE_CLASS_CLONE(HIDDEN)
    with pytest.raises(AttributeError):  # the stand-in returns nothing
        node.EXECUTE_NORMALIZED(**inputs)
    settings = seen[0][6]
    assert settings.stages == 5 and settings.steps == 3 and settings.vectors == 1
    assert len(settings.templates) == 4 and seen[0][7] is None
    assert [photo.mask for photo in seen[0][3]] == [None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timestep": -1}, "timestep is -1"),
        ({"timestep": 1000}, "timestep is 1000"),
        ({"seed": NAN}, "seed"),
    ],
)
def test_attention_map(models, changes, said):
    inputs = {
        "latent": {"samples": torch.zeros(1, 4, 8, 8)},
        "prompt": "a face",
        "words": "face",
        "timestep": 400,
        "seed": 0,
        **changes,
    }
    with torch.inference_mode(), pytest.raises(SeFiError, match="^SeFi Attention Map: ") as caught:
        SeFiAttentionMap.execute(models[0], models[1], **inputs)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detector": "yolo"}, "detector is 'yolo'"),
        ({"region": "foot"}, "region is 'foot'"),
        ({"which_face": ""}, "which_face"),
        ({"none_found": "smile"}, "none_found"),
        ({"crop_size": 2**31}, "crop_size"),
        ({"crop_margin": NAN}, "crop_margin"),
        ({"face_index": -1}, "face_index"),
    ],
)
def test_face_mask(changes, said):
    inputs = {"image": torch.zeros(1, 64, 64, 3), "detector": "auto", **changes}
    with pytest.raises(SeFiError, match="^SeFi Face Mask: ") as caught:
        SeFiFaceMask.execute(**inputs)
    assert said in str(caught.value)


KINDS = 22


def face_encoder():
    return OpenedEncoder(encoder_for("sd1", {"l": 8}), (("faces.safetensors", "0" * 64),))


def face_adapter():
    return OpenedAdapter(adapter_for(FACEID, "sd1", [8], 8, Embedder(width=10)), "face.safetensors")


def anything(models, anna):
    """One of everything that a link can bring, and the sockets that it fits."""
    model, clip, vae = models
    return (
        (model, {"MODEL"}),
        (clip, {"CLIP"}),
        (vae, {"VAE"}),
        (anna, {"SEFI_IDENTITY"}),
        ({"samples": torch.zeros(1, 4, 8, 8)}, {"LATENT"}),
        ({"samples": [torch.zeros(1, 4, 8, 8)]}, set()),
        ({}, set()),
        (torch.zeros(1, 64, 64, 3), {"IMAGE", "MASK"}),
        (torch.zeros(64, 64, 3), {"MASK"}),
        (torch.zeros(1, 0, 64, 3), set()),
        (torch.zeros(1, 1, 64, 64, 3), set()),
        ("a text", {"STRING", "COMBO"}),
        (None, set()),
        (7, {"INT", "FLOAT"}),
        ([model], set()),
        (object(), set()),
        (vision_model(), {"CLIP_VISION"}),
        ((0.5, 1.0), {"SEFI_LIKENESS"}),
        ((0.5, "high"), set()),
        ("a\ud800text", set()),
        (face_encoder(), {"SEFI_FACE_ENCODER"}),
        (face_adapter(), {"SEFI_FACE_ADAPTER"}),
    )


def good_inputs(models, anna):
    model, clip, vae = models
    loaded = {"model": model, "clip": clip}
    return {
        SeFiApplyIdentity: {
            **loaded,
            "identity": anna,
            "strength_k": 1.0,
            "strength_v": 1.0,
            "stage_strengths": "1, 0.5",
        },
        SeFiAttentionMap: {
            **loaded,
            "latent": {"samples": torch.zeros(1, 4, 8, 8)},
            "prompt": "a face",
            "words": "face",
            "timestep": 400,
            "seed": 0,
            "image": torch.zeros(1, 64, 64, 3),
        },
        SeFiTrainIdentity: {
            **loaded,
            "vae": vae,
            "photos": photo_and_mask()[0],
            "masks": photo_and_mask()[1],
            "name": "anna",
            "class_word": "person",
            "captions": "",
            "templates": "a photo of <name>",
            "identity": anna,
            "steps": 1,
            "seed": 0,
        },
        SeFiTrainIdentities: {
            **loaded,
            "vae": vae,
            "photos": photo_and_mask()[0],
            "masks": photo_and_mask()[1],
            "names": "anna",
            "folder": "",
            "class_word": "person",
            "captions": "",
            "templates": "a photo of <name>",
            "steps": 1,
        },
        SeFiMixedAttention: {"model": model, "face_mask": torch.ones(1, 8, 8)},
        SeFiFaceMask: {"image": torch.zeros(1, 64, 64, 3), "detector": "auto"},
        SeFiSaveIdentity: {"identity": anna, "file_name": "", "if_exists": "error"},
        SeFiLikeness: dict.fromkeys(
            ("reference", "images", "training_photo"), torch.zeros(1, 64, 64, 3)
        ),
        SeFiPromptScore: {
            "clip": clip,
            "clip_vision": vision_model(),
            "images": torch.zeros(1, 64, 64, 3),
            "prompts": "a face",
            "likeness": (0.5,),
            "identity": anna,
        },
        SeFiMixIdentities: {
            "first": anna,
            "second": anna,
            "ratio_k": 0.5,
            "ratio_v": 0.5,
            "name": "",
            "class_word": "",
        },
        SeFiExportEmbedding: {"identity": anna, "file_name": "", "if_exists": "error"},
        SeFiLoadEmbedding: {"file": "anna.pt", "class_word": "person", "name": ""},
        SeFiLoadIdentity: {"file": "anna.safetensors", "name": ""},
        SeFiLoadFaceEncoder: {"file": "faces.safetensors", "mapping": "auto"},
        SeFiPredictIdentity: {
            "face_encoder": face_encoder(),
            "photos": photo_and_mask()[0],
            "masks": photo_and_mask()[1],
            "expression": photo_and_mask()[0],
            "name": "anna",
            "class_word": "",
        },
        SeFiLoadFaceAdapter: {"file": "face.safetensors", "variant": "auto"},
        SeFiApplyFaceAdapter: {
            "model": model,
            "face_adapter": face_adapter(),
            "photos": photo_and_mask()[0],
            "masks": photo_and_mask()[1],
            "clip_vision": vision_model(),
            "region": photo_and_mask()[1],
            "weights": "1",
            "strength": 1.0,
        },
    }


@pytest.mark.parametrize("value", range(KINDS))
def test_anything_at_every_socket(models, anna, value, folder, encoder_folder, monkeypatch):
    """One sentence that names the node, the input and what to connect."""
    monkeypatch.setattr("sefi_ide.nodes.train_identity.learn", None)  # never reached
    everything = anything(models, anna)
    assert len(everything) == KINDS
    came, fits = everything[value]
    tried = 0
    for node, inputs in good_inputs(models, anna).items():
        schema = node.GET_SCHEMA()
        for one in schema.inputs:
            kind = one.get_io_type()
            if kind in fits or kind in ("INT", "FLOAT", "COMBO") or one.id not in inputs:
                continue
            if came is None and one.optional:
                continue
            given = {**inputs, one.id: came}
            if schema.is_input_list:
                given = {name: [value] for name, value in given.items()}
            with torch.inference_mode(), pytest.raises(SeFiError) as caught:
                node.PREPARE_CLASS_CLONE(HIDDEN).EXECUTE_NORMALIZED(**given)
            said = str(caught.value)
            assert said.startswith(f"{schema.display_name}: "), said
            start, _, remedy = said.removeprefix(f"{schema.display_name}: ").partition(": ")
            assert one.id in start and remedy, said
            assert "connect" in remedy or "write" in remedy
            tried += 1
    assert tried > 10


def test_lists_that_are_empty_at_a_node_that_takes_lists(models, anna):
    inputs = {name: [value] for name, value in good_inputs(models, anna)[SeFiTrainIdentity].items()}
    for name in ("model", "clip", "vae", "photos", "name", "class_word", "captions"):
        with pytest.raises(SeFiError, match=f"^SeFi Train Identity: the {name} input is empty: "):
            SeFiTrainIdentity.PREPARE_CLASS_CLONE(HIDDEN).EXECUTE_NORMALIZED(**{**inputs, name: []})


@pytest.mark.parametrize("if_exists", ["", "ask", None, 7, ["error"]])
def test_save_with_an_unknown_choice(anna, folder, if_exists):
    with pytest.raises(SeFiError, match="^SeFi Save Identity: if_exists is .*: choose one of new"):
        SeFiSaveIdentity.execute(anna, "", if_exists)
    assert not folder.exists()
