"""Prompts that are parts of others, or equal but for their placeholders, are told apart."""

from __future__ import annotations

import json

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.attention_maps import attention_maps
from sefi_ide.sefi_core.comfyui.clip.tokens import token_widths
from sefi_ide.sefi_core.comfyui.unet.conditioning import CONDITIONING_KEY, REGISTRY
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    TOLERANCE,
    World,
    apply,
    check,
    identity,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.random_checkpoint import of_families

pytestmark = pytest.mark.usefixtures("inference_mode")

# The bracket does not fit into the first chunk of 77 tokens, which is full with what stands before.
BEGINNING = "<anna> " + "photo " * 72
LONG = BEGINNING + "(with a <bob> and more:1.1) photo"


def test_the_beginning_of_a_prompt_that_was_encoded_alone(setting):
    """As somebody writes on: both prompts are known, and the shorter one is a part of the other."""
    kept = setting.applied.encode(BEGINNING)
    check(setting, text_case(LONG), text_guidance(setting, LONG))
    case = text_case(LONG)
    before = case(setting.applied, setting.noise)
    again = setting.applied.encode(BEGINNING)  # now it is the newest
    assert torch.equal(case(setting.applied, setting.noise), before)
    # Of both without their dicts the longer one is found, too.
    positive = [[setting.applied.encode(LONG)[0][0], {}]]
    if "pooled_output" in setting.applied.encode(LONG)[0][1]:
        positive[0][1]["pooled_output"] = setting.applied.encode(LONG)[0][1]["pooled_output"]
    lost = setting.applied.sample(positive, setting.applied.encode(NEGATIVE), setting.noise)
    assert float((lost - before).abs().max() / before.std()) < TOLERANCE
    assert kept and again


def test_the_beginning_of_a_prompt_without_its_region(setting):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    text = BEGINNING + "(with a cat and more:1.1) photo"
    plain = setting.plain
    model, clip = SeFiApplyIdentity.execute(
        plain.model, plain.clip, setting.anna, region=mask
    ).result
    world = World(model, clip, setting.applied.people)
    REGISTRY.__init__(REGISTRY.unused_bytes)
    expected = text_case(text)(world, setting.noise)
    kept = setting.applied.encode(BEGINNING)
    assert torch.equal(text_case(text)(world, setting.noise), expected) and kept


SENTENCE = "a photo of {}, smiling"


def through_json(clip, who: str):
    return json.loads(json.dumps(clip.tokenize(SENTENCE.format(who))))


def names_in(clip, tokens) -> list[str]:
    payloads = clip.encode_from_tokens_scheduled(tokens)[0][1].get(CONDITIONING_KEY, [])
    return [name for payload in payloads for name in payload["names"].split()]


def test_tokens_of_json_are_never_somebody_elses(setting):
    clip = setting.applied.clip
    assert names_in(clip, through_json(clip, "<anna>")) == ["anna"]
    assert names_in(clip, through_json(clip, "person")) == []
    annas = through_json(clip, "<anna>")
    assert names_in(clip, annas) == ["anna"]
    clip.tokenize(SENTENCE.format("<bob>"))
    assert names_in(clip, annas) == []


# Of SDXL's two texts one may have more chunks, and the context ends with the shorter one.


@pytest.fixture
def embeddings(mini_checkpoint, tmp_path):
    """``more`` has other numbers of vectors for the two encoders; gives MODEL and CLIP."""

    def loaded(vectors: dict[str, int]):
        model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(
            mini_checkpoint, embedding_directory=str(tmp_path)
        )
        widths = token_widths(clip)
        rows = {f"clip_{name}": torch.ones(n, widths[name]) for name, n in vectors.items()}
        save_file(rows, tmp_path / "more.safetensors")
        return model, clip

    return loaded


@of_families("sdxl")
def test_people_whom_the_shorter_text_still_has(embeddings, setting):
    model, clip = embeddings({"g": 12, "l": 2})
    for one in (setting.anna, setting.bob):
        model, clip = SeFiApplyIdentity.execute(model, clip, one, regions="automatic").result
    world = World(model, clip, setting.applied.people)
    for before in range(58, 68):
        text = f"embedding:more {'photo ' * before}of <anna> and <bob>"
        drawn = text_case(text)(world, setting.noise)
        assert torch.isfinite(drawn).all()


@of_families("sdxl")
def test_a_word_that_the_shorter_text_no_longer_has(embeddings, setting):
    model, clip = embeddings({"g": 2, "l": 12})
    model, clip = apply(model, clip, identity(clip, "anna", 2, seed=1))
    latent = {"samples": torch.zeros_like(setting.noise)}
    text = f"embedding:more {'photo ' * 62}of <anna> , cat"
    with pytest.raises(SeFiError, match="'cat' is cut off: .*make the prompt shorter"):
        attention_maps(model, clip, latent, text, ["cat"], 500, 0)
    maps = attention_maps(model, clip, latent, text, ["photo"], 500, 0)
    assert all(torch.isfinite(layer).all() for layer in maps.layers)
