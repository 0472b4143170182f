"""SeFi Train Identity with ComfyUI's real MODEL, CLIP and VAE, as the executor runs it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.nodes.face_mask import SeFiFaceMask
from sefi_ide.nodes.identity_files import SeFiLoadIdentity, SeFiSaveIdentity
from sefi_ide.nodes.train_identity import SeFiTrainIdentity
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.learning import pace
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.file import read_identity, to_bytes
from sefi_ide.sefi_core.identity.identity import Identity

import nodes as comfy_nodes

from . import random_checkpoint
from .training_runs import CHANNELS, HIDDEN, WIDTH, load, photo_and_mask, run, same


def sample(model, clip, prompt: str) -> torch.Tensor:
    """Latents of a prompt after three sampler steps."""
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")
    )
    latent = {"samples": torch.zeros(1, CHANNELS, 8, 8)}
    return comfy_nodes.common_ksampler(
        model, 1, 3, 4.0, "euler", "normal", positive, negative, latent
    )[0]["samples"]


# --- the schema -------------------------------------------------------------------------------


def test_a_newcomer_sees_only_what_matters():
    schema = SeFiTrainIdentity.GET_SCHEMA()
    plain = {one.id for one in schema.inputs if not getattr(one, "advanced", None)}
    sockets = {"model", "clip", "vae", "photos", "masks", "identity"}
    assert plain == sockets | {"name", "class_word", "captions", "steps", "seed"}
    # Prompts that were saved before an advanced input was there go on working.
    advanced = {one.id for one in schema.inputs if getattr(one, "advanced", None)}
    optional = {one.id for one in schema.inputs if getattr(one, "optional", False)}
    assert optional == advanced | {"masks", "identity"} and "vectors" in advanced
    # Saved workflows list values by position: what is new comes last.
    new = ["vectors", "background_target", "predicted_steps", "predicted_learning_rate"]
    assert [one.id for one in schema.inputs[-4:]] == new
    assert all(one.tooltip for one in [*schema.inputs, *schema.outputs])
    assert [one.io_type for one in schema.outputs] == ["SEFI_IDENTITY", "LOSS_MAP", "IMAGE"]


def test_queueing_again_does_not_change_the_seed():
    info = SeFiTrainIdentity.GET_NODE_INFO_V1()
    options = info["input"]["required"]["seed"][1]
    assert options["control_after_generate"] is False


# --- what comes out ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


@pytest.fixture(scope="module")
def trained(models):
    image, mask = photo_and_mask()
    return run(models, [image], [mask], steps=10, seed=11, name="anna")


def test_the_outputs(trained):
    identity, losses, report = trained
    assert identity.placeholder == "<anna>" and identity.class_word == "person"
    assert identity.family == "sd1" and identity.stages == 5 and identity.widths == {"l": WIDTH}
    assert len(losses["loss"]) == 10 and all(isinstance(loss, float) for loss in losses["loss"])
    assert report.ndim == 4 and report.shape[0] == 1 and report.shape[3] == 3
    assert report.min() >= 0 and report.max() <= 1 and report.std() > 0.05
    assert identity.training["steps"] == 10 and identity.training["seed"] == 11
    assert identity.thumbnail is not None
    assert len(to_bytes(identity)) < 60_000


def test_every_stage_of_k_and_v_was_trained(models, trained):
    start = run(models, steps=1, learning_rate=1e-6)[0]
    for role in ("key_vectors", "value_vectors"):
        part, before = (getattr(one, role)["l"] for one in (trained[0], start))
        changes = (part - before).flatten(1).norm(dim=1)
        assert (changes > 1e-3).all()


def test_the_same_seed_gives_the_same_identity_whatever_the_global_random_state(models, trained):
    image, mask = photo_and_mask()
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    arguments = {"steps": 10, "name": "anna", "preview_every": 4}
    again = run(models, [image], [mask], seed=11, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(again[0], trained[0])
    assert again[1] == trained[1]
    assert torch.equal(again[2], trained[2])
    other = run(models, [image], [mask], seed=12, **{**arguments, "steps": 1})[0]
    assert not same(other, trained[0])


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(models):
    """The same seed draws the same noise, so losses compare step by step."""
    arguments = {"seed": 3, "steps": 20, "attention_weight": 0.0}
    arguments["learning_rate"] = 0.02
    still = run(models, **{**arguments, "learning_rate": 1e-6})[1]["loss"]
    first, losses, _ = run(models, **arguments)
    _, resumed, _ = run(models, identity=first, **arguments)
    mean = [sum(history) / len(history) for history in (still, losses["loss"], resumed["loss"])]
    assert mean[2] < mean[1] < mean[0]
    assert losses["loss"][0] == still[0] != resumed["loss"][0]
    kept = run(models, identity=first, steps=1, learning_rate=1e-6)[0]
    torch.testing.assert_close(kept.key_vectors["l"], first.key_vectors["l"], rtol=0, atol=1e-5)


def test_photos_as_a_list_of_sizes_with_masks_and_class_words_of_several_tokens(models):
    pairs = [photo_and_mask(80, 64), photo_and_mask(70, 150)]
    identity, losses, _ = run(
        models,
        [image for image, _ in pairs],
        [mask for _, mask in pairs],
        class_word="very old person",
        stages=3,
        batch_size=2,
        background_weight=0.2,
        parametrisation="self-attention",
        learning_rate=1e-3,
        gradient_checkpointing=True,
        templates="a photo of <name>\n\n  <name> at the beach  \n",
    )
    assert identity.key_vectors["l"].shape == (3, 3, WIDTH)
    assert identity.class_word == "very old person"
    assert all(loss == loss for loss in losses["loss"])


def test_several_vectors_per_token_start_alike_and_part(models):
    """The class word's rows, the last one repeated, as its tokens are in the prompt."""
    first = run(models, steps=1, learning_rate=1e-6, vectors=3, class_word="old person")[0]
    assert first.key_vectors["l"].shape == (5, 3, WIDTH)
    word = class_word_embedding(models[1], "old person")["l"]
    assert len(word) == 2
    expected = word[[0, 1, 1]].expand(5, -1, -1)
    torch.testing.assert_close(first.key_vectors["l"], expected, rtol=0, atol=1e-5)
    later = run(models, steps=10, vectors=3, class_word="old person")[0]
    assert later.training["vectors"] == 3
    for role in ("key_vectors", "value_vectors"):
        rows = getattr(later, role)["l"] - expected
        apart = (rows[:, 1] - rows[:, 2]).norm(dim=1)
        assert (apart > 0.1 * rows[:, 1].norm(dim=1)).all()


