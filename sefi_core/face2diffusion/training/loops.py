"""The loop of both trainings: steps that can be gone on from, on one process or on several."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import nn

from ...errors import SeFiError
from ...learning.loop import lower, unscale

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300.0
LOG_EVERY = 10


class Task(Protocol):
    """What is trained, and on what."""

    @property
    def module(self) -> nn.Module:
        """All that is learned; calling it with rows and their seeds gives the loss."""
        ...

    @property
    def samples(self) -> int:
        """Number of photos to draw batches from."""
        ...

    @property
    def loss_scale(self) -> float:
        """Keeps the gradients of half-precision models above underflow; see :func:`fit`."""
        ...

    @property
    def depends_on(self) -> dict[str, str]:
        """What its state is of no use without, by names for the user; digests of long things."""
        ...

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the module's parameters."""
        ...

    def validate(self, step: int, log: Log) -> None:
        """Write figures and pictures into the log."""
        ...


class Log:
    """Figures and pictures of a training: JSON lines in a file, and TensorBoard where that is."""

    def __init__(self, folder: Path, active: bool = True) -> None:
        self.file = folder / "log.jsonl"
        self.active = active
        self.board: Any = None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"))

    def figures(self, step: int, **values: float) -> None:
        """Numbers by their names."""
        if not self.active:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board is not None:
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: torch.Tensor) -> None:
        """A picture (H, W, 3) in [0, 1]."""
        if self.active and self.board is not None:
            self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self.board is not None:
            self.board.close()


