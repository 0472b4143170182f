"""Learn an identity with ComfyUI's loaded MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import nn

from ...errors import SeFiError, quoted
from ...families import FAMILIES, label_of
from ...identity.identity import Identity
from ...identity.thumbnail import thumbnail_of
from ...learning.loop import Step, check_diffusers, optimise
from ...learning.parametrisation import build_parametrisation
from ...learning.photos import Photo, training_pictures
from ...learning.photos import TrainingPictures as TrainingPhotos
from ...learning.report import text_picture, training_report
from ...learning.settings import TrainingSettings
from ...text.captions import AUTO, check_captions
from ...text.placeholders import check_class_word, check_name, expand_template
from ..base_model import family_of, latent_format_of
from ..clip.embeddings import class_word_embedding, embedding_units, with_last_repeated
from ..clip.tokens import check_clip, token_widths
from .denoiser import ComfyDenoiser
from .differentiable import differentiable
from .expressions import expressions_in
from .live import LEARNING, LOADING, LOOKING, REPORTING
from .memory import is_checkpointing
from .pictures import picture_or_why_not, sample_picture
from .progress import Watcher
from .showing import TrainingPictures
from .snapshots import Snapshots

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """``report`` is a picture (H, W, 3) in [0, 1]: photo, attention before and after, losses.

    ``stopped`` is whether the watcher has ended it before its last step, ``drawn`` whether the
    report is one, and no text that says why there is none.
    """

    identity: Identity
    history: list[Step]
    report: torch.Tensor
    stopped: bool = False
    drawn: bool = True


class _StoppedError(Exception):
    """The watcher wants what was learned so far."""


def train_identity(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Sequence[Photo],
    name: str,
    class_word: str,
    settings: TrainingSettings,
    start: Identity | None = None,
    on_step: Callable[[Step], None] | None = None,
    watcher: Watcher | None = None,
    snapshots: Snapshots | None = None,
) -> TrainingResult:
    """Learn the per-stage K and V vectors of who is in the photos.

    The given models are only read: training works on clones, and leaves no gradient, patch or
    changed weight behind even when it is cancelled. ``start`` is an identity to go on from.
    ``on_step`` is called after every step and may raise to stop. ``watcher`` is told of phases,
    steps and pictures, and may have the training end early: what was learned until then is the
    result. ``snapshots`` are where it is kept while it lasts, and where it goes on from if there is
    one. Raises :class:`SeFiError` for input that cannot be trained with, before any long work.
    """
    watcher = watcher or Watcher()
    watcher.phase(LOADING)
    check_diffusers()
    with learning():
        lesson = lesson_of(model, clip, vae, photos, name, class_word, settings, start)
        settings, first, (pictures, masks, sides) = lesson.settings, lesson.first, lesson.pictures
        prompt = expand_template(settings.templates[0], first.name)
        watcher.picture("photo", pictures[0])
        latents = lesson.latents
        watcher.phase(LOOKING)
        kept = None if snapshots is None else snapshots.load()
        captions = seen_captions(model, clip, lesson) if kept is None else kept.captions
        watcher.phase(LOADING)
        denoiser = ComfyDenoiser(
            model,
            clip,
            [first],
            settings.templates,
            latents,
            masks,
            captions,
            sides,
            settings.dtype,
            is_checkpointing(
                settings.gradient_checkpointing,
                [model, clip.patcher],
                (settings.batch_size, *latents.shape[1:]),
            ),
            looks_at_maps(settings, masks),
            class_guided=settings.background_target == "class word" and masks is not None,
            # An identity may look elsewhere than its class word from the start.
            reference=None
            if start is None
            else {encoder: rows.mean(0) for encoder, rows in first.key_vectors.items()},
        )
        parameters = build_parametrisation(
            settings.parametrisation,
            first.key_vectors,
            first.value_vectors,
            settings.seed,
            embedding_units(clip),
        )

        def current(history: Sequence[Step] = ()) -> Identity:
            return learned_identity(lesson, parameters, captions, len(history))

        history: list[Step] = []

        def after_step(step: Step) -> None:
            history.append(step)
            if on_step is not None:
                on_step(step)
            watcher.step(step)
            if watcher.stopping() and step.number < settings.steps:
                raise _StoppedError
            shown.after_step(step.number)

        def draw_sample(side: int, steps: int) -> torch.Tensor:
            return sample_picture(model, clip, vae, current(history), prompt, side, steps)

        shown = TrainingPictures(watcher, denoiser, parameters, settings, pictures[0], draw_sample)
        modules = denoiser.model.model.diffusion_model, denoiser.clip.cond_stage_model
        with differentiable(*modules, gradient_checkpointing=denoiser.checkpointing):
            watcher.phase(LOOKING)
            before = shown.look()
            watcher.phase(LEARNING)
            begin = None if kept is None or not kept.state.fits(parameters) else kept.state
            if begin is not None:
                history.extend(begin.history)
                watcher.going_on(begin.history)
            keep = None if snapshots is None else snapshots.of(captions)
            with suppress(_StoppedError):
                scale = denoiser.loss_scale
                optimise(parameters, shown.denoiser, settings, after_step, scale, begin, keep)
        identity = current(history)

        drawn = False

        def draw() -> torch.Tensor:
            nonlocal drawn
            with differentiable(*modules):
                after = shown.look()
            # Outside of it, where sampling takes no more memory than ever.
            sample = shown.sample_for_report()
            report = training_report(
                history,
                pictures[0],
                (before.where, after.where),
                (before.loss, after.loss),
                sample,
                identity.placeholder,
                captions[0],
                settings.steps,
            )
            drawn = True
            return report

        try:
            watcher.phase(REPORTING)
            report = picture_or_why_not("report", draw)
        except comfy.model_management.InterruptProcessingException:
            comfy.model_management.interrupt_current_processing()  # nothing after the training
            report = text_picture("The report was cancelled.")
    return TrainingResult(identity, history, report, len(history) < settings.steps, drawn)


@contextmanager
def learning() -> Iterator[None]:
    """Gradients in a node, which runs in inference mode; ends with the random state of before."""
    # ComfyUI's samplers seed the global random state, which is not ours to change.
    # With --cpu its CUDA part is not used, and reading it would start CUDA.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    random_state = torch.random.fork_rng(devices=gpus)
    with torch.inference_mode(False), torch.enable_grad(), random_state:
        yield


class Lesson(NamedTuple):
    """What is learned of one person, before the first step.

    ``plain`` is the identity of the class word's vectors, ``first`` the one that training begins
    at; ``latents`` (N, C, h, w) are those of the pictures, as the U-Net sees them. ``settings``
    have a resolution, and ``captions`` may still say :data:`AUTO`.
    """

    plain: Identity
    first: Identity
    pictures: TrainingPhotos
    latents: torch.Tensor
    captions: list[str]
    settings: TrainingSettings


def lesson_of(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Sequence[Photo],
    name: str,
    class_word: str,
    settings: TrainingSettings,
    start: Identity | None = None,
) -> Lesson:
    """Everything that a training needs of a person's photos.

    Raises :class:`SeFiError` for input that cannot be trained with.
    """
    plain = _class_word_identity(model, clip, name, class_word, settings)
    first = plain if start is None else _going_on(start, plain)
    for template in settings.templates:
        expand_template(template, first.name)
    captions = check_captions(settings.captions, len(photos))
    if not settings.resolution:
        settings = replace(settings, resolution=FAMILIES[plain.family].resolution)
    pictures = training_pictures(photos, settings.resolution)
    latents = encode_pictures(model, vae, pictures.pictures)
    return Lesson(plain, first, pictures, latents, list(captions), settings)


def learned_identity(
    lesson: Lesson, parameters: nn.Module, captions: Sequence[str], steps_done: int
) -> Identity:
    """What the parameters have learned until now, with its settings and a thumbnail."""
    keys, values = ({k: v.detach() for k, v in part.items()} for part in parameters())
    pictures = lesson.pictures.pictures
    return Identity(
        lesson.first.name,
        lesson.first.class_word,
        lesson.first.family,
        keys,
        values,
        {
            **lesson.settings.as_json(),
            "captions": list(captions),
            "photos": len(pictures),
            "steps_done": steps_done,
        },
        thumbnail_of(pictures[0]),
        lesson.first.position_free,
    )


def _class_word_identity(
    model: ModelPatcher, clip: CLIP, name: str, class_word: str, settings: TrainingSettings
) -> Identity:
    """The identity before the first step, which is the class word's embedding in every stage."""
    check_clip(clip)
    check_name(name)
    class_word = check_class_word(class_word)
    family = family_of(model)
    known = family in FAMILIES
    channels = model.model.model_config.unet_config.get("in_channels")
    if not known or channels != latent_format_of(model).latent_channels:
        kind = "inpainting or editing" if known else label_of(family)
        raise SeFiError(
            f"model is for {kind}, and training knows ordinary Stable Diffusion 1.x, 2.x and SDXL: "
            "load such a checkpoint"
        )
    widths = token_widths(clip)
    # The contexts of several text encoders stand side by side.
    fits = sum(widths.values()) == model.model.model_config.unet_config["context_dim"]
    if not fits or tuple(widths) != FAMILIES[family].encoders:
        raise SeFiError("clip does not fit the model: connect the CLIP of the same checkpoint")
    vectors = {
        # Equal rows part while they are learned: the text encoder sees them at other positions.
        encoder: with_last_repeated(rows, settings.vectors).expand(settings.stages, -1, -1)
        for encoder, rows in class_word_embedding(clip, class_word).items()
    }
    return Identity(name, class_word, family, vectors, vectors)


