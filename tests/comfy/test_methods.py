"""The methods that the quality benchmark compares are what their titles say."""

import pytest
import torch
from sefi_ide.benchmarks import lora, measures, methods, subjects
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.learning.settings import TrainingSettings

from .learning import learned

NOT_PREPARED = {"background_weight": 1.0, "captions": ()}
FREE = {"attention_weight": 0.0, "leak_weight": 0.0}


@pytest.mark.parametrize(
    ("method", "stages", "split", "settings"),
    [
        ("textual_inversion", 1, False, {**FREE, **NOT_PREPARED}),
        ("textual_inversion_prepared", 1, False, FREE),
        ("per_stage_5", 5, False, {**FREE, **NOT_PREPARED}),
        ("per_stage_10", 10, False, {**FREE, **NOT_PREPARED}),
        ("sefi_paper", 5, True, {"attention_weight": 0.003, "leak_weight": 0.0, **NOT_PREPARED}),
        ("sefi_no_attention_loss", 1, True, FREE),
        ("sefi", 1, True, {}),
    ],
)
def test_methods_are_what_their_titles_say(mini, monkeypatch, method, stages, split, settings):
    """Everything else is the pack's default, and what ``learn`` tells of cost is of this method."""
    trained = methods.train_identity
    used = []

    def train(*arguments):
        used.append(next(a for a in arguments if isinstance(a, TrainingSettings)))
        return trained(*arguments)

    monkeypatch.setattr(methods, "train_identity", train)
    photos = subjects.Subject(1, 0).photos(1)
    identity = methods.learn_identity(mini, method, photos, "person", {"steps": 2})
    for name in ("attention_weight", "leak_weight", "background_weight", "captions"):
        wanted = settings.get(name, getattr(TrainingSettings(), name))
        assert getattr(used[0], name) == wanted
    assert identity.key_vectors["l"].shape[0] == stages
    assert torch.equal(identity.key_vectors["l"], identity.value_vectors["l"]) is not split
    learned = methods.learn(mini, method, photos, "person", {"steps": 2})
    assert learned.seconds > 0 and learned.size == pytest.approx(len(to_bytes(identity)), rel=0.02)


def test_the_lora_is_trained_as_it_was_asked_and_then_applied(mini, monkeypatch):
    asked = []

    def train(model, latents, conditioning, **settings):
        asked.append((latents.shape[0], settings))
        return lora.train_lora(model, latents, conditioning, **settings)

    monkeypatch.setattr(methods, "train_lora", train)
    photos = subjects.Subject(1, 0).photos(2)
    overrides = {"steps": 2, "learning_rate": 0.01}
    known = methods.learn(mini, "lora", photos, "person", overrides)
    assert asked == [(2, {"seed": 0, **overrides})]
    assert known.word == "person" and known.seconds > 0 and known.size > 100_000
    assert known.model.patches and not mini.model.patches


def test_an_identity_can_be_drawn_at_other_strengths(mini):
    photos = subjects.Subject(1, 0).photos(1)

    def drawn(**settings):
        known = methods.learn(mini, "sefi", photos, "person", {"steps": 2, **settings})
        return measures.draw(mini, known, [{"scene": "beach"}], [1], "person")

    nothing_learned = drawn(learning_rate=1e-8)
    without, values = (
        drawn(learning_rate=0.05, strength_k=0.0, strength_v=strength) for strength in (0.0, 1.0)
    )
    torch.testing.assert_close(without, nothing_learned, atol=2e-3, rtol=0)
    assert (values - without).abs().mean() > 5e-3


def test_training_can_start_elsewhere_and_look_at_other_levels(mini):
    zero, random, usual = (
        learned(mini, initial=initial, learning_rate=1e-6).key_vectors["l"]
        for initial in ("zero", "random", "class word")
    )
    assert zero.abs().max() < 1e-4 < random.std()
    assert (usual - random).abs().mean() > 0.01
    half, quarter = (learned(mini, levels=levels).key_vectors["l"] for levels in ([2], [4]))
    assert not torch.equal(half, quarter)
