"""The optimisation loop of SeFi-IDE, on anything that predicts noise.

The loop draws timesteps, noise and pictures, asks a :class:`Denoiser` for the model's output and
attention maps, and moves the vectors. It knows no model: ``comfyui/train.py`` connects it to
ComfyUI's, the tests to a toy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..errors import SeFiError
from ..stages import first_timestep
from .losses import MapPair, attention_loss, leak, noise_loss
from .parametrisation import Vectors
from .settings import TrainingSettings
from .state import LoopState, Step


class Batch(NamedTuple):
    """What one step trains on. ``samples`` and ``templates`` are indices of each sample."""

    samples: list[int]
    templates: list[int]
    timesteps: list[int]
    noise_seed: int


class Prediction(NamedTuple):
    """What the model made of a batch.

    ``output`` and ``target`` (B, C, h, w) are the model's output and what it should be; ``layers``
    the attention maps; ``placeholder`` (B, tokens) is 1 for the placeholder's tokens in them;
    ``face`` (B, 1, H, W) the mask or None; ``background`` what the model makes of the class word's
    prompt (B, C, h, w), where it was asked for, in class-guided denoising regularisation.
    """

    output: torch.Tensor
    target: torch.Tensor
    layers: list[MapPair]
    placeholder: torch.Tensor
    face: torch.Tensor | None
    background: torch.Tensor | None = None

    def placeholder_maps(self) -> list[torch.Tensor]:
        """Where the placeholder looks in each layer, (B, h, w) of the layer's size."""
        return [layer.target_of(self.placeholder) for layer in self.layers]

    def part(self, rows: slice) -> Prediction:
        """That of some of the samples."""
        return Prediction(
            self.output[rows],
            self.target[rows],
            [MapPair(one.target[rows], one.reference[rows], one.size) for one in self.layers],
            self.placeholder[rows],
            None if self.face is None else self.face[rows],
            None if self.background is None else self.background[rows],
        )


class Denoiser(Protocol):
    """The model as the loop sees it."""

    @property
    def samples(self) -> int:
        """Number of training pictures."""
        ...

    def __call__(self, keys: Vectors, values: Vectors, batch: Batch) -> Prediction:
        """Predict with these vectors, differentiably."""
        ...


KeepState = Callable[[Callable[[], LoopState], bool], None]
"""Told after each step how to get its state, and whether nothing more will come: then an exception
is on its way, and this is the last finished step's state. Must not raise."""


def check_diffusers() -> None:
    """Raises :class:`SeFiError` when diffusers, whose schedule the loop follows, is missing."""
    try:
        import diffusers.optimization  # noqa: F401
    except ImportError as error:
        raise SeFiError(
            f"training needs the package diffusers ({error}): install or update it "
            "(pip install -U diffusers)"
        ) from error


def optimise(
    parameters: nn.Module,
    denoiser: Denoiser,
    settings: TrainingSettings,
    on_step: Callable[[Step], None] | None = None,
    loss_scale: float = 1.0,
    begin: LoopState | None = None,
    keep: KeepState | None = None,
) -> list[Step]:
    """Train ``parameters``, a parametrisation, for ``settings.steps`` steps.

    The same settings give the same result; the global random state is neither used nor changed.
    ``loss_scale`` keeps the gradients of half-precision models above underflow; it is halved when
    they overflow. The learning rate falls to 0 along half a cosine. Raises :class:`SeFiError` when
    the losses are not finite, and that of :func:`check_diffusers` at once.
    ``on_step`` may raise to stop; the parameters then keep the last finished step.
    ``begin``, which must fit the parameters, is the state to go on from; the result is that of a
    training without an interruption. ``keep`` is for keeping such states.
    """
    optimizer, scheduler = optimizer_of(parameters, settings)
    history: list[Step] = []
    if begin is not None:
        begin.restore(parameters, optimizer, scheduler)
        loss_scale, history = begin.loss_scale, list(begin.history)
    samples = range(denoiser.samples)
    batches = zip(range(1, settings.steps + 1), batches_of(samples, settings), strict=False)
    whole = True

    def state() -> LoopState:
        return LoopState.of(parameters, optimizer, loss_scale, history)

    try:
        for number, batch in islice(batches, len(history), None):
            parts, loss_scale = _backward(parameters, denoiser, settings, number, batch, loss_scale)
            whole = False
            optimizer.step()
            scheduler.step()
            step = Step(number, *parts)
            history.append(step)
            whole = True
            if on_step is not None:
                on_step(step)
            if keep is not None:
                keep(state, False)
    except BaseException:
        if keep is not None and history and whole:
            keep(state, True)
        raise
    return history


