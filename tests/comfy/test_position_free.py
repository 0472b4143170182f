"""Identities whose vectors take the place of token and position together, as Face2Diffusion's S*.

Against the text encoder itself with the sum of both overwritten, wherever two marked words stand:
nothing here counts places.
"""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding, position_embeddings
from sefi_ide.sefi_core.comfyui.clip.tokens import encoder_models
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.file import from_bytes, to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Batch

from .random_checkpoint import of_all_families, widths
from .training_runs import CHANNELS, load, random_vectors

MARKS = "zebra", "cactus"
"""Two words of one token each, in no prompt; they stand where the two vectors shall."""

PROMPTS = {
    "plain": "a photo of <anna> at the beach",
    "weighted": "a photo of (<anna>:1.4) at the (beach:0.7)",
    "twice": "<anna> beside <anna>, smiling",
    "second chunk": "very " * 80 + "fine photo of <anna>",
    "split by the end of a chunk": "very " * 74 + "<anna> here",
    "behind an embedding": "embedding:three <anna> and embedding:three <anna>",
    "behind one that does not fit": "embedding:wide <anna> and <anna>",
    "cut off": "embedding:three " * 25 + "and <anna>",
}


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory, family):
    """Textual inversions of three vectors, and one of a width that no encoder has."""
    folder = tmp_path_factory.mktemp("embeddings")
    generator = torch.Generator().manual_seed(7)
    three = {
        f"clip_{name}" if name in "lg" else "emb_params": torch.randn(3, w, generator=generator)
        for name, w in widths(family).items()
    }
    if set(three) == {"clip_l"}:
        three = {"emb_params": three["clip_l"]}
    safetensors.torch.save_file(three, folder / "three.safetensors")
    wide = torch.randn(2, 7, generator=generator)
    safetensors.torch.save_file({name: wide.clone() for name in three}, folder / "wide.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def models(mini_checkpoint, embeddings):
    model, clip, vae = load(mini_checkpoint)
    for part in vars(clip.tokenizer).values():
        if hasattr(part, "embedding_directory"):
            part.embedding_directory = embeddings
    return model, clip, vae


def identity(family, stages=1, scale=0.3):
    rows = random_vectors(family, stages, seed=8, vectors=2, scale=scale)
    return Identity("anna", "person", family, rows, rows, position_free=True)


def overwritten(clip, prompt, vectors):
    """``prompt`` encoded with these rows (2, width) of each encoder where the marks stand."""
    words = class_word_embedding(clip, " ".join(MARKS))
    hooks = []
    for name, model in encoder_models(clip).items():
        assert len(words[name]) == 2

        places = []

        def find(module, args, kwargs, name=name, places=places):
            places[:] = [(kwargs["embeds"] == mark).all(-1) for mark in words[name]]

        def overwrite(module, args, name=name, places=places):
            summed = args[0].clone()
            for place, row in zip(places, vectors[name], strict=True):
                summed[place] = row
            return (summed, *args[1:])

        text_model = model.transformer.text_model
        hooks.append(text_model.register_forward_pre_hook(find, with_kwargs=True))
        hooks.append(text_model.encoder.register_forward_pre_hook(overwrite))
    try:
        tokens = clip.tokenize(prompt.replace("<anna>", " ".join(MARKS)))
        return clip.encode_from_tokens(tokens, return_pooled=True)
    finally:
        for hook in hooks:
            hook.remove()


@of_all_families
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_sum_of_token_and_position_is_overwritten(models, family, prompt):
    model, clip, _ = models
    anna = identity(family)
    with torch.inference_mode():
        _, applied = apply_identity(model, clip, AppliedIdentity(anna))
        found = applied.encode_from_tokens(applied.tokenize(prompt), return_pooled=True)
        wanted = overwritten(clip, prompt, {n: rows[0] for n, rows in anna.value_vectors.items()})
        word = clip.encode_from_tokens(clip.tokenize(prompt.replace("<anna>", "person")))
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    if wanted[1] is not None:
        torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=1e-5)
    if not prompt.startswith("embedding:three embedding:three"):
        assert not torch.allclose(found[0], word, atol=1e-2)


@of_all_families
def test_the_strength_goes_from_the_class_word_to_the_vectors(models, family):
    """Half of the way is the middle of both sums; none of it is the class word itself."""
    model, clip, _ = models
    anna, prompt = identity(family), "a photo of <anna>"
    with torch.inference_mode():
        found = {}
        for strength in (0.0, 1e-6, 0.5):
            one = AppliedIdentity(anna, strength, strength)
            _, applied = apply_identity(model, clip, one)
            found[strength] = applied.encode_from_tokens(applied.tokenize(prompt))
        word = class_word_embedding(clip, "person")
        middle = {}
        for name, encoder in encoder_models(clip).items():
            places = position_embeddings(encoder)[4:6]  # behind start, "a", "photo", "of"
            middle[name] = (anna.value_vectors[name][0] + word[name] + places) / 2
        wanted = overwritten(clip, prompt, middle)[0]
        # The placeholder takes two places of the prompt.
        plain = clip.encode_from_tokens(clip.tokenize("a photo of person person"))
    torch.testing.assert_close(found[0.5], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0.0], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1e-6], plain, atol=1e-4, rtol=1e-4)


@of_all_families
def test_it_is_trained_as_it_is_drawn(models, family):
    """The denoiser's contexts are those of SeFi Apply Identity, and carry gradients."""
    model, clip, _ = models
    anna = identity(family)
    latents = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    prompt = "(a photo:1.2) of <name>"
    with torch.inference_mode(False), torch.enable_grad():
        denoiser = ComfyDenoiser(model, clip, [anna], (prompt,), latents, None, with_maps=False)
        seen = []
        unet = denoiser.model.model.diffusion_model
        hook = unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True
        )
        try:
            with torch.no_grad():
                denoiser(anna.key_vectors, anna.key_vectors, Batch([0], [0], [500], 1))
        finally:
            hook.remove()
    with torch.inference_mode():
        _, applied = apply_identity(model, clip, AppliedIdentity(anna))
        wanted = applied.encode_from_tokens(applied.tokenize(prompt.replace("<name>", "<anna>")))
    torch.testing.assert_close(seen[0], wanted, atol=1e-5, rtol=1e-5)


def test_its_file_says_so(family):
    anna = identity(family, stages=2)
    again = from_bytes(to_bytes(anna), "anna.safetensors")
    assert again.position_free and again.same_content(anna)
    plain = copy.copy(anna)
    object.__setattr__(plain, "position_free", False)
    assert not from_bytes(to_bytes(plain), "anna.safetensors").same_content(anna)
    assert b"position-free" not in to_bytes(plain)
