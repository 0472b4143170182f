"""What an applied identity reaches, and what it does not."""

from __future__ import annotations

import gc
import math
import weakref

import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import pytest
import torch
from comfy_extras import nodes_model_advanced
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.clip import encoder as encoding
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.clip.tokens import PlaceholderToken, substitute
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.comfyui.unet.conditioning import CONDITIONING_KEY, REGISTRY, Registry
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy.composition import family_of_encoders
from sefi_ide.tests.comfy.oracle import Person, Prompt, timestep_of, training_sigmas
from sefi_ide.tests.comfy.random_checkpoint import of_all_families
from sefi_ide.tests.comfy.training_runs import random_vectors
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS

import nodes

pytestmark = [pytest.mark.usefixtures("inference_mode", "family"), of_all_families]

STAGES = 5
TEXT = "a photo of <anna>, smiling"
NOISE = torch.randn(1, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def loaded(mini_checkpoint):
    return comfy.sd.load_checkpoint_guess_config(mini_checkpoint, embedding_directory=None)[:2]


@pytest.fixture(scope="module")
def word(loaded):
    return class_word_embedding(loaded[1], "person")


def identity(word, keys=True, values=True, stages=STAGES, **fields):
    """Random vectors about the class word's, or the class word's own."""
    generator = torch.Generator().manual_seed(1)
    k, v = (
        {
            encoder: rows + 0.1 * torch.randn(stages, 1, rows.shape[-1], generator=generator) * on
            for encoder, rows in word.items()
        }
        for on in (keys, values)
    )
    family = family_of_encoders(tuple(word))
    fields = {"name": "anna", "class_word": "person", "family": family, **fields}
    return Identity(key_vectors=k, value_vectors=v, **fields)


def apply(loaded, identity, k=1.0, v=1.0, start=0.0, end=1.0):
    return SeFiApplyIdentity.execute(*loaded, identity, k, v, start, end).result


def encode(clip, text):
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def sample(model, positive, negative, sampler="euler", scheduler="normal", steps=3):
    return comfy.sample.sample(
        model, NOISE, steps, 3.0, sampler, scheduler, positive, negative,
        torch.zeros_like(NOISE), disable_pbar=True, seed=0,
    )  # fmt: skip


def picture(loaded, text=TEXT):
    return sample(loaded[0], encode(loaded[1], text), encode(loaded[1], "blurry"))


def test_class_word_vectors_give_the_unpatched_picture(loaded, word):
    expected = picture(loaded, TEXT.replace("<anna>", "person"))
    applied = apply(loaded, identity(word, keys=False, values=False))
    assert (picture(applied) - expected).abs().max() < 1e-5 * expected.std()


def test_strength_zero_gives_the_unpatched_picture_bit_by_bit(loaded, word):
    expected = picture(loaded, TEXT.replace("<anna>", "person"))
    applied = apply(loaded, identity(word), 0.0, 0.0)
    assert torch.equal(picture(applied), expected)
    assert CONDITIONING_KEY not in encode(applied[1], TEXT)[0][1]


class Attention:
    """Queries, keys and values of the first cross-attention, forward by forward."""

    def __init__(self, model):
        unet = model.model.diffusion_model
        self.module = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
        self.inputs, self.outputs, self.handles = [], [], []

    def __enter__(self):
        for name in ("to_q", "to_k", "to_v"):
            self.handles.append(getattr(self.module, name).register_forward_hook(self.record))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def record(self, _, arguments, output):
        self.inputs.append(arguments[0].clone())
        self.outputs.append(output.clone())


@pytest.mark.parametrize(("keys", "values"), [(True, False), (False, True)])
def test_keys_reach_keys_only_and_values_values_only(loaded, word, keys, values):
    runs = []
    for one in (identity(word, False, False), identity(word, keys, values)):
        model, clip = apply(loaded, one)
        with Attention(model) as attention:
            sample(model, encode(clip, TEXT), encode(clip, "blurry"), steps=1)
        runs.append(attention.outputs)
    (query, key, value), (query_set, key_set, value_set) = runs
    if not (values and model.model.adm_channels):  # SDXL's pooled output goes with the values
        assert torch.equal(query, query_set)
    assert torch.equal(key, key_set) is not keys
    assert torch.equal(value, value_set) is not values
    # ComfyUI puts the negative first here; it has no placeholder and keeps all of its own.
    differing = {
        row for a, b in ((key, key_set), (value, value_set)) for row in (0, 1)
        if not torch.equal(a[row], b[row])
    }  # fmt: skip
    assert len(differing) == 1


def recorded_stages(model, clip, prompt, sampler, scheduler, steps=8):
    """(sigma, stage of K, stage of V) of every forward, found in what is projected."""
    sigmas, contexts = [], []
    model = model.clone()

    def wrapper(apply_model, arguments):
        sigmas.append(float(arguments["timestep"][0]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)
    with Attention(model) as attention:
        sample(model, encode(clip, TEXT), encode(clip, "blurry"), sampler, scheduler, steps)
    stages = [prompt.contexts(200 * stage + 100) for stage in range(STAGES)]

    def stage_of(rows, place):
        found = [
            stage
            for stage, known in enumerate(stages)
            if any(torch.allclose(row[None], known[place].to(row), atol=1e-5) for row in rows)
        ]
        assert len(found) == 1
        return found[0]

    calls = [attention.inputs[at : at + 3] for at in range(0, len(attention.inputs), 3)]
    contexts = [(stage_of(key, 0), stage_of(value, 1)) for _, key, value in calls]
    return list(zip(sigmas, contexts, strict=True))


def discrete(sampling, zsnr=False):
    def patch(model):
        return nodes_model_advanced.ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]

    return patch


def continuous_edm(sampling):
    def patch(model):
        node = nodes_model_advanced.ModelSamplingContinuousEDM()
        return node.patch(model, sampling, 120.0, 0.002)[0]

    return patch


def continuous_v(model):
    node = nodes_model_advanced.ModelSamplingContinuousV()
    return node.patch(model, "v_prediction", 500.0, 0.03)[0]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "patch", "sigmas"),
    [
        ("euler", "normal", None, training_sigmas()),
        ("dpmpp_2m", "karras", None, training_sigmas()),
        ("ddim", "ddim_uniform", None, training_sigmas()),
        ("heun", "exponential", None, training_sigmas()),
        ("lcm", "sgm_uniform", discrete("lcm"), training_sigmas()),
        ("euler", "simple", discrete("v_prediction", zsnr=True), training_sigmas(True)),
        ("euler", "karras", continuous_edm("eps"), training_sigmas()),
        ("dpmpp_2m", "exponential", continuous_edm("edm"), training_sigmas()),
        ("euler", "exponential", continuous_v, training_sigmas()),
    ],
    ids=["euler", "karras", "ddim", "heun", "lcm", "zsnr", "edm-eps", "edm", "v"],
)
def test_the_right_stage_at_every_sigma(loaded, word, sampler, scheduler, patch, sigmas):
    one = identity(word)
    model, clip = apply(loaded, one)
    if patch is not None:
        model = patch(model)  # after Apply: the schedule in force while sampling counts
    anna = Person("person", one.key_vectors, one.value_vectors)
    prompt = Prompt(loaded[1], TEXT, {"anna": anna})
    used = recorded_stages(model, clip, prompt, sampler, scheduler)
    assert len(used) >= 8
    expected = [math.floor(STAGES * timestep_of(sigma, sigmas) / 1000) for sigma, _ in used]
    assert [stages for _, stages in used] == [(stage, stage) for stage in expected]
    assert len(set(expected)) >= 3


