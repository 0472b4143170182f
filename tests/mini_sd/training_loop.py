"""One small loop for all parts of the miniature: minutes of training, resumable."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger("mini_sd")


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value.detach(), 1 - decay)
            else:
                self.state[key].copy_(value)


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    path: Path,
    minutes: float,
    learning_rate: float,
    average: float = 0.999,
    weight_decay: float = 0.01,
    save_every: float = 5.0,
) -> None:
    """Train ``module`` for so many minutes and leave its averaged weights in it.

    The learning rate warms up over 200 steps and falls on a cosine over the time budget.
    ``path`` keeps the state every ``save_every`` minutes; a later call with the same path
    goes on from there, and one that finds the budget used up only loads the result.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
    )
    ema = Average(module, average)
    step, used = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.state, ema.steps, step, used = state["ema"], state["step"], state["step"], state["used"]
    started, saved, mean = time.monotonic() - used, used, None
    module.train()
    while (used := time.monotonic() - started) < 60 * minutes:
        done = used / (60 * minutes)
        rate = (
            learning_rate
            * min(1.0, (step + 1) / 200)
            * (0.02 + 0.98 * math.cos(math.pi / 2 * done) ** 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update(module)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            log.info("%s: step %d, %.1f min, loss %.4f", path.stem, step, used / 60, mean)
        if used - saved > 60 * save_every:
            _save(path, module, optimizer, ema, step, used)
            saved = used
    _save(path, module, optimizer, ema, step, max(used, 60 * minutes))
    module.load_state_dict(ema.state)
    module.eval()


def _save(path: Path, module, optimizer, ema, step, used) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state,
            "step": step,
            "used": used,
        },
        partial,
    )
    partial.replace(path)