def is_first_process() -> bool:
    """Whether this process, of those that train together, writes files."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """This process among those that train together; one alone where accelerate is not asked for.

    Several are started by ``torchrun`` or ``accelerate launch``, which set WORLD_SIZE. ``cpu``
    keeps them off graphics cards.
    """

    def __init__(self, cpu: bool = False) -> None:
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise SeFiError(
                    f"several processes need the package accelerate ({error}): pip install "
                    "accelerate, or start one process"
                ) from error
            # Else the user's default configuration of accelerate would scale the loss once more.
            self.accelerator = Accelerator(mixed_precision="no", cpu=cpu)

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this one writes files."""
        return self.accelerator is None or self.accelerator.is_main_process

    def share(self, batch: Sequence[int]) -> list[int]:
        """This process's part of a batch, which is divided evenly."""
        if self.accelerator is None:
            return list(batch)
        return list(batch[self.accelerator.process_index :: self.count])

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Both, so that gradients are averaged over all processes."""
        if self.accelerator is None:
            return module, optimizer
        return self.accelerator.prepare(module, optimizer)

    def mean(self, loss: torch.Tensor) -> float:
        """The loss over all processes."""
        if self.accelerator is None:
            return loss.item()
        return float(self.accelerator.reduce(loss.detach(), reduction="mean"))

    def wait(self) -> None:
        """Until all have come here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def batch_of(step: int, samples: int, size: int, seed: int) -> list[tuple[int, int]]:
    """The photos of a step, and a seed for each: of all processes together.

    They follow from the step's number alone, so that a training can go on anywhere.
    """
    # PyTorch's generator looks at the lowest 32 bits of a seed.
    mixed = hashlib.sha256(f"{seed} {step}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    rows = torch.randint(samples, (size,), generator=generator)
    seeds = torch.randint(2**62, (size,), generator=generator)
    return list(zip(rows.tolist(), seeds.tolist(), strict=True))


def fit(
    task: Task,
    steps: int,
    batch: int,
    seed: int,
    state: Path,
    log: Log,
    validate_every: int,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``task.module`` for ``steps`` steps in all; returns the losses of this call's steps.

    ``state`` is the file to go on from, where it is, and to keep the state in. The learning rate
    falls to 0 along half a cosine. The loss is multiplied by the task's ``loss_scale``, which is
    halved when gradients overflow, and the gradients are divided by it. ``on_step`` is told the
    step's number and loss, and may raise to stop. Raises :class:`SeFiError` when a batch cannot be
    divided among the processes, or leaves one photo to batch norms, when the loss or the gradients
    are no numbers and when the state is of another training, or of one that depended on something
    else. States of earlier versions do not say on what.
    """
    processes = Processes(cpu=next(task.module.parameters()).device.type == "cpu")
    if batch % processes.count:
        raise SeFiError(
            f"a batch of {batch} cannot be divided among {processes.count} processes: set a "
            "multiple of them"
        )
    if batch == processes.count and any(
        isinstance(one, (nn.BatchNorm1d, nn.BatchNorm2d)) for one in task.module.modules()
    ):
        raise SeFiError(
            f"a batch of {batch} leaves each process one photo, and batch norms need two: set "
            f"{2 * batch} or more"
        )
    optimizer = task.optimizer(task.module)
    done, loss_scale = 0, task.loss_scale
    told = {"first_loss_scale": str(loss_scale), "depends_on": json.dumps(task.depends_on)}
    if state.is_file():
        done, loss_scale = _restore(state, task.module, optimizer, told)
    module, optimizer = processes.prepare(task.module, optimizer)
    losses: list[float] = []
    saved = time.monotonic()
    rates = [group.setdefault("first_lr", group["lr"]) for group in optimizer.param_groups]
    for step in range(done + 1, steps + 1):
        share = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - 1) / steps))))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        pairs = batch_of(step, task.samples, batch, seed)
        mine = processes.share(range(batch))
        while True:
            torch.manual_seed((seed + step) % 2**31)  # dropout, the same wherever one goes on
            loss = module([pairs[i][0] for i in mine], [pairs[i][1] for i in mine])
            if not bool(torch.isfinite(loss)):
                raise SeFiError(f"the loss is no number at step {step}: lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            (loss * loss_scale).backward()
            if unscale(task.module, loss_scale):
                break
            loss_scale = lower(loss_scale, step)
        optimizer.step()
        losses.append(processes.mean(loss))
        if step % LOG_EVERY == 0 or step == steps:
            log.figures(step, loss=sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:]))
        due = step % validate_every == 0 or step == steps
        if processes.is_first and due:
            task.module.eval()
            task.validate(step, log)
            task.module.train()
        if processes.is_first and (step == steps or time.monotonic() > saved + SAVE_SECONDS):
            told |= {"step": str(step), "loss_scale": str(loss_scale)}
            save_state(state, task.module, optimizer, told)
            saved = time.monotonic()
        if on_step is not None:
            on_step(step, losses[-1])
    processes.wait()
    return losses


def save_state(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, told: dict[str, str]
) -> None:
    """Write all that is needed to go on, with the metadata ``told``; whole or not at all."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if torch.is_tensor(value):
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(copies, part, told)
    part.replace(path)


def _restore(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, wanted: dict[str, str]
) -> tuple[int, float]:
    """Put a state into a module and its new optimiser; returns its step and its loss scale.

    ``wanted`` is the metadata of a new state. The scale that was found is of use only where it
    began with the same one: in another precision it means nothing.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = file.metadata() or {}
            step = int(told["step"])
            first = wanted["first_loss_scale"]
            same = told.get("first_loss_scale") == first
            loss_scale = float(told["loss_scale"] if same else first)
            _check_depends_on(path, told, wanted)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        module.load_state_dict(
            {n.removeprefix("module."): v for n, v in tensors.items() if n.startswith("module.")}
        )
        for name, parameter in module.named_parameters():
            prefix = f"optimizer.{name}."
            kept = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            if kept:
                optimizer.state[parameter] = {
                    key: value if value.ndim == 0 else value.to(parameter.device)
                    for key, value in kept.items()
                }
    except SeFiError:
        raise
    except Exception as error:
        raise SeFiError(
            f"{path} is no state of this training ({str(error)[:200]}): remove it to begin anew"
        ) from error
    logger.info("Going on from step %d, see %s.", step, path)
    return step, loss_scale


def _check_depends_on(path: Path, told: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises :class:`SeFiError` for a state that depended on something else."""
    if "depends_on" not in told:
        return
    then, now = (json.loads(one["depends_on"]) for one in (told, wanted))
    if others := [name for name in now if then.get(name) != now[name]]:
        raise SeFiError(
            f"{path} is the state of a training with another {' and another '.join(others)}: "
            "remove it to begin anew, or choose another output folder"
        )
