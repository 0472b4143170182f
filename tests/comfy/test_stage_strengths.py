"""A strength for each stage, against the oracle: its stages have been moved by hand beforehand."""

from __future__ import annotations

import json

import comfy.sample
import comfy.sd
import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding, position_embeddings
from sefi_ide.sefi_core.comfyui.clip.tokens import encoder_models
from sefi_ide.sefi_core.comfyui.unet.conditioning import CONDITIONING_KEY, REGISTRY
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy import test_position_free as position_free
from sefi_ide.tests.comfy.composition import family_of_encoders, identity
from sefi_ide.tests.comfy.oracle import Person, Prompt
from sefi_ide.tests.comfy.random_checkpoint import of_all_families
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS

import nodes

pytestmark = [pytest.mark.usefixtures("inference_mode", "family"), of_all_families]

STAGES = 5
TEXT = "a photo of <anna>, smiling"
LISTS = {
    "five": ("1, 0.8, 0, -0.5, 1.5", (1, 0.8, 0, -0.5, 1.5)),
    "stretched": ("1,0.6", (1, 1, 1, 0.6, 0.6)),
    "three": ("1 0.6\n0.2", (1, 1, 0.6, 0.6, 0.2)),
    "one": ("0.4", (0.4,) * 5),
    "Chinese commas": ("1，1，0.6，0.4，0.4", (1, 1, 0.6, 0.4, 0.4)),
}
"""What is written, and the factors that the five stages get, the noisiest first."""


@pytest.fixture(scope="module")
def loaded(mini_checkpoint):
    return comfy.sd.load_checkpoint_guess_config(mini_checkpoint, embedding_directory=None)[:2]


@pytest.fixture(scope="module")
def anna(loaded):
    return identity(loaded[1], "anna", STAGES, seed=4)


def apply(loaded, one, strengths="", k=1.0, v=1.0):
    return SeFiApplyIdentity.execute(*loaded, one, k, v, stage_strengths=strengths).result


def encode(clip, text=TEXT):
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def phases(clip):
    """What is in force in each stage, the least noisy one first."""
    (payload,) = encode(clip)[0][1][CONDITIONING_KEY]
    return sorted(payload["phases"], key=lambda phase: phase["stages"][0][0])