def test_stages_follow_the_timestep_that_the_model_is_told(loaded, word):
    """Off the grid of training sigmas too, ComfyUI rounds to the nearest timestep."""
    model, clip = apply(loaded, identity(word))
    conditioning = encode(clip, TEXT)[0][1][CONDITIONING_KEY][0]
    keys = {phase["stages"][0][0]: phase["key"] for phase in conditioning["phases"]}
    edges = np.log(training_sigmas())
    sampling = model.get_model_object("model_sampling")
    sampler = comfy.samplers.sampler_object("euler")
    for edge in (200, 400, 600, 800):
        middle = (edges[edge - 1] + edges[edge]) / 2
        for offset, stage in ((-1e-4, edge // 200 - 1), (1e-4, edge // 200)):
            sigma = torch.tensor([math.exp(middle + offset), 0.0])
            assert int(sampling.timestep(sigma[:1])) == edge - (offset < 0)
            with Attention(model) as attention:
                comfy.sample.sample_custom(
                    model, NOISE, 1.0, sampler, sigma, encode(clip, TEXT), encode(clip, ""),
                    torch.zeros_like(NOISE), disable_pbar=True,
                )  # fmt: skip
            assert torch.equal(attention.inputs[1], keys[stage])


def test_prompt_without_placeholder_costs_nothing(loaded, word, monkeypatch):
    model, clip = apply(loaded, identity(word))
    plain = encode(loaded[1], "a photo of person")[0]
    calls = []
    encoder = getattr(clip.cond_stage_model, f"clip_{next(iter(word))}")
    process = encoder.process_tokens
    monkeypatch.setattr(
        encoder, "process_tokens", lambda *given: calls.append(1) or process(*given), raising=False
    )
    registered = len(REGISTRY)
    context, extra = encode(clip, "a photo of person")[0]
    assert len(calls) == 1 and len(REGISTRY) == registered
    assert torch.equal(context, plain[0]) and extra.keys() == plain[1].keys()
    options = []
    model.set_model_unet_function_wrapper(
        lambda apply_model, arguments: (
            options.append(arguments["c"]["transformer_options"])
            or apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        )
    )
    with Attention(model) as attention:
        sample(model, [[context, extra]], encode(clip, ""), steps=1)
    assert "patches" not in options[0]
    # Without a patch ComfyUI feeds one and the same tensor to K and V.
    assert torch.equal(attention.inputs[1], attention.inputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_recognise_their_rows(loaded, word, dtype):
    model, clip = apply(loaded, identity(word))
    model.set_model_compute_dtype(dtype)
    positive = encode(clip, TEXT)
    with Attention(model) as attention:
        sample(model, positive, encode(clip, "blurry"), steps=1)
    first = positive[0][1][CONDITIONING_KEY][0]["phases"][0]
    assert first["stages"] == [[STAGES - 1, STAGES]]
    assert any(torch.equal(row[None], first["key"].to(dtype)) for row in attention.inputs[1])
    assert any(torch.equal(row[None], first["value"].to(dtype)) for row in attention.inputs[2])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_patcher_with_another_model_does_not_lose_the_identity(loaded, word, when):
    """In dynamic VRAM CLIP hooks give a CLIP such a patcher, and so does SelectCLIPDevice."""

    def swapped(clip):
        other = clip.clone()
        other.patcher = clip.patcher.clone(force_deepcopy=True)
        return other

    model, clip = loaded
    expected = encode(apply(loaded, identity(word))[1], TEXT)[0]
    encode(clip, TEXT)  # the text encoder is as it was loaded
    if when == "before":
        clip = swapped(clip)
    _, clip = apply((model, clip), identity(word))
    if when == "after":
        clip = swapped(clip)
    context, extra = encode(clip, TEXT)[0]
    assert torch.equal(context, expected[0])
    phases, wanted = (one[CONDITIONING_KEY][0]["phases"] for one in (extra, expected[1]))
    assert len(phases) == STAGES
    for phase, other in zip(phases, wanted, strict=True):
        assert torch.equal(phase["key"], other["key"])
        assert torch.equal(phase["value"], other["value"])
    assert CONDITIONING_KEY not in encode(loaded[1], TEXT)[0][1]  # the CLIP that was given


@pytest.mark.parametrize("strength_k", [1.0, 0.0])
def test_hundreds_of_prompts_do_not_pile_up(loaded, word, strength_k, monkeypatch):
    model, clip = apply(loaded, identity(word, stages=1), strength_k)
    ((context, extra),) = encode(clip, "<anna>")
    payload = extra[CONDITIONING_KEY][0]
    (phase,) = payload["phases"]
    contexts = payload["base"], phase["key"], phase["value"], payload["word"]["context"]
    size = sum({id(t): t.nbytes for t in contexts}.values())
    # The V prompt of one stage is the base, and K without strength the class word's.
    assert size == context.nbytes * (3 if strength_k else 2)
    registry = Registry(unused_bytes=16 * size)
    monkeypatch.setattr(encoding, "REGISTRY", registry)
    for number in range(100):
        encode(clip, f"<anna> {number}")
    gc.collect()
    encode(clip, "<anna>")
    assert 16 <= len(registry) <= 18
    kept = [encode(clip, f"<anna> {number}") for number in range(32)]
    assert len(registry) >= len(kept)  # each is still in use and may need its payload
    before = len(registry)
    encode(clip, "<anna> 1")
    assert len(registry) == before  # in the place of the equal one


def test_a_placeholder_in_one_of_two_prompts(monkeypatch):
    """As with CLIPTextEncodeSDXL; the other encoder has none of its tokens."""
    monkeypatch.setattr(encoding, "token_embeddings", lambda _, ids: torch.zeros(len(ids), 4))
    rows = {encoder: torch.ones(1, 2, 4) for encoder in ("l", "g")}
    half = AppliedIdentity(Identity("anna", "person", "sdxl", rows, rows), strength_k=0.5)
    tokens = {"l": [[(7, 1.0)]], "g": [[(PlaceholderToken(5, "anna", n), 1.0) for n in range(2)]]}
    identities = encoding.Identities({"anna": half})
    replacements = {"anna": {}}
    for encoder, chunks in tokens.items():
        items = [item for chunk in chunks for item, _ in chunk]
        for name, one in identities.rows(None, encoder, items, "key", {"anna": 0}).items():
            replacements[name][encoder] = one
    replaced = substitute(tokens, replacements)
    assert replaced["l"] == tokens["l"]
    torch.testing.assert_close(replaced["g"][0][1][0], torch.full((4,), 0.5))


def test_a_clip_that_nobody_uses_is_gone_at_once(loaded, word):
    """Else the weights of a checkpoint would wait for the garbage collector."""
    clip = apply(apply(loaded, identity(word)), identity(word, name="ben"))[1]
    seen = weakref.ref(clip.cond_stage_model)
    gc.disable()
    try:
        del clip
        assert seen() is None
    finally:
        gc.enable()


def test_nothing_of_a_run_stays_in_the_model(loaded, word):
    model, clip = apply(loaded, identity(word))
    sample(model, encode(clip, TEXT), encode(clip, ""))
    assert model.model_options["transformer_options"] == {}
    unet = model.model.diffusion_model
    assert not any("forward" in vars(module) for module in unet.modules())


def test_the_model_option_copies_of_other_nodes(loaded, word):
    """Cloning the patched MODEL and CLIP keeps the identity."""
    model, clip = apply(loaded, identity(word))
    expected = picture((model, clip))
    assert torch.equal(picture((model.clone(), clip.clone())), expected)
    rows = {encoder: of[None] for encoder, of in word.items()}
    other = Identity("bob", "person", family_of_encoders(tuple(word)), rows, rows)
    assert torch.equal(picture(apply((model, clip), other)), expected)


@pytest.mark.parametrize(
    ("fields", "settings", "words"),
    [
        ({"family": "cascade"}, {}, ["<anna>", "cascade", "does not fit this model"]),
        ({}, {"start": 0.7, "end": 0.3}, ["<anna>", "start_percent", "0.7", "end_percent"]),
        ({}, {"start": 0.5, "end": 0.5}, ["start_percent", "end_percent"]),
    ],
    ids=["family", "reversed-range", "empty-range"],
)
def test_bad_input_is_one_clear_sentence(loaded, word, fields, settings, words):
    with pytest.raises(SeFiError) as error:
        apply(loaded, identity(word, **fields), **settings)
    message = str(error.value)
    assert message.startswith("SeFi Apply Identity: ") and "\n" not in message
    assert all(part in message for part in words)


def test_wrong_width_is_one_clear_sentence(loaded, word):
    wide = {encoder: torch.zeros(STAGES, 1, 768) for encoder in word}
    width = next(iter(word.values())).shape[-1]
    one = Identity("anna", "person", family_of_encoders(tuple(word)), wide, wide)
    with pytest.raises(SeFiError, match=rf"^SeFi Apply Identity: .*768.*{width}"):
        apply(loaded, one)


def test_checkpoint_without_text_encoder_is_one_clear_sentence(loaded, word):
    with pytest.raises(SeFiError, match=r"^SeFi Apply Identity: the clip input is empty"):
        apply((loaded[0], None), identity(word))


def test_class_word_of_several_tokens_and_several_vectors(loaded, word):
    family = family_of_encoders(tuple(word))
    keys, values = (random_vectors(family, STAGES, seed, vectors=3, scale=0.1) for seed in (9, 10))
    one = Identity("anna", "old man", family, keys, values)
    half = picture(apply(loaded, one, 0.5, 0.5))
    full = picture(apply(loaded, one))
    none = picture(apply(loaded, one, 0.0, 0.0))
    assert not torch.equal(half, full) and not torch.equal(half, none)
    # Three positions: the class word has two tokens, the last of which is repeated.
    assert torch.equal(none, picture(loaded, TEXT.replace("<anna>", "old man man")))
