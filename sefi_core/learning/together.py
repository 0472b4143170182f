"""Many people at once: their samples share the batches of one frozen model.

Each of them is learned exactly as alone: own vectors, own optimiser, own random batches from the
seed, own loss scale. Whoever cannot be learned drops out, and stops nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from ..errors import SeFiError
from .loop import (
    Batch,
    Prediction,
    batches_of,
    check_diffusers,
    losses_of,
    lower,
    optimizer_of,
    unscale,
)
from .parametrisation import Vectors
from .settings import TrainingSettings
from .state import Step


class Asked(NamedTuple):
    """What one person wants of the model in a step."""

    keys: Vectors
    values: Vectors
    batch: Batch


class Predict(Protocol):
    """The model, asked by several people at once."""

    def __call__(self, asked: Sequence[Asked]) -> Prediction:
        """The prediction of all their samples, one after the other."""
        ...


class Learner:
    """One person's training, step by step.

    ``samples`` are the numbers of the person's pictures among all; ``error`` says why it has ended
    early, if it has.
    """

    def __init__(
        self,
        parameters: nn.Module,
        samples: Sequence[int],
        settings: TrainingSettings,
        loss_scale: float = 1.0,
    ) -> None:
        check_diffusers()
        self.parameters, self.settings, self.loss_scale = parameters, settings, loss_scale
        self.optimizer, self.scheduler = optimizer_of(parameters, settings)
        self.batches = batches_of(samples, settings)
        self.history: list[Step] = []
        self.error: SeFiError | None = None

    def ask(self, batch: Batch) -> Asked:
        """The current vectors, for a batch of this person's."""
        keys, values = self.parameters()
        return Asked(keys, values, batch)


def optimise_together(
    learners: Sequence[Learner],
    predict: Predict,
    steps: int,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train all learners for ``steps`` steps; ``on_step`` is told the number, and may raise."""
    for number in range(1, steps + 1):
        pending = [(one, next(one.batches)) for one in learners if one.error is None]
        if not pending:
            return
        while pending:
            pending = _step(pending, predict, number)
        if on_step is not None:
            on_step(number)


def _step(
    pending: Sequence[tuple[Learner, Batch]], predict: Predict, number: int
) -> list[tuple[Learner, Batch]]:
    """One step of these; returns those whose gradients overflowed and who try again."""
    prediction = predict([learner.ask(batch) for learner, batch in pending])
    losses, place = {}, 0
    for learner, batch in pending:
        rows = slice(place, place + len(batch.samples))
        place = rows.stop
        learner.parameters.zero_grad(set_to_none=True)
        try:
            losses[learner] = losses_of(prediction.part(rows), learner.settings, number)
        except SeFiError as error:
            learner.error = error
    if losses:
        total = [parts[0] * one.loss_scale for one, parts in losses.items()]
        torch.stack(total).sum().backward()
    again = []
    for learner, batch in pending:
        if learner.error is not None:
            continue
        if unscale(learner.parameters, learner.loss_scale):
            learner.optimizer.step()
            learner.scheduler.step()
            learner.history.append(Step(number, *(part.item() for part in losses[learner])))
            continue
        try:
            learner.loss_scale = lower(learner.loss_scale, number)
            again.append((learner, batch))
        except SeFiError as error:
            learner.error = error
    return again