def picture(model, clip):
    noise = torch.randn(1, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    return comfy.sample.sample(
        model, noise, 5, 3.0, "euler", "normal", encode(clip), encode(clip, "blurry"),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip


def moved(word, rows, factors, strength):
    """Each stage's vectors on their line; ``factors`` begin at the noisiest."""
    return {
        encoder: torch.stack(
            [
                torch.lerp(word[encoder], of_stage, strength * factor)
                for of_stage, factor in zip(of_encoder, reversed(factors), strict=True)
            ]
        )
        for encoder, of_encoder in rows.items()
    }


@pytest.mark.parametrize(("text", "factors"), LISTS.values(), ids=LISTS)
def test_each_stage_and_their_mean_are_the_oracles(loaded, anna, text, factors):
    k, v = 0.9, 0.7
    word = class_word_embedding(loaded[1], "person")
    keys = moved(word, anna.key_vectors, factors, k)
    values = moved(word, anna.value_vectors, factors, v)
    oracle = Prompt(loaded[1], TEXT, {"anna": Person("person", keys, values)})
    _, clip = apply(loaded, anna, text, k, v)
    context, extra = encode(clip)[0]
    torch.testing.assert_close(context, oracle.base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(extra["pooled_output"], oracle.pooled, atol=1e-5, rtol=1e-5)
    found = phases(clip)
    assert len(found) == STAGES
    for stage, phase in enumerate(found):
        wanted = oracle.contexts(200 * stage + 100)
        torch.testing.assert_close(phase["key"], wanted.key, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(phase["value"], wanted.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["1", "1, 1", "1,1,1,1,1", "  "])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_ones_are_bit_by_bit_what_there_was_without(loaded, anna, text, strength):
    plain = SeFiApplyIdentity.execute(*loaded, anna, strength, strength).result
    written = apply(loaded, anna, text, strength, strength)
    assert torch.equal(encode(plain[1])[0][0], encode(written[1])[0][0])
    for before, after in zip(phases(plain[1]), phases(written[1]), strict=True):
        assert torch.equal(before["key"], after["key"])
        assert torch.equal(before["value"], after["value"])
    assert torch.equal(picture(*plain), picture(*written))


def test_one_factor_everywhere_is_the_strength_bit_by_bit(loaded, anna):
    plain, written = apply(loaded, anna, "", 0.5, 0.5), apply(loaded, anna, "0.5")
    assert torch.equal(picture(*plain), picture(*written))


def test_at_0_a_stage_is_the_class_word_bit_by_bit(loaded, anna):
    model, clip = apply(loaded, anna, "0, 1, 1, 1, 0")
    word = encode(loaded[1], TEXT.replace("<anna>", "person"))[0][0]
    found, without = phases(clip), phases(apply(loaded, anna)[1])
    for stage in (0, 4):
        assert torch.equal(found[stage]["key"], word)
        assert torch.equal(found[stage]["value"], word)
    assert found[0]["key"] is found[4]["key"]  # encoded once
    for stage in (1, 2, 3):
        assert torch.equal(found[stage]["key"], without[stage]["key"])
        assert torch.equal(found[stage]["value"], without[stage]["value"])
    assert not torch.equal(picture(model, clip), picture(*apply(loaded, anna)))


def test_all_0_is_the_unpatched_picture_bit_by_bit(loaded, anna):
    model, clip = apply(loaded, anna, "0, 0")
    assert CONDITIONING_KEY not in encode(clip)[0][1]
    expected = encode(loaded[1], TEXT.replace("<anna>", "person"))[0][0]
    assert torch.equal(encode(clip)[0][0], expected)


def test_an_identity_of_one_stage_gets_a_stage_for_each_number(loaded):
    one = identity(loaded[1], "anna", 1, seed=5)
    found = phases(apply(loaded, one, "0.2, 0.4, 1")[1])
    assert [phase["stages"] for phase in found] == [[[stage, 3]] for stage in range(3)]
    for phase, strength in zip(found, (1.0, 0.4, 0.2), strict=True):
        (single,) = phases(apply(loaded, one, "", strength, strength)[1]) or [None]
        assert torch.equal(phase["key"], single["key"])
        assert torch.equal(phase["value"], single["value"])


def test_other_strengths_are_not_taken_for_the_same(loaded, anna):
    """Each registers what is in force for its own context, and JSON between changes nothing."""
    kept = []
    for text in ("1, 0", "0, 1", "1, 0.5", ""):
        _, clip = apply(loaded, anna, text)
        found = phases(clip)
        tokens = clip.tokenize(TEXT)
        context = clip.encode_from_tokens(json.loads(json.dumps(tokens)))
        assert torch.equal(context, clip.encode_from_tokens(tokens, return_dict=True)["cond"])
        kept.append((clip.encode_from_tokens(json.loads(json.dumps(tokens))), found))
    for number, (context, found) in enumerate(kept):
        payload = REGISTRY.of(context)
        assert payload is not None
        registered = sorted(payload["phases"], key=lambda phase: phase["stages"][0][0])
        for phase, wanted in zip(registered, found, strict=True):
            assert torch.equal(phase["key"], wanted["key"])
            assert torch.equal(phase["value"], wanted["value"])
        assert not any(torch.equal(context, other) for other, _ in kept[:number])


def test_without_a_position_of_its_own_a_stage_moves_from_token_and_position(loaded, family):
    one = position_free.identity(family, stages=3)
    factors = (0.25, 1.0, 0.5)  # of the least noisy stage first
    _, clip = apply(loaded, one, "0.5, 1, 0.25")
    word = class_word_embedding(loaded[1], "person person")
    prompt = "a photo of <anna> here"
    place = slice(4, 6)  # behind start, "a", "photo", "of"
    wanted = {}
    for name, encoder in encoder_models(loaded[1]).items():
        summed = word[name] + position_embeddings(encoder)[place]
        rows = one.value_vectors[name]
        wanted[name] = torch.stack(
            [torch.lerp(summed, row, factor) for row, factor in zip(rows, factors, strict=True)]
        )
    context, extra = nodes.CLIPTextEncode().encode(clip, prompt)[0][0]
    mean = {name: rows.mean(0) for name, rows in wanted.items()}
    expected = position_free.overwritten(loaded[1], prompt, mean)[0]
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=1e-5)
    (payload,) = extra[CONDITIONING_KEY]
    assert len(payload["phases"]) == 3
    for phase in payload["phases"]:
        stage = phase["stages"][0][0]
        rows = {name: of_stages[stage] for name, of_stages in wanted.items()}
        expected = position_free.overwritten(loaded[1], prompt, rows)[0]
        torch.testing.assert_close(phase["value"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(phase["key"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1, half", "'half' where a number is needed"),
        ("1,,1", "'' where a number is needed"),
        ("1, 1, 1, 1, 1, 1", "has 6 entries and the identity 5 stages"),
        ("nan", "not a number (NaN)"),
        ("1, inf", "stage_strengths is inf: set it to 100 or less"),
        ("1 " * 101, "more than 100 entries"),
        ("1, " + "x" * 10_000, "where a number is needed"),
        (7, "stage_strengths is an int"),
        ("\ud800", "broken character"),
    ],
)
def test_bad_lists_are_one_clear_sentence(loaded, anna, text, said):
    with pytest.raises(SeFiError, match="^SeFi Apply Identity: ") as caught:
        apply(loaded, anna, text)
    message = str(caught.value)
    assert said in message and "stage_strengths" in message
    assert "\n" not in message and ": " in message.removeprefix("SeFi Apply Identity: ")
    assert len(message) < 500


def test_nothing_given_is_nothing_changed(loaded):
    rows = class_word_embedding(loaded[1], "person")
    rows = {name: one[None] for name, one in rows.items()}
    plain = Identity("anna", "person", family_of_encoders(tuple(rows)), rows, rows)
    assert CONDITIONING_KEY not in encode(apply(loaded, plain, None)[1])[0][1]
