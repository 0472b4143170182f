"""The maps against an independent computation from the layers' own projections."""

from __future__ import annotations

import copy
import math

import comfy.sample
import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from safetensors.torch import save_file
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.nodes.attention_map import SeFiAttentionMap
from sefi_ide.sefi_core.comfyui.attention_maps import Recorder, attention_maps
from sefi_ide.sefi_core.comfyui.clip.words import word_columns
from sefi_ide.sefi_core.comfyui.unet import capture
from sefi_ide.sefi_core.comfyui.unet.capture import looking
from sefi_ide.sefi_core.dividing import divided_pictures
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy.composition import identity
from sefi_ide.tests.comfy.oracle import (
    LATENT_SCALE,
    Fixed,
    Oracle,
    Person,
    Prompt,
    Region,
    training_sigmas,
)
from sefi_ide.tests.comfy.random_checkpoint import of_all_families
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS

pytestmark = pytest.mark.usefixtures("inference_mode")

SHAPE = (1, LATENT_CHANNELS, 16, 16)
PROMPT = "a photo of red hair"
SEED = 3


@pytest.fixture(scope="module")
def world(mini_checkpoint, inference_mode):
    """MODEL, CLIP and LATENT for all tests: none of them may change anything."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(
        mini_checkpoint, embedding_directory=None
    )
    generator = torch.Generator().manual_seed(0)
    return model, clip, {"samples": torch.randn(SHAPE, generator=generator) / LATENT_SCALE}


def anna(clip) -> Identity:
    return identity(clip, "anna", 5, seed=1)


def expected_map(model, prompt, latent, timestep, columns):
    """One word's map from the outputs of ``to_q`` and ``to_k`` of a plain U-Net call."""
    projections: dict[str, list[torch.Tensor]] = {"to_q": [], "to_k": []}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, kept=projections[name[-4:]]: kept.append(output)
        )
        for name, module in model.model.diffusion_model.named_modules()
        if name.endswith(("attn2.to_q", "attn2.to_k"))
    ]
    sigma = float(training_sigmas()[timestep])
    noise = torch.randn(latent.shape, generator=torch.manual_seed(SEED))
    try:
        noised = latent * model.model.latent_format.scale_factor + sigma * noise
        Oracle(model).unet(noised, sigma, Region(prompt))
    finally:
        for hook in hooks:
            hook.remove()
    total = 0
    layers = [
        m for name, m in model.model.diffusion_model.named_modules() if name.endswith("attn2")
    ]
    for layer, q, k in zip(layers, projections["to_q"], projections["to_k"], strict=True):
        heads = layer.heads
        side = math.isqrt(q.shape[1])
        if side not in (8, 4):
            continue
        width = q.shape[2] // heads
        looked = 0
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[0, :, part].double() @ k[0, :, part].double().T / math.sqrt(width)
            looked = looked + scores.softmax(-1)[:, columns].sum(-1)
        looked = looked.reshape(1, 1, side, side).float() / heads
        total = (
            total + F.interpolate(looked, size=(128, 128), mode="bilinear", antialias=True)[0, 0]
        )
    return total / total.max()


def options_of(side: int) -> dict[str, object]:
    """Of a layer with two heads and ``side`` squared queries."""
    return {
        "n_heads": 2,
        "activations_shape": [1, 4, side, side],
        "block": ("input", 1),
        "block_index": 0,
        "attn_precision": None,
    }


def test_a_word_looks_where_its_key_points():
    """Two heads; the left half's queries agree with token 2 and the right half's with token 5."""
    recorder = Recorder({"left": [2], "right": [5], "both": [2, 5]}, latents=1)
    k = torch.zeros(1, 7, 4)
    k[0, 2, [0, 2]] = k[0, 5, [1, 3]] = 20.0
    q = torch.zeros(1, 4, 4, 4)
    q[:, :, :2, [0, 2]] = q[:, :, 2:, [1, 3]] = 20.0
    attend = looking(recorder.look, 8)
    attend(q.reshape(1, 16, 4), k, k, options_of(4))
    (maps,) = recorder.maps.values()
    left, right, both = maps
    torch.testing.assert_close(left, torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4))
    torch.testing.assert_close(right, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4))
    torch.testing.assert_close(both, torch.ones(4, 4))


def test_levels_that_are_not_used():
    recorder = Recorder({"a": [1]}, latents=1)
    attend = looking(recorder.look, 16)
    for side in (16, 2):
        q, k = torch.zeros(1, side * side, 4), torch.zeros(1, 7, 4)
        assert attend(q, k, k, options_of(side)).shape == q.shape
    assert recorder.maps == {}


