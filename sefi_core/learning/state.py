"""The state of a training between two steps, and the file that a snapshot of it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""

_HEADER = "sefi_snapshot"
_VERSION = 1
_HISTORY = "history"
_PARAMETERS = "parameters."


class Step(NamedTuple):
    """The losses of one finished step; ``number`` counts from 1."""

    number: int
    loss: float
    noise: float
    attention: float
    leak: float


class LoopState(NamedTuple):
    """All that :func:`loop.optimise` needs to go on after a step as if it had never stopped.

    ``tensors`` are the parameters and AdamW's moments of them, by name; ``history`` has every step
    so far. The random batches follow from the settings and the number of steps.
    """

    tensors: dict[str, torch.Tensor]
    loss_scale: float
    history: list[Step]

    @classmethod
    def of(
        cls,
        parameters: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scale: float,
        history: Sequence[Step],
    ) -> LoopState:
        """The state after the last step of ``history``: copies, on the CPU."""
        tensors = dict[str, torch.Tensor]()
        for name, parameter in parameters.named_parameters():
            tensors[name] = parameter
            tensors |= {f"{name}.{m}": optimizer.state[parameter][m] for m in _MOMENTS}
        copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        return cls(copies, loss_scale, list(history))

    def fits(self, parameters: nn.Module) -> bool:
        """Whether it is of a training of parameters such as these."""
        wanted = {
            name + suffix: parameter.shape
            for name, parameter in parameters.named_parameters()
            for suffix in ("", *(f".{moment}" for moment in _MOMENTS))
        }
        return {name: value.shape for name, value in self.tensors.items()} == wanted

    @torch.no_grad()
    def restore(
        self, parameters: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR
    ) -> None:
        """Put it into parameters that it fits, and a new optimizer and scheduler of theirs."""
        done = len(self.history)
        for name, parameter in parameters.named_parameters():
            parameter.copy_(self.tensors[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(done)),
                **{m: self.tensors[f"{name}.{m}"].to(parameter, copy=True) for m in _MOMENTS},
            }
        factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [rate * factor(done) for rate, factor in factors]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        progress = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
        scheduler.load_state_dict(scheduler.state_dict() | progress)


class Snapshot(NamedTuple):
    """What a training that goes on needs not find out again.

    ``captions`` are those of the photos, with what the model saw in them.
    """

    state: LoopState
    captions: list[str]


def to_bytes(snapshot: Snapshot, key: str) -> bytes:
    """A snapshot as a safetensors file; ``key`` says of which training it is."""
    state = snapshot.state
    header = {
        "version": _VERSION,
        "key": key,
        "loss_scale": state.loss_scale,
        "captions": snapshot.captions,
    }
    # 64 bits hold Python's numbers as they are.
    history = torch.tensor([step[1:] for step in state.history], dtype=torch.float64)
    tensors = {_PARAMETERS + name: value.contiguous() for name, value in state.tensors.items()}
    return safetensors.torch.save({**tensors, _HISTORY: history}, {_HEADER: json.dumps(header)})


def from_bytes(data: bytes, key: str) -> Snapshot:
    """What :func:`to_bytes` was given; raises ValueError for anything else.

    That is also raised for another ``key``, and for a file of another version of the pack.
    """
    try:
        tensors = safetensors.torch.load(data)
        # The header is JSON between its length, of eight bytes, and the tensors.
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
        if (header["version"], header["key"]) != (_VERSION, key):
            raise ValueError("it is of another training")
        history = [
            Step(number, *losses) for number, losses in enumerate(tensors.pop(_HISTORY).tolist(), 1)
        ]
        captions = [str(caption) for caption in header["captions"]]
        state = LoopState(
            {name.removeprefix(_PARAMETERS): value for name, value in tensors.items()},
            float(header["loss_scale"]),
            history,
        )
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"it is no snapshot ({error})") from error
    if not history or not all(torch.isfinite(value).all() for value in state.tensors.values()):
        raise ValueError("it has no step, or values that are not numbers")
    return Snapshot(state, captions)