def _backward(
    parameters: nn.Module,
    denoiser: Denoiser,
    settings: TrainingSettings,
    number: int,
    batch: Batch,
    loss_scale: float,
) -> tuple[list[float], float]:
    """Put a step's gradients into the parameters: its losses, and the loss scale that it took."""
    while True:
        keys, values = parameters()
        prediction = denoiser(keys, values, batch)
        losses = losses_of(prediction, settings, number)
        parameters.zero_grad(set_to_none=True)
        (losses[0] * loss_scale).backward()
        if unscale(parameters, loss_scale):
            return [part.item() for part in losses], loss_scale
        loss_scale = lower(loss_scale, number)


def optimizer_of(
    parameters: nn.Module, settings: TrainingSettings
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser, and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(parameters.parameters(), settings.learning_rate, weight_decay=0.0)
    return optimizer, _cosine_schedule(optimizer, settings.steps)


def batches_of(samples: Sequence[int], settings: TrainingSettings) -> Iterator[Batch]:
    """Endless random batches of these samples, from the seed.

    Timesteps are uniform, but every round of as many samples as there are stages visits each stage
    once, in random order: all vectors get the same number of steps.
    """
    generator = torch.Generator().manual_seed(settings.seed)

    def integer(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    begins = [first_timestep(stage, settings.stages) for stage in range(settings.stages + 1)]
    stages: list[int] = []
    while True:
        batch = Batch([], [], [], integer(2**62))
        for _ in range(settings.batch_size):
            stages = stages or torch.randperm(settings.stages, generator=generator).tolist()
            stage = stages.pop()
            batch.samples.append(samples[integer(len(samples))])
            batch.templates.append(integer(len(settings.templates)))
            batch.timesteps.append(begins[stage] + integer(begins[stage + 1] - begins[stage]))
        yield batch


def losses_of(
    prediction: Prediction, settings: TrainingSettings, number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of step ``number``, then its noise loss, attention loss and leak; 0 where off.

    Raises :class:`SeFiError` if it is no number.
    """
    face = prediction.face
    weight, background = settings.background_weight, prediction.background
    if background is not None:
        weight = weight or 1.0
    noise = noise_loss(prediction.output, prediction.target, face, weight, background)
    attention = leaked = noise.new_zeros(())
    if prediction.layers and settings.attention_weight > 0:
        attention = attention_loss(prediction.layers)
    if prediction.layers and settings.leak_weight > 0 and face is not None:
        leaked = leak(prediction.placeholder_maps(), face).mean()
    loss = noise + settings.attention_weight * attention + settings.leak_weight * leaked
    if not torch.isfinite(loss) and number == 1:
        raise SeFiError(
            "the model gives values that are not numbers (NaN) before anything is learned: "
            "set dtype to fp32; where that is so too, the checkpoint or the VAE is "
            "damaged: load another"
        )
    if not torch.isfinite(loss):
        raise SeFiError(
            f"the loss is no number at step {number}: lower learning_rate, or set dtype to fp32"
        )
    return loss, noise, attention, leaked


def first_loss_scale(dtype: torch.dtype | None) -> float:
    """What keeps gradients that pass through this precision above underflow."""
    return 2.0**16 if dtype == torch.float16 else 1.0


def lower(loss_scale: float, number: int) -> float:
    """The next lower loss scale; raises :class:`SeFiError` where there is none."""
    if loss_scale <= 1.0:
        raise SeFiError(f"the gradients are no numbers at step {number}: set dtype to fp32 or bf16")
    return loss_scale / 2.0


def unscale(parameters: nn.Module, scale: float) -> bool:
    """Divide the gradients by the loss scale; whether all of them are finite."""
    gradients = [p.grad for p in parameters.parameters() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(scale)
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A short rise of the learning rate, then a fall to 0 along half a cosine."""
    check_diffusers()
    from diffusers.optimization import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, min(10, steps // 10), steps)


def smoothed(losses: Sequence[float], width: int = 25) -> list[float]:
    """Running mean of the last ``width`` losses, as long as the list."""
    return [
        sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))
    ]
