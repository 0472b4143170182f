"""The random miniature is a usable stand-in: finite, of sane size, and it obeys its prompt."""

import comfy.sample
import torch
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS


def test_one_word_changes_the_picture(mini_sd):
    model, clip, vae = mini_sd
    noise = torch.randn(1, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))

    def encode(prompt):
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    def sample(prompt):
        start = torch.zeros_like(noise)
        return comfy.sample.sample(
            model, noise, 4, 7.0, "euler", "normal", encode(prompt), encode(""), start
        )

    with torch.inference_mode():
        beach, castle = sample("a person at the beach"), sample("a person at the castle")
        picture, again = vae.decode(beach), vae.decode(castle)
    assert 2 < beach.std() < 12  # Stable Diffusion's own latents: about 5.5
    assert (beach - castle).std() > 0.1 * beach.std()
    assert 0.1 < picture.std() < 0.4
    assert (picture - again).abs().mean() > 0.02