def test_a_model_without_those_levels(world, monkeypatch):
    model, clip, latent = world
    monkeypatch.setattr(capture, "LEVELS", (64,))
    with pytest.raises(SeFiError, match="no cross-attention at half or a quarter"):
        attention_maps(model, clip, latent, PROMPT, ["hair"], 400, SEED)


@of_all_families
@pytest.mark.parametrize("timestep", [0, 400, 999])
def test_plain_words_equal_an_independent_computation(world, timestep):
    model, clip, latent = world
    found = attention_maps(model, clip, latent, PROMPT, ["hair", "red hair"], timestep, SEED)
    maps = found.together()
    assert maps.shape == (2, 128, 128)
    prompt = Fixed(*clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True))
    for one, columns in zip(maps, ([5], [4, 5]), strict=True):
        expected = expected_map(model, prompt, latent["samples"], timestep, columns)
        torch.testing.assert_close(one, expected, atol=2e-4, rtol=1e-3)
    assert maps[0].std() > 0.01  # a flat map would equal anything


@of_all_families
def test_a_placeholder_is_seen_with_the_keys_of_its_stage(world):
    model, clip, latent = world
    one = anna(clip)
    applied = SeFiApplyIdentity.execute(model, clip, one, 1.0, 1.0, 0.0, 1.0).result
    text = "a photo of <anna>, smiling"
    person = Person("person", one.key_vectors, one.value_vectors)
    found = {}
    for timestep in (100, 700):
        maps = attention_maps(*applied, latent, text, ["<anna>"], timestep, SEED).together()
        expected = expected_map(
            model,
            Prompt(clip, text, {"anna": person}),
            latent["samples"],
            timestep,
            [4],
        )
        torch.testing.assert_close(maps[0], expected, atol=2e-4, rtol=1e-3)
        found[timestep] = maps[0]
    text = "a photo of person, smiling"
    plain = attention_maps(model, clip, latent, text, ["person"], 700, SEED).together()
    assert (plain[0] - found[700]).abs().max() > 0.01


def test_other_patches_of_the_model_stay_in_force(world):
    """One patch on a layer, one on a whole block: both are called, and their output is used."""
    model, clip, latent = world
    calls = []

    def patch(name, factor):
        def attend(q, k, v, options):
            calls.append(name)
            return factor * optimized_attention(q, k, v, options["n_heads"])

        return attend

    patched = model.clone()
    blocks = [
        (name, number)
        for name, group in (
            ("input", model.model.diffusion_model.input_blocks),
            ("output", model.model.diffusion_model.output_blocks),
        )
        for number, block in enumerate(group)
        if any(type(layer).__name__ == "SpatialTransformer" for layer in block)
    ]
    patched.set_model_attn2_replace(patch("layer", 0.0), *blocks[0], 0)
    patched.set_model_attn2_replace(patch("block", 0.5), *blocks[1])
    maps = attention_maps(patched, clip, latent, PROMPT, ["hair"], 400, SEED).together()
    assert sorted(calls) == ["block", "layer"]
    prompt = Fixed(*clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True))
    expected = expected_map(patched, prompt, latent["samples"], 400, [5])
    torch.testing.assert_close(maps[0], expected, atol=2e-4, rtol=1e-3)
    unpatched = attention_maps(model, clip, latent, PROMPT, ["hair"], 400, SEED).together()
    assert (maps - unpatched).abs().max() > 0.01


@pytest.mark.parametrize("guidance", ["PAG", "SAG"])
def test_what_guidance_leads_away_from_is_not_in_the_maps(world, guidance):
    """It asks the model a second time, with its self-attention or its latent spoilt."""
    model, clip, latent = world
    node = PerturbedAttentionGuidance if guidance == "PAG" else SelfAttentionGuidance
    arguments = (3.0,) if guidance == "PAG" else (0.5, 2.0)
    guided = node.execute(model, *arguments).result[0]
    expected, found = (
        attention_maps(one, clip, latent, PROMPT, ["hair"], 400, SEED) for one in (model, guided)
    )
    assert len(found.layers) == len(expected.layers)
    torch.testing.assert_close(found.together(), expected.together())


