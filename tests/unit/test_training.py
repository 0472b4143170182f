"""The optimisation loop on a toy model whose best vectors are known."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.learning.loop import Prediction, optimise, smoothed
from sefi_ide.sefi_core.learning.losses import MapPair
from sefi_ide.sefi_core.learning.parametrisation import build_parametrisation
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.sefi_core.stages import stage_of_timestep
from sefi_ide.tests.unit.half_gradients import ThroughHalf

WIDTH, STAGES = 4, 5


class Toy:
    """A model whose output is the stage's K vector minus its V vector, over four pixels.

    The target is ``goals[stage]``; ``attention`` is the height of a difference between two maps.
    """

    samples = 3
    face: torch.Tensor | None = None

    def __init__(self, stages: int = STAGES, attention: float = 0.0) -> None:
        self.stages, self.attention = stages, attention
        self.goals = torch.randn(stages, WIDTH, generator=torch.Generator().manual_seed(9))
        self.batches: list = []
        self.calls = 0

    def __call__(self, keys, values, batch) -> Prediction:
        self.calls += 1
        self.batches.append(batch)
        stages = [stage_of_timestep(t, self.stages) for t in batch.timesteps]
        rows = torch.stack([keys["l"][s][0] - values["l"][s][0] for s in stages])
        target = torch.stack([self.goals[s] for s in stages])
        maps = torch.zeros(len(stages), 1, 1, 1) + self.attention
        return self._prediction(rows[..., None, None], target[..., None, None], maps)

    def _prediction(self, output, target, maps) -> Prediction:
        return Prediction(
            output=output,
            target=target,
            layers=[MapPair(maps, torch.zeros_like(maps), (1, 1))],
            placeholder=torch.ones(len(output), 1),
            face=self.face,
        )


def start(stages: int = STAGES, kind: str = "direct"):
    zeros = {"l": torch.zeros(stages, 1, WIDTH)}
    return build_parametrisation(kind, zeros, zeros, 0)


def settings(**changes) -> TrainingSettings:
    defaults = {"steps": 5, "stages": STAGES, "learning_rate": 0.05}
    defaults["attention_weight"] = 0.0
    return TrainingSettings(**{**defaults, **changes})


def learned(parameters) -> torch.Tensor:
    keys, values = parameters()
    return torch.stack(
        [(keys["l"][s][0] - values["l"][s][0]).detach() for s in range(len(keys["l"]))]
    )


def test_every_stage_learns_its_own_goal():
    toy, parameters = Toy(), start()
    history = optimise(parameters, toy, settings(steps=400))
    torch.testing.assert_close(learned(parameters), toy.goals, atol=0.05, rtol=0)
    assert history[-1].loss < 0.01 * history[0].loss
    assert [step.number for step in history] == list(range(1, 401))


def test_offsets_learn_what_stages_have_in_common_in_fewer_steps():
    """Stages that want much the same: by then five separate sets are not half as near."""
    errors = {}
    for kind in ("direct", "offsets"):
        toy, parameters = Toy(), start(kind=kind)
        toy.goals = 2.0 + 0.1 * toy.goals
        optimise(parameters, toy, settings(steps=40))
        errors[kind] = (learned(parameters) - toy.goals).abs().mean().item()
    assert errors["offsets"] < 0.5 * errors["direct"], errors


def test_offsets_learn_the_goal_of_every_stage():
    toy, parameters = Toy(), start(kind="offsets")
    optimise(parameters, toy, settings(steps=800))
    torch.testing.assert_close(learned(parameters), toy.goals, atol=0.05, rtol=0)


def test_the_same_seed_gives_the_same_vectors_and_leaves_the_global_random_state_alone():
    results = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        parameters = start()
        optimise(parameters, Toy(), settings(steps=12, seed=seed))
        assert torch.equal(state, torch.get_rng_state())
        results.append(learned(parameters))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_largest_seed_of_the_node_is_a_seed():
    optimise(start(), Toy(), settings(steps=1, seed=0xFFFFFFFFFFFFFFFF))


@pytest.mark.parametrize("stages", [1, 3, 5, 7, 30])
def test_every_round_visits_every_stage_once(stages):
    toy = Toy(stages)
    optimise(start(stages), toy, settings(steps=4 * stages, stages=stages))
    visits = [stage_of_timestep(batch.timesteps[0], stages) for batch in toy.batches]
    for first in range(0, len(visits), stages):
        assert sorted(visits[first : first + stages]) == list(range(stages))


def test_draws_cover_all_timesteps_samples_and_templates():
    toy = Toy()
    optimise(start(), toy, settings(steps=250, batch_size=4, templates=("a <name>", "the <name>")))
    timesteps = [t for batch in toy.batches for t in batch.timesteps]
    assert len(timesteps) == 1000
    assert min(timesteps) < 10 and max(timesteps) > 989 and max(timesteps) < 1000
    stages = Counter(stage_of_timestep(t, STAGES) for t in timesteps)
    assert stages == dict.fromkeys(range(STAGES), 200)
    assert len({t % 200 for t in timesteps}) > 190  # and within the stages they are uniform
    assert {i for batch in toy.batches for i in batch.samples} == set(range(toy.samples))
    assert {i for batch in toy.batches for i in batch.templates} == {0, 1}
    assert len({batch.noise_seed for batch in toy.batches}) == 250


def test_the_attention_loss_is_weighed_by_lambda():
    step = optimise(start(), Toy(attention=0.5), settings(steps=1, attention_weight=0.003))[0]
    assert step.attention == pytest.approx(0.25 * 32 * 32)
    assert step.loss == pytest.approx(step.noise + 0.003 * step.attention)
    step = optimise(start(), Toy(attention=0.5), settings(steps=1, attention_weight=0.0))[0]
    assert step.loss == step.noise and step.attention == 0


def test_the_leak_is_weighed_and_needs_a_mask():
    """All attention of the toy is on its one cell, of which the face covers a quarter."""
    toy = Toy(attention=0.5)
    assert optimise(start(), toy, settings(steps=1))[0].leak == 0
    toy.face = torch.full((1, 1, 4, 4), 0.25)
    step = optimise(start(), toy, settings(steps=1, leak_weight=2.0))[0]
    assert step.leak == pytest.approx(0.75)
    assert step.loss == pytest.approx(step.noise + 2.0 * 0.75)
    step = optimise(start(), toy, settings(steps=1, leak_weight=0.0))[0]
    assert step.loss == step.noise and step.leak == 0


def test_the_learning_rate_ends_at_nothing():
    parameters, rows = start(stages=1), []
    toy = Toy(stages=1)
    toy.goals += 100  # far away: every step is as long as the learning rate
    optimise(
        parameters,
        toy,
        settings(steps=60, stages=1),
        lambda step: rows.append(learned(parameters)),
    )
    lengths = [(b - a).norm().item() for a, b in zip(rows, rows[1:], strict=False)]
    assert lengths[-1] < 0.1 * max(lengths)
    assert max(lengths[:20]) == max(lengths)


def test_without_diffusers_the_error_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.optimization", None)
    with pytest.raises(SeFiError, match="import of diffusers.optimization.*pip install -U diff"):
        optimise(start(), Toy(), settings(steps=1))


def test_on_step_may_stop_and_the_finished_steps_stay():
    class Stop(Exception):
        pass

    def stop_at_three(step):
        if step.number == 3:
            raise Stop

    stopped, whole, toy, rows = start(), start(), Toy(), []
    with pytest.raises(Stop):
        optimise(stopped, toy, settings(steps=10), stop_at_three)
    optimise(whole, Toy(), settings(steps=10), lambda step: rows.append(learned(whole)))
    assert toy.calls == 3
    assert torch.equal(learned(stopped), rows[2]) and not torch.equal(rows[2], rows[-1])


@pytest.mark.parametrize(
    ("first", "said"), [(1, "before anything is learned.*fp32"), (2, "step 2.*learning_rate")]
)
def test_a_loss_that_is_no_number_stops_with_a_remedy(first, said):
    """At the first step it is not the learning rate's fault."""

    class Broken(Toy):
        def _prediction(self, output, target, maps):
            broken = float("nan") if self.calls >= first else 1.0
            return super()._prediction(output * broken, target, maps)

    parameters = start()
    before = learned(parameters)
    with pytest.raises(SeFiError, match=said):
        optimise(parameters, Broken(), settings())
    assert torch.equal(learned(parameters), before) is (first == 1)


