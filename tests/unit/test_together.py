"""Several people learned in one batch, against each of them alone, on a toy."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.learning.loop import Prediction, optimise
from sefi_ide.sefi_core.learning.losses import MapPair
from sefi_ide.sefi_core.learning.parametrisation import build_parametrisation
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.sefi_core.learning.together import Learner, optimise_together
from sefi_ide.sefi_core.stages import stage_of_timestep

WIDTH, STAGES, PICTURES = 4, 3, 2
SETTINGS = TrainingSettings(steps=12, stages=STAGES, learning_rate=0.05, seed=5, batch_size=2)


class Toy:
    """Each sample has a goal; ``overflows`` are samples whose gradients do, above a scale."""

    def __init__(self, samples=range(PICTURES), overflows=(), broken=None):
        generator = torch.Generator().manual_seed(3)
        self.goals = torch.randn(20, WIDTH, generator=generator)
        self.numbers, self.overflows, self.broken = list(samples), overflows, broken
        self.asked = []

    @property
    def samples(self):
        return len(self.numbers)

    def __call__(self, keys, values, batch):
        numbers = [self.numbers[sample] for sample in batch.samples]
        return self.predict([(keys, values, batch._replace(samples=numbers))])

    def predict(self, asked):
        self.asked.append([batch.samples for *_, batch in asked])
        outputs, targets, maps = [], [], []
        for keys, values, batch in asked:
            for number, timestep in zip(batch.samples, batch.timesteps, strict=True):
                stage = stage_of_timestep(timestep, STAGES)
                row = keys["l"][stage][0] - values["l"][stage][0]
                if number in self.overflows:
                    row = Overflow.apply(row)
                if number == self.broken:
                    row = row * float("nan")
                outputs.append(row)
                targets.append(self.goals[number] + timestep / 1000)
                maps.append(keys["l"][stage][0].sum())
        maps = torch.stack(maps)[:, None, None, None]
        return Prediction(
            torch.stack(outputs)[..., None, None],
            torch.stack(targets)[..., None, None],
            [MapPair(maps, torch.ones_like(maps), (1, 1))],
            torch.ones(len(outputs), 1),
            None,
        )


class Overflow(torch.autograd.Function):
    """Gradients that are too large at a scale above 4."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(gradient.abs().max() > 3, gradient * float("inf"), gradient)


def start():
    zeros = {"l": torch.zeros(STAGES, 1, WIDTH)}
    return build_parametrisation("offsets", zeros, zeros, 0)


def pictures_of(person):
    return range(PICTURES * person, PICTURES * (person + 1))


def alone(person, scale=1.0, **options):
    parameters = start()
    toy = Toy(pictures_of(person), **options)
    return parameters, optimise(parameters, toy, SETTINGS, loss_scale=scale), toy


def together(people, scale=1.0, **options):
    learners = [Learner(start(), pictures_of(person), SETTINGS, scale) for person in range(people)]
    toy = Toy(**options)
    told = []
    optimise_together(learners, toy.predict, SETTINGS.steps, told.append)
    assert told == list(range(1, len(told) + 1))
    return learners, toy


def same(one, other):
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-6)


def test_each_is_learned_as_alone():
    learners, toy = together(3)
    assert len(toy.asked) == SETTINGS.steps and all(len(asked) == 3 for asked in toy.asked)
    for person, learner in enumerate(learners):
        parameters, history, _ = alone(person)
        same(learner.parameters, parameters)
        assert [step.loss for step in learner.history] == pytest.approx(
            [step.loss for step in history], rel=1e-5
        )
    assert not torch.allclose(*(one.parameters()[0]["l"] for one in learners[:2]))


def test_who_overflows_tries_again_and_nobody_else_does():
    overflows = set(pictures_of(1))
    learners, toy = together(3, scale=64.0, overflows=overflows)
    assert len(toy.asked) > SETTINGS.steps
    again = [asked for asked in toy.asked if len(asked) == 1]
    assert again and all(set(asked[0]) <= overflows for asked in again)
    for person, learner in enumerate(learners):
        parameters, _, _ = alone(person, scale=64.0, overflows=overflows)
        same(learner.parameters, parameters)
        assert learner.error is None
    assert learners[0].loss_scale == 64.0 > learners[1].loss_scale


def test_who_cannot_be_learned_stops_nobody():
    learners, toy = together(3, broken=PICTURES)  # the first picture of the second person
    assert "not numbers" in str(learners[1].error) or "no number" in str(learners[1].error)
    assert len(learners[1].history) < SETTINGS.steps
    for person in (0, 2):
        parameters, _, _ = alone(person)
        same(learners[person].parameters, parameters)
        assert learners[person].error is None


def test_nobody_left_ends_it():
    learners, toy = together(1, broken=0)
    assert learners[0].error is not None and len(toy.asked) < SETTINGS.steps