def test_a_model_that_was_compiled_for_sampling_is_recorded(world, fresh_compiler):
    model, clip, latent = world
    compiled = model.clone()
    set_torch_compile_wrapper(
        compiled,
        "eager",
        options={"guard_filter_fn": skip_torch_compile_dict},
        keys=["diffusion_model.middle_block.1.transformer_blocks.0"],
    )
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    comfy.sample.sample(
        compiled, torch.zeros(SHAPE), 1, 1.0, "euler", "normal", conditioning, conditioning,
        latent["samples"], disable_pbar=True,
    )  # fmt: skip
    expected, found = (
        attention_maps(one, clip, latent, PROMPT, ["hair"], 400, SEED) for one in (model, compiled)
    )
    assert len(found.layers) == len(expected.layers)
    torch.testing.assert_close(found.together(), expected.together(), atol=1e-4, rtol=1e-3)


def test_the_models_are_left_alone(world):
    model, clip, latent = world
    one = anna(clip)
    applied, applied_clip = SeFiApplyIdentity.execute(model, clip, one, 1.0, 1.0, 0.0, 1.0).result
    options = copy.deepcopy(applied.model_options["transformer_options"].get("patches_replace"))
    before = latent["samples"].clone()
    arguments = (applied, applied_clip, latent, "<anna>", ["<anna>"], 400, SEED)
    first = attention_maps(*arguments).together()
    assert torch.equal(first, attention_maps(*arguments).together())
    assert not torch.equal(first, attention_maps(*arguments[:-1], SEED + 1).together())
    assert torch.equal(latent["samples"], before)
    after = applied.model_options["transformer_options"]
    assert after.get("patches_replace") == options and "sefi_identity_run" not in after