SAVED_BEFORE_VECTORS = {
    "captions": "",
    "steps": 1,
    "seed": 0,
    "stages": 1,
    "parametrisation": "direct",
    "learning_rate": 0.005,
    "batch_size": 1,
    "attention_weight": 0.003,
    "leak_weight": 3.0,
    "background_weight": 0.0,
    "resolution": 64,
    "templates": "a photo of <name>",
    "dtype": "auto",
    "gradient_checkpointing": False,
    "preview_every": 0,
}


@pytest.mark.parametrize(("class_word", "vectors"), [("person", 1), ("very old person", 3)])
def test_a_prompt_that_was_saved_before_vectors(models, class_word, vectors):
    """There is one vector then, and one for each token of a class word of several."""
    named = {"name": "anna", "class_word": class_word, **SAVED_BEFORE_VECTORS}
    inputs = dict(zip(("model", "clip", "vae"), models, strict=True)) | named
    node = SeFiTrainIdentity.PREPARE_CLASS_CLONE(HIDDEN)
    lists = {key: [value] for key, value in inputs.items()}
    with torch.inference_mode():
        identity = node.EXECUTE_NORMALIZED(**lists, photos=[photo_and_mask()[0]]).result[0]
    assert (identity.stages, identity.vectors) == (1, vectors)
    assert identity.training["vectors"] == 1
    assert same(identity, run(models, **named)[0])


def test_an_identity_of_several_vectors_is_gone_on_from_and_drawn(models):
    first = run(models, steps=2, vectors=2, stages=2)[0]
    again = run(models, steps=1, learning_rate=1e-6, vectors=2, stages=2, identity=first)[0]
    torch.testing.assert_close(
        again.value_vectors["l"], first.value_vectors["l"], rtol=0, atol=1e-5
    )
    applied = apply_identity(*models[:2], AppliedIdentity(first))
    with torch.inference_mode():
        known, plain = (sample(*applied, f"a photo of {who}") for who in ("<anna>", "person"))
    assert torch.isfinite(known).all() and (known - plain).abs().mean() > 1e-4


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(tmp_path, weights):
    path = tmp_path / "half.safetensors"
    random_checkpoint.save(path, weights)
    half = load(path)
    kinds = ["auto", "fp32", {torch.float16: "fp16", torch.bfloat16: "bf16"}[weights]]
    first = [run(half, steps=2, seed=5, dtype=dtype)[1]["loss"] for dtype in kinds]
    for losses in first[1:]:
        assert losses == pytest.approx(first[0], rel=0.1)


