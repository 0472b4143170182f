"""Captions of photos in training, and the expression that the model itself sees in a face."""

import comfy.model_management
import pytest
import torch
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Batch
from sefi_ide.sefi_core.learning.photos import Photo
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.tests.mini_sd import render, wishes, world

SIDE = 128
PEOPLE = (1, 2, 3, 4, 5, 6)


def photo_of(number: int, expression: str, scene: str = "plain") -> Photo:
    wish = {"expression": expression, "scene": scene, "object": "book"}
    rendering = render.render(wishes.shot_of(world.unseen_look(number), "person", wish, number))
    picture, head = rendering.picture, rendering.regions[0]["head"]
    return Photo(*(torch.from_numpy(plane.copy()).float() / 255 for plane in (picture, head)))


def train(mini, photos, **settings):
    chosen = TrainingSettings(**{"steps": 1, "resolution": SIDE, "preview_every": 0, **settings})
    with torch.inference_mode():
        return train_identity(mini.model, mini.clip, mini.vae, photos, "anna", "person", chosen)


def captions_of(result) -> list[str]:
    return result.identity.training["captions"]


def test_the_model_sees_a_smile_and_surprise_and_nothing_in_a_neutral_face(mini):
    expressions = ("smiling", "surprised", "neutral")
    photos = [photo_of(number, expression) for expression in expressions for number in PEOPLE]
    found = captions_of(train(mini, photos))
    smiling, surprised, neutral = (found[first : first + 6] for first in (0, 6, 12))
    assert smiling.count("smiling") >= 5
    assert surprised.count("surprised") >= 4 and "smiling" not in surprised
    assert neutral.count("") >= 5


def test_captions_of_the_user_are_taken_as_they_are(mini):
    photos = [photo_of(1, "smiling"), photo_of(1, "sad", scene="beach")]
    assert captions_of(train(mini, photos, captions=("", "sad on the beach"))) == [
        "",
        "sad on the beach",
    ]
    assert captions_of(train(mini, photos, captions=())) == ["", ""]
    seen = captions_of(train(mini, photos, captions=("auto", "on the beach")))
    assert seen == ["smiling", "on the beach"]
    assert captions_of(train(mini, photos, captions=("Auto", "on the beach"))) == seen


def test_captions_change_what_is_learned(mini):
    photos = [photo_of(1, "smiling")]
    plain, said = (
        train(mini, photos, steps=4, captions=captions).identity.value_vectors["l"]
        for captions in ((), ("smiling",))
    )
    assert not torch.allclose(plain, said)


def test_too_many_captions_are_refused_before_any_work(mini):
    with pytest.raises(SeFiError, match="3 lines for 2 photos"):
        train(mini, [photo_of(1, "smiling")] * 2, captions=("smiling", "sad", "angry"))


def test_a_caption_is_the_rest_of_the_sample_s_prompt(mini):
    rows = class_word_embedding(mini.clip, "person")
    vectors = {encoder: embedding[None] for encoder, embedding in rows.items()}
    identity = Identity("anna", "person", "sd1", vectors, vectors)
    latents = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(0))

    def denoiser_of(templates, captions=None):
        return ComfyDenoiser(mini.model, mini.clip, [identity], templates, latents, None, captions)

    def predictions(denoiser, template):
        with torch.no_grad():
            batch = Batch([0, 1], [template, template], [300, 700], 5)
            return denoiser(vectors, vectors, batch)

    templates = ["a picture of <name>", "a photo of <name>"]
    mixed = denoiser_of(templates, ["", "smiling"])
    found = predictions(mixed, 1)
    for sample, prompt in enumerate(("a photo of <name>", "a photo of <name> smiling")):
        alone = predictions(denoiser_of([prompt]), 0)
        assert torch.allclose(found.output[sample], alone.output[sample], atol=1e-5)
        assert found.placeholder[sample].sum() == 1
        assert torch.equal(found.placeholder[sample], alone.placeholder[sample])
    plain = predictions(denoiser_of(templates), 1)
    assert not torch.allclose(found.output[1], plain.output[1], atol=1e-3)


def test_looking_for_expressions_can_be_cancelled(mini):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(mini, [photo_of(1, "smiling")])
