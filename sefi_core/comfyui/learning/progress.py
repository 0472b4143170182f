"""Tell the user how far a training is: progress bars, text and pictures on the node, its panel."""

from __future__ import annotations

import html
import logging
import statistics
import time
from collections import deque
from types import TracebackType

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from tqdm import tqdm

from ...errors import printable
from ...images import pixels_of
from ...learning.loop import Step
from .live import LEARNING, LiveTraining, prompt_server

logger = logging.getLogger(__name__)

_PREVIEW_SIZE = 512
_SMOOTHING = 0.95
_SECONDS_BETWEEN_TEXTS = 0.25
_RECENT_STEPS = 25


class Watcher:
    """What a training tells to, step by step; this one listens to nothing and stops nothing."""

    def phase(self, name: str) -> None:
        """One of :data:`.live.PHASES` begins. May raise to stop."""

    def step(self, step: Step) -> None:
        """A step is finished. May raise to stop."""

    def picture(self, name: str, picture: torch.Tensor) -> None:
        """There is a newer one of :data:`.live.PICTURES`, (H, W, 3) in [0, 1]."""

    def stopping(self) -> bool:
        """Whether the training shall end now, with what was learned."""
        return False


class TrainingProgress(Watcher):
    """Tells ComfyUI of a training of ``steps`` steps in the node ``node``; see :class:`Live`.

    A context manager: inside it there is a bar in the console, as of ComfyUI's samplers. While
    there is one, ComfyUI does not log every time that it prepares a model in dynamic VRAM. How the
    block ends is how the training ended.
    """

    def __init__(
        self,
        steps: int,
        node: str | None,
        placeholder: str = "",
        workflow: str = "",
        prompt: str = "",
    ) -> None:
        self.steps, self.node = steps, node
        self.live = LiveTraining(steps, placeholder, workflow, node or "", prompt)
        self.bar = comfy.utils.ProgressBar(steps, node_id=node)
        self.console = tqdm(total=steps, disable=not comfy.utils.PROGRESS_BAR_ENABLED)
        self.mean: float | None = None
        self.number = 0
        self.said = 0.0
        self.ended = 0.0
        self.durations: deque[float] = deque(maxlen=_RECENT_STEPS)

    def __enter__(self) -> TrainingProgress:
        self.phase(self.live.phase)  # in the place of what the run before said
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.console.close()
        where = f"at step {self.number} of {self.steps}"
        if error is None and self.number == self.steps:
            self._end("finished", "", f"learned in {self.steps} steps")
        elif error is None:
            self._end("stopped", f"stopped {where}, and kept", f"stopped {where}, and kept")
        elif isinstance(error, comfy.model_management.InterruptProcessingException):
            self._end("cancelled", f"cancelled {where}", f"cancelled {where}")
        else:
            why = printable(str(error)) or type(error).__name__
            self._end("failed", why, f"failed {where}: {why}")

    def phase(self, name: str) -> None:
        """Name what begins; raises ComfyUI's exception where the user has cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.ended = time.monotonic()
        self.live.enter(name)
        if name != LEARNING:
            self._say(name)

    def step(self, step: Step) -> None:
        """Move the bar, and say the loss, a running mean, and the time left.

        Raises ComfyUI's exception where the user has cancelled.
        """
        self.number = step.number
        previous = step.loss if self.mean is None else self.mean
        self.mean = _SMOOTHING * previous + (1 - _SMOOTHING) * step.loss
        now = time.monotonic()
        self.durations.append(now - self.ended)
        self.ended = now
        left = self.seconds_left()
        self.live.step(step, left)
        self.console.update()
        if step.number == self.steps or now > self.said + _SECONDS_BETWEEN_TEXTS:
            how_long = "" if left is None or step.number == self.steps else f", {_duration(left)}"
            self._say(f"step {step.number} of {self.steps}, loss {self.mean:.4f}{how_long}")
        self.bar.update_absolute(step.number, self.steps)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def seconds_left(self) -> float | None:
        """How long the steps that are left will take, by the median of the last ones.

        None at first: the first step is none to judge by, since models are loaded in it.
        """
        if self.number < 3:
            return None
        known = list(self.durations)[1 if self.number == len(self.durations) else 0 :]
        return statistics.median(known) * (self.steps - self.number)

    def picture(self, name: str, picture: torch.Tensor) -> None:
        """Show a picture on the panel, and a preview on the node as well."""
        self.live.show(name, picture)
        if name == "preview":
            preview = ("JPEG", Image.fromarray(pixels_of(picture).numpy()), _PREVIEW_SIZE)
            self.bar.update_absolute(self.number, self.steps, preview)

    def stopping(self) -> bool:
        """Whether somebody has asked to stop and keep."""
        return self.live.stopping

    def _end(self, state: str, message: str, said: str) -> None:
        self.live.end(state, message)
        self._say(said)
        if state in ("stopped", "cancelled"):
            logger.info("SeFi Train Identity: %s.", message)

    def _say(self, text: str) -> None:
        """Put a text under the node, which some of ComfyUI's frontends take for HTML."""
        self.said = time.monotonic()
        server = prompt_server()
        if server is not None and self.node is not None:
            server.send_progress_text(html.escape(text), self.node, server.client_id)


def _duration(seconds: float) -> str:
    """How long something will take, as people say it."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s left"
    return f"{minutes} min left" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min left"
