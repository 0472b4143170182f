"""Learn several identities at once, with one frozen model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...errors import SeFiError
from ...identity.identity import Identity
from ...learning.loop import Prediction, check_diffusers
from ...learning.parametrisation import build_parametrisation
from ...learning.photos import Photo
from ...learning.settings import TrainingSettings
from ...learning.together import Asked, Learner, optimise_together
from ...stages import stage_of_timestep
from ..clip.embeddings import embedding_units
from .denoiser import ComfyDenoiser
from .differentiable import differentiable
from .encoded import rows_of
from .memory import is_checkpointing
from .train import (
    Lesson,
    learned_identity,
    learning,
    lesson_of,
    looks_at_maps,
    seen_captions,
)

logger = logging.getLogger(__name__)


class Person(NamedTuple):
    """Whom to learn: the name of the placeholder, the photos, and what they show besides."""

    name: str
    photos: Sequence[Photo]
    captions: tuple[str, ...]


Outcome = Identity | SeFiError
"""What became of a person: the identity, or the sentence that says why there is none."""

TOLD_EVERY = 5
"""Steps between what is told of them."""


class Board:
    """What there is to say of each person, from the beginning to the end.

    ``tell`` gets all lines, one for each of ``people``, whenever some have changed.
    """

    def __init__(self, people: int, tell: Callable[[Sequence[str]], None] | None = None) -> None:
        self._lines = ["waiting"] * people
        self._tell = tell or (lambda lines: None)

    def write(self, lines: Mapping[int, str]) -> None:
        """New lines of some people, by their numbers."""
        for number, line in lines.items():
            self._lines[number] = line
        self._tell(list(self._lines))


def train_identities(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    people: Sequence[Person],
    class_word: str,
    settings: TrainingSettings,
    together: int,
    tell: Callable[[Sequence[str]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Learn these people, ``together`` of them in each batch, each exactly as if alone.

    As :func:`.train.train_identity` in everything else; whoever cannot be learned is given the
    sentence that says why, and stops nobody. ``tell`` is told a line for each person, ``on_step``
    the steps done and those of all groups; it may raise to stop.
    """
    check_diffusers()
    board = Board(len(people), tell)
    outcomes: list[Outcome] = []
    groups = [people[start : start + together] for start in range(0, len(people), together)]
    for number, group in enumerate(groups):

        def step(done: int, number: int = number) -> None:
            if on_step is not None:
                on_step(number * settings.steps + done, len(groups) * settings.steps)

        with learning():
            outcomes += _train_group(
                model, clip, vae, group, class_word, settings, board, number * together, step
            )
    return outcomes


def _train_group(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    people: Sequence[Person],
    class_word: str,
    settings: TrainingSettings,
    board: Board,
    line: int,
    on_step: Callable[[int], None],
) -> list[Outcome]:
    """Those of one batch; their lines on the board begin at ``line``."""
    outcomes: dict[int, Outcome] = {}
    lessons: dict[int, tuple[Lesson, list[str]]] = {}
    for number, person in enumerate(people):
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            own = settings.with_captions(person.captions)
            board.write({line + number: "looking at the photos"})
            lesson = lesson_of(model, clip, vae, person.photos, person.name, class_word, own)
            lessons[number] = lesson, seen_captions(model, clip, lesson)
        except SeFiError as error:
            outcomes[number] = error
            board.write({line + number: str(error)})
    if lessons:
        places = [line + number for number in lessons]

        def step(done: int, learners: Sequence[Learner]) -> None:
            if done == 1 or done % TOLD_EVERY == 0 or done == settings.steps:
                said = [_line_of(one, settings.steps) for one in learners]
                board.write(dict(zip(places, said, strict=True)))
            on_step(done)

        learners = _learn(model, clip, list(lessons.values()), settings, step)
        for (number, (lesson, captions)), learner in zip(lessons.items(), learners, strict=True):
            outcomes[number] = learner.error or learned_identity(
                lesson, learner.parameters, captions, len(learner.history)
            )
    for number, person in enumerate(people):
        if isinstance(outcomes[number], SeFiError):
            logger.warning("SeFi Train Identities: %s: %s", person.name, outcomes[number])
    return [outcomes[number] for number in range(len(people))]


def _learn(
    model: ModelPatcher,
    clip: CLIP,
    lessons: Sequence[tuple[Lesson, list[str]]],
    settings: TrainingSettings,
    on_step: Callable[[int, Sequence[Learner]], None],
) -> list[Learner]:
    """One learner for each lesson and its captions, trained."""
    first, _ = lessons[0]
    people = [
        number for number, (lesson, _) in enumerate(lessons) for _ in range(len(lesson.latents))
    ]
    masks = _masks([lesson for lesson, _ in lessons])
    latents = torch.cat([lesson.latents for lesson, _ in lessons])
    names = [f"{lesson.first.name}_{number}" for number, (lesson, _) in enumerate(lessons)]
    denoiser = ComfyDenoiser(
        model,
        clip,
        # Two people of one name are two placeholders here.
        [lesson.first.renamed(name) for (lesson, _), name in zip(lessons, names, strict=True)],
        settings.templates,
        latents,
        masks,
        [caption for _, captions in lessons for caption in captions],
        [side for lesson, _ in lessons for side in lesson.pictures.sides],
        settings.dtype,
        is_checkpointing(
            settings.gradient_checkpointing,
            [model, clip.patcher],
            (settings.batch_size * len(lessons), *latents.shape[1:]),
        ),
        looks_at_maps(settings, masks),
        people,
        class_guided=settings.background_target == "class word" and masks is not None,
    )
    units = embedding_units(clip)
    learners = [
        Learner(
            build_parametrisation(
                settings.parametrisation,
                lesson.first.key_vectors,
                lesson.first.value_vectors,
                settings.seed,
                units,
            ),
            [sample for sample, person in enumerate(people) if person == number],
            settings,
            denoiser.loss_scale,
        )
        for number, (lesson, _) in enumerate(lessons)
    ]

    def predict(asked: Sequence[Asked]) -> Prediction:
        rows = [
            rows_of(one.keys, one.values, stage_of_timestep(timestep, first.first.stages))
            for one in asked
            for timestep in one.batch.timesteps
        ]
        return denoiser.predict(rows, *(one.batch for one in asked))

    modules = denoiser.model.model.diffusion_model, denoiser.clip.cond_stage_model
    with differentiable(*modules, gradient_checkpointing=denoiser.checkpointing):
        optimise_together(learners, predict, settings.steps, lambda done: on_step(done, learners))
    return learners


def _line_of(learner: Learner, steps: int) -> str:
    """How far one is, or why it has ended."""
    if learner.error is not None:
        return str(learner.error)
    last = learner.history[-1]
    return f"step {last.number} of {steps}, loss {last.loss:.4f}"


def _masks(lessons: Sequence[Lesson]) -> torch.Tensor | None:
    """All masks; who has none is marked all over, which changes nothing. None if nobody has one."""
    if all(lesson.pictures.masks is None for lesson in lessons):
        return None
    side = lessons[0].pictures.pictures.shape[1]
    return torch.cat(
        [
            torch.ones(len(lesson.latents), 1, side, side)
            if lesson.pictures.masks is None
            else lesson.pictures.masks
            for lesson in lessons
        ]
    )