def test_expressions_are_looked_for_whatever_the_training_computes_in(models):
    identity, losses, _ = run(models, steps=1, dtype="bf16", captions="auto")
    assert len(identity.training["captions"]) == 1 and len(losses["loss"]) == 1


def test_an_empty_last_line_is_the_caption_of_the_last_photo(models):
    photos = [photo_and_mask()[0]] * 2
    identity = run(models, photos, steps=1, captions="smiling\n")[0]
    assert identity.training["captions"] == ["smiling", ""]


def test_a_list_of_captions_has_one_for_each_photo(models):
    """As from a node that describes photos."""
    photos = [photo_and_mask()[0]] * 2
    identity = run(models, photos, steps=1, captions=["smiling,\non the beach ", "sad"])[0]
    assert identity.training["captions"] == ["smiling, on the beach", "sad"]


def test_the_identity_goes_through_a_file_into_a_picture(models, trained, tmp_path):
    model, clip, vae = models
    path = tmp_path / "anna.safetensors"
    path.write_bytes(to_bytes(trained[0]))
    identity = read_identity(path)
    assert identity.same_content(trained[0])
    with torch.inference_mode():
        patched = apply_identity(model, clip, AppliedIdentity(identity))
        pictures = [
            vae.decode(sample(*pair, prompt))
            for prompt, pair in (
                ("a photo of <anna>", patched),
                ("a photo of person", patched),
                ("a photo of person", (model, clip)),
            )
        ]
    assert (pictures[0] - pictures[1]).abs().mean() > 1e-3
    torch.testing.assert_close(pictures[1], pictures[2])


def test_the_astronaut_from_photo_to_picture(models, tmp_path, monkeypatch):
    """A real photo goes through the face mask, training, a file and SeFi Apply Identity."""
    data = pytest.importorskip("skimage.data")
    with torch.inference_mode():
        photo = torch.from_numpy(data.astronaut()).float()[None] / 255
        mask, crop, crop_mask, count = SeFiFaceMask.execute(
            photo, "lbp cascade", feather=4, crop_size=256
        ).result
    assert count == 1
    whole = run(models, [photo], [mask], steps=1)[0]
    identity = run(models, [crop], [crop_mask], steps=2, background_weight=0.1)[0]
    assert not same(whole, identity)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "sefi", ([str(tmp_path)], {".safetensors"})
    )
    with torch.inference_mode():
        SeFiSaveIdentity.execute(identity, "astronaut", "error")
        loaded = SeFiLoadIdentity.execute("astronaut.safetensors").result[0]
        assert same(loaded, identity)
        applied = SeFiApplyIdentity.execute(*models[:2], loaded, 1.0, 1.0, 0.0, 1.0).result
        first, second = (
            sample(*applied, prompt) for prompt in ("a photo of <anna>", "a photo of person")
        )
    assert torch.isfinite(first).all() and (first - second).abs().mean() > 1e-4


def test_progress_and_previews_reach_the_user(models, monkeypatch):
    monkeypatch.setattr(pace, "PREVIEW_SHARE", 1e9)  # previews may take as long as they like
    told = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: told.append((value, total, preview, node_id))
    )
    try:
        run(models, steps=5, preview_every=1)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert told[-1][:2] == (5, 5)
    assert {node_id for *_, node_id in told} == {"7"}
    previews = [(value, preview) for value, _, preview, _ in told if preview is not None]
    assert [value for value, _ in previews] == [
        3,
        4,
        5,
    ]  # after 2 steps nobody knows how long one takes
    assert previews[0][1][1].size == (64, 64)
    assert previews[0][1][1].tobytes() != previews[1][1][1].tobytes()  # of the tokens as they are


# --- bad input ----------------------------------------------------------------------------------


def bad(models, said, **changes):
    """The node refuses with one sentence that names itself and the input."""
    with pytest.raises(SeFiError, match=said) as error:
        run(models, **changes)
    message = str(error.value)
    assert message.startswith("SeFi Train Identity: ") and "\n" not in message