def _going_on(start: Identity, plain: Identity) -> Identity:
    """``start`` as the identity before the first step, instead of the class word's ``plain``.

    It has as many vectors as it has; one of a single stage gets the others.
    """
    start.check_fits(
        plain.family, {name: rows.shape[-1] for name, rows in plain.key_vectors.items()}
    )
    if start.stages not in (1, plain.stages) or start.class_word != plain.class_word:
        raise SeFiError(
            f"identity to go on from has {start.stages} stages and the class word "
            f"{quoted(start.class_word)}: set stages and class_word to these"
        )
    keys, values = (
        {encoder: rows.expand(plain.stages, -1, -1) for encoder, rows in vectors.items()}
        for vectors in (start.key_vectors, start.value_vectors)
    )
    return replace(start, name=plain.name, key_vectors=keys, value_vectors=values)


def seen_captions(model: ModelPatcher, clip: CLIP, lesson: Lesson) -> list[str]:
    """The photos' captions with what the model sees in the place of ``AUTO``."""
    captions = list(lesson.captions)
    _, masks, sides = lesson.pictures
    asked = [number for number, caption in enumerate(captions) if caption.lower() == AUTO]
    if not asked:
        return captions
    faces = None if masks is None else masks[asked]
    found = expressions_in(
        model,
        clip,
        lesson.plain,
        lesson.settings.templates[0],
        lesson.latents[asked],
        faces,
        [sides[number] for number in asked],
    )
    for number, expression in zip(asked, found, strict=True):
        captions[number] = expression
        said = expression or "neutral"
        logger.info("SeFi Train Identity: the face in photo %d looks %s.", number + 1, said)
    return captions


@torch.no_grad()
def encode_pictures(model: ModelPatcher, vae: VAE, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) of pictures, scaled as the U-Net sees them."""
    with torch.inference_mode():
        latents = torch.cat([vae.encode(picture[None]) for picture in pictures])
    latents = latents.to(torch.float32, copy=True)
    if latents.shape[1] != latent_format_of(model).latent_channels:
        raise SeFiError("vae does not fit the model: connect the VAE of the same checkpoint")
    if not torch.isfinite(latents).all():
        raise SeFiError(
            "vae makes latents that are not numbers (NaN) of the photos: start ComfyUI with "
            "--fp32-vae, or load another VAE"
        )
    return model.model.process_latent_in(latents)


def looks_at_maps(settings: TrainingSettings, masks: torch.Tensor | None) -> bool:
    """Whether a loss needs attention maps."""
    return settings.attention_weight > 0 or (settings.leak_weight > 0 and masks is not None)