class Half(Toy):
    """Gradients that pass through half precision: they vanish without a loss scale."""

    def _prediction(self, output, target, maps):
        return super()._prediction(ThroughHalf.apply(output), target, maps)


def test_the_loss_scale_saves_small_gradients_and_changes_no_step():
    exact, lost, scaled = start(), start(), start()
    optimise(exact, Toy(), settings())
    optimise(lost, Half(), settings())
    optimise(scaled, Half(), settings(), loss_scale=2.0**16)
    torch.testing.assert_close(learned(scaled), learned(exact), rtol=1e-2, atol=1e-4)
    assert (learned(lost) - learned(exact)).abs().max() > 1e-2


def test_an_overflow_halves_the_scale_and_repeats_the_step():
    toy, parameters, exact = Half(), start(), start()
    history = optimise(parameters, toy, settings(), loss_scale=2.0**50)
    optimise(exact, Toy(), settings())
    assert toy.calls > 5 and len(history) == 5
    assert len({batch.noise_seed for batch in toy.batches}) == 5  # repeated, not skipped
    torch.testing.assert_close(learned(parameters), learned(exact), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"stages": 0}, "stages"),
        ({"stages": 1001}, "stages"),
        ({"vectors": 0}, "vectors"),
        ({"vectors": 76}, "vectors is 76.*75 or less"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"attention_weight": -1.0}, "attention_weight"),
        ({"attention_weight": float("inf")}, "attention_weight"),
        ({"leak_weight": -0.5}, "leak_weight"),
        ({"background_weight": -0.1}, "background_weight"),
        ({"parametrisation": "magic"}, "parametrisation"),
        ({"dtype": "int4"}, "dtype"),
        ({"templates": ()}, "templates"),
        ({"resolution": 32}, "resolution"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, said):
    with pytest.raises(SeFiError, match=said):
        settings(**change)


def test_settings_can_be_stored_as_json():
    import json

    stored = json.loads(json.dumps(TrainingSettings().as_json()))
    assert stored["steps"] == TrainingSettings().steps
    lists = {name: tuple(stored[name]) for name in ("templates", "captions")}
    assert TrainingSettings(**{**stored, **lists}) == TrainingSettings()


def test_the_papers_configuration_is_one_of_the_settings():
    """Its five stages are the default; the rest of it stays selectable."""
    assert TrainingSettings().stages == 5 and TrainingSettings().attention_weight == 0.003
    TrainingSettings(parametrisation="direct", leak_weight=0, background_weight=1, captions=())


@pytest.mark.parametrize("kind", ["direct", "shared", "self-attention"])
def test_settings_of_before_vectors_and_offsets_are_still_settings(kind):
    stored = TrainingSettings(parametrisation=kind, stages=1).as_json()
    del stored["vectors"]
    again = TrainingSettings(**stored)
    assert (again.parametrisation, again.stages, again.vectors) == (kind, 1, 1)


def test_smoothing_is_a_running_mean():
    assert smoothed([4.0, 0.0, 2.0, 6.0], width=2) == [4.0, 2.0, 1.0, 4.0]
    assert smoothed([]) == []
