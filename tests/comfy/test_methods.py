"""The methods that the quality benchmark compares are what their titles say."""

import pytest
import torch
from sefi_ide.benchmarks import lora, methods, subjects
from sefi_ide.sefi_core.identity.file import to_bytes
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.tools.comfyui import REPOSITORY

NOT_PREPARED = {"background_weight": 1.0, "captions": ()}
FREE = {"attention_weight": 0.0, "leak_weight": 0.0}
STAGES = TrainingSettings().stages


@pytest.mark.parametrize(
    ("method", "stages", "split", "settings"),
    [
        ("textual_inversion", 1, False, {**FREE, **NOT_PREPARED}),
        ("textual_inversion_prepared", 1, False, FREE),
        ("per_stage_5", 5, False, {**FREE, **NOT_PREPARED}),
        ("per_stage_10", 10, False, {**FREE, **NOT_PREPARED}),
        ("sefi_paper", 5, True, {"attention_weight": 0.003, "leak_weight": 0.0, **NOT_PREPARED}),
        ("sefi_no_attention_loss", 1, True, FREE),
        ("sefi_swept", 1, True, {}),
        ("sefi", STAGES, True, {}),
    ],
)
def test_methods_are_what_their_titles_say(mini, monkeypatch, method, stages, split, settings):
    """Everything else is the pack's default, and what ``learn`` tells of cost is of this method."""
    trained = methods.train_identity
    used, results = [], []

    def train(*arguments):
        used.append(next(a for a in arguments if isinstance(a, TrainingSettings)))
        results.append(trained(*arguments))
        return results[-1]

    monkeypatch.setattr(methods, "train_identity", train)
    photos = subjects.Subject(1, 0).photos(1)
    learned = methods.learn(mini, method, photos, "person", {"steps": 2})
    (identity,) = (result.identity for result in results)
    for name in ("attention_weight", "leak_weight", "background_weight", "captions"):
        wanted = settings.get(name, getattr(TrainingSettings(), name))
        assert getattr(used[0], name) == wanted
    assert identity.key_vectors["l"].shape[0] == stages
    assert torch.equal(identity.key_vectors["l"], identity.value_vectors["l"]) is not split
    assert learned.seconds > 0 and learned.size == len(to_bytes(identity))


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


@pytest.mark.parametrize("kind", ["person", "robot"])
def test_whatever_learns_has_settings_of_a_sweep_but_the_defaults(kind):
    learning = {*methods.IDENTITY_METHODS, methods.LORA}
    assert methods.TITLES.keys() == learning | {"class_word", "named"}
    for method in methods.TITLES:
        wanted = {"learning_rate", "steps"} if method in learning - {"sefi"} else set()
        assert methods.swept(method, kind).keys() == wanted
    page = f"sweep_{'people' if kind == 'person' else 'robots'}.md"
    lines = (REPOSITORY / "docs" / page).read_text(encoding="utf-8").splitlines()
    titles = {**methods.TITLES, "sefi_swept": "SeFi"}
    titles["sefi_no_attention_loss"] = "SeFi (without attention loss)"
    for method in methods.SWEPT[kind]:
        best = next(line for line in lines if line.startswith(f"| {titles[method]} |"))
        rate, steps = methods.SWEPT[kind][method]
        assert best.startswith(f"| {titles[method]} | {rate:g} | {steps} | 12 |")