NO_VAE = SimpleNamespace(encode=None, decode=None)
NAN = torch.full((1, 64, 64, 3), float("nan"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"photos": [NAN]}, "NaN"),
        ({"masks": [torch.zeros(1, 80, 64)]}, "empty"),
        ({"masks": [torch.ones(1, 64, 64)]}, "64 x 64.*64 x 80.*SeFi Face Mask"),
        ({"templates": "a photo"}, "placeholder 0 times"),
        ({"templates": "a photo of <name>\n<name> and <name>"}, "placeholder 2 times"),
        ({"vectors": 76}, "vectors is 76"),
        ({"templates": " \n "}, "templates"),
        ({"name": "anna banana"}, "name"),
        ({"name": "../anna"}, "name"),
        ({"name": ""}, "name"),
        ({"class_word": "  "}, "class.word"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_bad_input_is_refused_before_any_work(models, changes, said):
    model, clip, _ = models
    bad((model, clip, NO_VAE), said, **changes)  # no training could even begin with it


def test_a_missing_package_is_noticed_before_any_work(models, monkeypatch):
    model, clip, _ = models
    monkeypatch.setitem(sys.modules, "diffusers.optimization", None)
    bad((model, clip, NO_VAE), "pip install -U diffusers")


def test_cuda_is_not_started_for_the_cpu(models, monkeypatch):
    """Its count may come from the driver of a card that CUDA cannot use."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

    def started(*_):
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "get_rng_state", started)
    run(models, steps=1)


def identity_of(stages=5, vectors=1, width=WIDTH, family="sd1", word="person"):
    vectors = {"l": torch.zeros(stages, vectors, width)}
    return Identity("anna", word, family, vectors, vectors)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (identity_of(stages=4), "4 stages"),
        (identity_of(word="cat"), "cat"),
        (identity_of(width=WIDTH * 2), "does not fit"),
        (identity_of(family="sdxl"), "SDXL"),
    ],
)
def test_an_identity_that_cannot_be_gone_on_from(models, start, said):
    model, clip, _ = models
    bad((model, clip, NO_VAE), said, identity=start)


def test_other_families_and_inpainting_models_are_refused(models, monkeypatch):
    model, clip, _ = models
    for channels in (9, 8):  # of Stable Diffusion 1.5 inpainting, and of InstructPix2Pix
        config = dict(model.model.model_config.unet_config, in_channels=channels)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.model_config, "unet_config", config)
            bad((model, clip, NO_VAE), "model is for inpainting or editing")
    monkeypatch.setattr(model.model, "model_config", comfy.supported_models.Flux({}))
    bad((model, clip, NO_VAE), "Flux.*Stable Diffusion 1.x")


def test_a_clip_of_another_model_is_refused(models, monkeypatch):
    model, clip, _ = models
    config = dict(model.model.model_config.unet_config, context_dim=WIDTH * 2)
    monkeypatch.setattr(model.model.model_config, "unet_config", config)
    bad((model, clip, NO_VAE), "clip does not fit")


def test_a_checkpoint_without_text_encoder_is_refused(models):
    bad((models[0], None, models[2]), "the clip input is empty")


def test_a_text_encoder_without_words_to_mark_is_refused(models, monkeypatch):
    """As the CLIP of a T5 alone, or a tokenizer for two encoders with only the other loaded."""
    model, clip, vae = models
    monkeypatch.delitem(clip.cond_stage_model._modules, "clip_l")
    bad((model, clip, vae), "clip is no text encoder of Stable Diffusion")


def bypass_lora(model, clip, keys):
    """MODEL and CLIP with a LoRA in bypass mode on the first layer among ``keys``."""
    name, key = next(iter(keys.items()))
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    rows, columns = weights[key].shape
    lora = {
        f"{name}.lora_up.weight": torch.ones(rows, 2),
        f"{name}.lora_down.weight": torch.ones(2, columns),
    }
    return comfy.sd.load_bypass_lora_for_models(model, clip, lora, 1.0, 1.0)


def unet_keys(model):
    return {
        name: key
        for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items()
        if isinstance(key, str) and key.endswith("attn2.to_k.weight")
    }


def test_a_lora_in_bypass_mode_is_refused(mini_sd):
    model, clip, vae = mini_sd
    bypass, _ = bypass_lora(model, clip, unet_keys(model))
    bad((bypass, clip, vae), "model has a LoRA in bypass mode")
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    keys = {name: key for name, key in keys.items() if key.endswith("q_proj.weight")}
    _, bypass = bypass_lora(model, clip, keys)
    bad((model, bypass, vae), "clip has a LoRA in bypass mode")


def test_training_after_a_lora_in_bypass_mode_was_sampled(mini_checkpoint):
    """ComfyUI leaves the layers' own ``forward`` as an attribute of each."""
    model, clip, vae = load(mini_checkpoint)
    images, masks = ([one] for one in photo_and_mask())
    before = run((model, clip, vae), images, masks, steps=2)[0]
    bypass, _ = bypass_lora(model, clip, unet_keys(model))
    with torch.inference_mode():
        sample(bypass, clip, "a person")
    hooked = [layer for layer in model.model.diffusion_model.modules() if "forward" in vars(layer)]
    assert len(hooked) == 1
    after = run((model, clip, vae), images, masks, steps=2)[0]
    assert same(before, after)
