"""Mixing two identities."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.file import from_bytes, to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.mixing import MIXED_OF, mix
from sefi_ide.sefi_core.identity.thumbnail import picture_in, thumbnail_of
from sefi_ide.sefi_core.stages import stage_of_timestep


def identity(name, stages=5, vectors=1, seed=1, colour=None, **fields):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        {"l": torch.randn(stages, vectors, 8, generator=generator)} for _ in ("keys", "values")
    )
    picture = None if colour is None else thumbnail_of(torch.tensor(colour).expand(90, 60, 3))
    fields = {"class_word": "person", "family": "sd1", **fields}
    return Identity(name=name, key_vectors=keys, value_vectors=values, thumbnail=picture, **fields)


ANNA, BEN = identity("anna", seed=1), identity("ben", seed=2)


def test_between_two():
    mixed = mix(ANNA, BEN, 0.25, 0.6)
    assert mixed.name == "anna_ben" and mixed.class_word == "person"
    keys = 0.75 * ANNA.key_vectors["l"] + 0.25 * BEN.key_vectors["l"]
    values = 0.4 * ANNA.value_vectors["l"] + 0.6 * BEN.value_vectors["l"]
    torch.testing.assert_close(mixed.key_vectors["l"], keys)
    torch.testing.assert_close(mixed.value_vectors["l"], values)


def test_at_the_ends_it_is_the_one_or_the_other_bit_by_bit():
    short = identity("ben", stages=1, vectors=3, seed=2)
    for ratio, one in ((0.0, ANNA), (1.0, short)):
        mixed = mix(ANNA, short, ratio, ratio)
        assert torch.equal(mixed.key_vectors["l"], one.key_vectors["l"])
        assert torch.equal(mixed.value_vectors["l"], one.value_vectors["l"])
    crossed = mix(ANNA, BEN, 0.0, 1.0, "both")
    assert torch.equal(crossed.key_vectors["l"], ANNA.key_vectors["l"])
    assert torch.equal(crossed.value_vectors["l"], BEN.value_vectors["l"])


@pytest.mark.parametrize(
    ("first", "second", "stages"), [(1, 5, 5), (5, 1, 5), (5, 10, 10), (4, 6, 12), (1, 1, 1)]
)
def test_at_every_timestep_the_two_are_mixed_that_would_be_drawn(first, second, stages):
    one, other = identity("anna", first, 1, 3), identity("ben", second, 3, 4)
    mixed = mix(one, other, 0.5, 0.5)
    assert (mixed.stages, mixed.vectors) == (stages, 3)
    for t in range(1000):
        a, b, found = (
            of.value_vectors["l"][stage_of_timestep(t, of.stages)] for of in (one, other, mixed)
        )
        torch.testing.assert_close(found, (a.expand(3, -1) + b) / 2)


def test_stages_that_have_no_small_common_number():
    mixed = mix(identity("anna", 7), identity("ben", 15, seed=2), 0.5, 0.5)
    assert mixed.stages == 100


def test_what_it_is_of_stays_short_however_often_it_is_mixed():
    carl = identity("carl", seed=3)
    mixed = mix(mix(ANNA, BEN, 0.5, 0.5), carl, 0.5, 0.0)
    told = {part["name"]: (part["k"], part["v"]) for part in mixed.training[MIXED_OF]}
    assert told == {"anna": (0.25, 0.5), "ben": (0.25, 0.5), "carl": (0.5, 0.0)}
    for _ in range(8):
        mixed = mix(mixed, mix(ANNA, carl, 0.5, 0.5), 0.5, 0.5, "mix")
    assert len(mixed.training[MIXED_OF]) == 3
    assert from_bytes(to_bytes(mixed), "mix.safetensors").same_content(mixed)


@pytest.mark.parametrize("parts", [7, [7], [{"name": 1}], [{}] * 1000, {"a": 1}])
def test_settings_of_a_file_that_say_something_else(parts):
    strange = identity("anna", training={MIXED_OF: parts})
    told = mix(strange, BEN, 0.5, 0.5).training[MIXED_OF]
    assert [part["name"] for part in told] == ["anna", "ben"]


def test_both_faces_are_side_by_side():
    red, blue = identity("anna", colour=(1.0, 0, 0)), identity("ben", seed=2, colour=(0, 0, 1.0))
    picture = picture_in(mix(red, blue, 0.5, 0.5).thumbnail).float()
    assert picture.shape == (128, 256, 3)
    assert picture[:, :110, 0].mean() > 200 > 50 > picture[:, :110, 2].mean()
    assert picture[:, 146:, 2].mean() > 200 > 50 > picture[:, 146:, 0].mean()
    assert mix(red, blue, 1, 1).thumbnail == blue.thumbnail
    assert mix(red, BEN, 0.5, 0.5).thumbnail == red.thumbnail
    assert mix(ANNA, BEN, 0.5, 0.5).thumbnail is None


@pytest.mark.parametrize(
    ("second", "changes", "said"),
    [
        (identity("ben", family="sdxl"), {}, "<ben> was learned on SDXL"),
        (identity("ben", class_word="man"), {}, "class_word is empty .* person and man: write"),
        (identity("ben", position_free=True), {}, "only <ben> is of SeFi Predict Identity"),
        (BEN, {"ratio_k": 1.5}, "ratio_k is 1.5: set it to 1 or less"),
        (BEN, {"ratio_v": float("nan")}, "ratio_v is not a number"),
        (BEN, {"name": "a b"}, "the name 'a b' cannot be used"),
        (BEN, {"class_word": "<x>"}, "the class word"),
        (identity("b" * 64), {}, "the name has 69 characters"),
    ],
)
def test_what_does_not_go_together_is_one_clear_sentence(second, changes, said):
    with pytest.raises(SeFiError, match=said) as caught:
        mix(**{"first": ANNA, "second": second, "ratio_k": 0.5, "ratio_v": 0.5, **changes})
    assert "\n" not in str(caught.value)


def test_a_class_word_can_be_chosen():
    assert mix(ANNA, identity("ben", class_word="man"), 0.5, 0.5, "", "man").class_word == "man"
