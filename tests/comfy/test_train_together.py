"""Several people trained in one batch are learned exactly as each of them alone."""

from __future__ import annotations

import re

import pytest
import torch
from sefi_ide.sefi_core.comfyui.learning.together import Person, train_identities
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.photos import Photo
from sefi_ide.sefi_core.learning.settings import TrainingSettings

from .random_checkpoint import of_all_families
from .training_runs import load, photo_and_mask

SETTINGS = TrainingSettings(
    steps=3, stages=3, resolution=64, templates=("a photo of <name>", "(<name>:1.2) there"),
    learning_rate=0.02, preview_every=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


def person(name, shade, photos=1, masked=True, caption=""):
    picture, mask = photo_and_mask()
    taken = [
        Photo(picture[0].roll(7 * n, 1) * shade, mask[0].roll(7 * n, 1) if masked else None)
        for n in range(photos)
    ]
    return Person(name, taken, (caption,))


PEOPLE = [
    person("anna", 1.0, photos=2, caption="smiling"),
    person("ben", 0.6, masked=False),
    person("anna", 0.3, caption="in the snow"),  # another of the same name
]


def alone(models, one, settings=SETTINGS):
    return train_identity(
        *models, one.photos, one.name, "person", settings.with_captions(one.captions)
    ).identity


@of_all_families
@pytest.mark.parametrize("changes", ({}, {"batch_size": 2, "background_target": "class word"}))
def test_each_is_learned_as_alone(models, family, changes):
    settings = TrainingSettings(**{**SETTINGS.as_json(), **changes})
    steps, said = [], []
    found = train_identities(
        *models, PEOPLE, "person", settings, 8, said.append, lambda *done: steps.append(done)
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert any(lines[1:] == ["looking at the photos", "waiting"] for lines in said)
    assert all(re.fullmatch(r"step 3 of 3, loss \d+\.\d{4}", line) for line in said[-1])
    for one, identity in zip(PEOPLE, found, strict=True):
        assert isinstance(identity, Identity)
        wanted = alone(models, one, settings)
        assert (identity.name, identity.training) == (wanted.name, wanted.training)
        assert identity.thumbnail == wanted.thumbnail
        for role in ("key_vectors", "value_vectors"):
            for encoder, rows in getattr(wanted, role).items():
                # AdamW makes much of the rounding of a gradient that is nearly nothing.
                apart = (getattr(identity, role)[encoder] - rows).abs()
                assert apart.max() < 1e-3 and apart.mean() < 1e-5
    first, _, third = (one.key_vectors["l" if "l" in one.key_vectors else "h"] for one in found)
    assert not torch.allclose(first, third, atol=1e-3)


def test_groups_follow_each_other_and_a_bad_photo_stops_nobody(models):
    bad = Person("carl", [Photo(torch.full((64, 64, 3), float("nan")), None)], ("",))
    name = Person("no name", PEOPLE[0].photos, ("",))
    steps, said = [], []
    found = train_identities(
        *models, [PEOPLE[0], bad, name, PEOPLE[1]], "person", SETTINGS, 2,
        said.append, lambda *done: steps.append(done),
    )  # fmt: skip
    assert said[-1][1:3] == [str(found[1]), str(found[2])]
    assert said[-1][0].startswith("step 3 of 3") and said[-1][3].startswith("step 3 of 3")
    assert any(lines[0].startswith("step 3") and lines[3] == "waiting" for lines in said)
    assert steps == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    assert isinstance(found[1], SeFiError) and "vae" in str(found[1])
    assert isinstance(found[2], SeFiError) and "no name" in str(found[2])
    for place, one in ((0, PEOPLE[0]), (3, PEOPLE[1])):
        wanted = alone(models, one)
        torch.testing.assert_close(
            found[place].key_vectors["l"], wanted.key_vectors["l"], atol=2e-5, rtol=1e-4
        )


def test_the_random_state_and_the_models_stay_as_they_are(models):
    model, clip, _ = models
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    train_identities(*models, PEOPLE[:1], "person", SETTINGS, 2)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(parameter.requires_grad and parameter.grad is not None
                   for parameter in clip.cond_stage_model.parameters())  # fmt: skip