def test_several_latents(world):
    model, clip, latent = world
    other = {"samples": latent["samples"].flip(-1) * 0.5}
    both = {"samples": torch.cat([latent["samples"], other["samples"]])}
    found = attention_maps(model, clip, both, PROMPT, ["red", "hair"], 400, SEED)
    maps = found.together()
    assert maps.shape == (4, 128, 128)
    assert {tuple(layer.shape) for layer in found.layers} == {(4, 8, 8), (4, 4, 4)}
    # The noise of a batch begins with the noise of its first latent.
    alone = attention_maps(model, clip, latent, PROMPT, ["red", "hair"], 400, SEED).together()
    torch.testing.assert_close(maps[0::2], alone, atol=1e-4, rtol=1e-3)
    assert (maps[1] - maps[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    "prompt, word, columns",
    [
        ("a photo of red hair", "photo", [2]),
        ("a photo of red hair, a hair band", "hair", [5, 8]),
        ("a (photo:1.3) of ((red) hair)", "red hair", [4, 5]),
        ("A PHOTO", "photo", [2]),
        ("an astronautic cat", "cat", None),  # where depends on the merges, see below
        ("word " * 80 + "hat", "hat", [77 + 1 + 80 - 75]),
    ],
)
def test_words_are_found_in_the_context(world, prompt, word, columns):
    _, clip, _ = world
    found = word_columns(clip, clip.tokenize(prompt), word)
    if columns is None:
        assert found == [len(clip.tokenizer.clip_l.tokenizer(prompt)["input_ids"]) - 2]
    else:
        assert found == columns


def test_a_word_is_not_found_inside_another_or_in_a_placeholder(world):
    model, clip, _ = world
    ids = clip.tokenizer.clip_l.tokenizer("astronautic")["input_ids"][1:-1]
    assert len(ids) > 1
    tail = clip.tokenizer.clip_l.inv_vocab[ids[-1]].removesuffix("</w>")
    with pytest.raises(SeFiError, match="choose from an, astronautic, cat"):
        word_columns(clip, clip.tokenize("an astronautic cat"), tail)
    _, clip = SeFiApplyIdentity.execute(model, clip, anna(clip), 1.0, 1.0, 0.0, 1.0).result
    tokens = clip.tokenize("<anna>, and a person, (<anna>:1.2)")
    assert word_columns(clip, tokens, "<anna>") == [1, 7]
    assert word_columns(clip, tokens, "person") == [5]


def test_the_word_of_a_textual_inversion(mini_checkpoint, tmp_path):
    save_file({"emb_params": torch.rand(2, 128)}, tmp_path / "hat.safetensors")
    _, clip, _, _ = comfy.sd.load_checkpoint_guess_config(
        mini_checkpoint, output_model=False, embedding_directory=str(tmp_path)
    )
    tokens = clip.tokenize("a photo of embedding:hat smiling")
    assert word_columns(clip, tokens, "embedding:hat") == [4, 5]
    with pytest.raises(SeFiError, match="choose from a, photo, of, smiling$"):
        word_columns(clip, tokens, "scarf")


def execute(world, **changes):
    model, clip, latent = world
    arguments = {
        "model": model, "clip": clip, "latent": latent, "prompt": PROMPT, "words": "red, hair",
        "timestep": 400, "seed": SEED,
    }  # fmt: skip
    return SeFiAttentionMap.execute(**{**arguments, **changes}).result


def test_the_node(world):
    heat, maps, *_ = execute(world)
    assert maps.shape == (2, 128, 128) and maps.amax((1, 2)).tolist() == [1.0, 1.0]
    assert heat.shape[0] == 2 and heat.shape[2:] == (128, 3) and heat.shape[1] > 128
    assert 0 <= heat.min() and heat.max() <= 1
    # Brighter where the map is higher; the strip below is black with a white word.
    brightness = heat[0, :128].mean(-1)
    assert brightness[maps[0] > 0.9].mean() > brightness[maps[0] < 0.6].mean()
    strips = heat[:, 128:]
    assert strips[0].max() > 0.8 and not torch.equal(strips[0], strips[1])


def test_a_word_on_two_lines(world):
    heat, maps, *_ = execute(world, words="photo, red\nhair")
    assert len(heat) == len(maps) == 2


def test_the_node_over_a_picture(world):
    picture = torch.rand(1, 96, 160, 4)
    heat, maps, regions, parts = execute(world, image=picture)
    assert maps.shape == (2, 96, 160) and maps.amax((1, 2)).tolist() == [1.0, 1.0]
    assert heat.shape[2:] == (160, 3)
    assert regions.shape == (1, 96, 160, 3) and parts.shape == (2, 96, 160)
    black = execute(world, image=picture * 0)
    assert not torch.equal(heat[:, :96], black[0][:, :96])
    assert not torch.equal(regions, black[2]) and torch.equal(parts, black[3])


def test_the_picture_is_divided_among_the_words(world):
    """Each of two latents by itself; the parts are masks that SeFi Apply Identity takes."""
    model, clip, latent = world
    both = {"samples": torch.cat([latent["samples"], latent["samples"].flip(-1)])}
    _, maps, regions, parts = execute((model, clip, both))
    assert regions.shape == (2, 128, 128, 3) and parts.shape == maps.shape == (4, 128, 128)
    torch.testing.assert_close(parts[:2] + parts[2:], torch.ones(2, 128, 128))
    assert ((parts == 0).any((1, 2)) & (parts == 1).any((1, 2))).all()
    assert not torch.equal(regions[0], regions[1])
    found = attention_maps(model, clip, both, PROMPT, ["red", "hair"], 400, SEED)
    expected = divided_pictures(found.layers, 2, (128, 128))
    torch.testing.assert_close(parts, expected)
    (_, _, _, whole) = execute(world, words="hair")
    assert torch.equal(whole, torch.ones(1, 128, 128))
    SeFiApplyIdentity.execute(model, clip, anna(clip), region=parts[:2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"words": " , "}, "words is empty"),
        ({"words": "hat"}, "'hat' is not in the prompt: choose from a, photo, of, red, hair"),
        ({"prompt": "", "words": "hat"}, "write it into the prompt"),
        ({"prompt": "a <bob>", "words": "<bob>"}, "does not know <bob>.*SeFi Apply Identity"),
        ({"latent": {"samples": torch.full(SHAPE, math.nan)}}, "latent holds.*NaN"),
        (
            {"latent": {"samples": torch.zeros(1, LATENT_CHANNELS, 2, 16, 16)}},
            "latent has 5 dimensions",
        ),
        ({"latent": {"samples": torch.zeros(0, *SHAPE[1:])}}, "latent is empty"),
        ({"latent": {"samples": torch.ones(1, 16, 16, 16)}}, "16 channels and this model needs"),
        ({"clip": None}, "the clip input is empty"),
    ],
)
def test_bad_input(world, changes, message):
    with pytest.raises(SeFiError, match=f"SeFi Attention Map: .*{message}"):
        execute(world, **changes)


def test_a_model_without_the_identity_is_refused(world):
    """Its map would be the class word's, under the placeholder's name."""
    model, clip, _ = world
    _, applied = SeFiApplyIdentity.execute(model, clip, anna(clip), 1.0, 1.0, 0.0, 1.0).result
    with pytest.raises(SeFiError, match="SeFi Attention Map: model does not know <anna>"):
        execute(world, clip=applied, prompt="a photo of <anna>", words="<anna>")
    execute(world, clip=applied)  # no placeholder is in that prompt
