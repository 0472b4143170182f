"""Tell the user how far a training is: progress bars, text under the node, preview pictures."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import comfy.utils
import torch
from PIL import Image
from tqdm import tqdm

from ...images import pixels_of
from ...learning.loop import Step

_PREVIEW_SIZE = 512
_SMOOTHING = 0.95
_SECONDS_BETWEEN_TEXTS = 0.25


class TrainingProgress:
    """Callbacks for a training of ``steps`` steps in the node ``node_id``.

    A context manager: inside it there is a bar in the console, as of ComfyUI's samplers. While
    there is one, ComfyUI does not log every time that it prepares a model in dynamic VRAM.
    """

    def __init__(self, steps: int, node_id: str | None) -> None:
        self.steps, self.node_id = steps, node_id
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.console = tqdm(total=steps, disable=not comfy.utils.PROGRESS_BAR_ENABLED)
        self.mean: float | None = None
        self.number = 0
        self.said = 0.0

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.console.close()

    def on_step(self, step: Step) -> None:
        """Move the bar and say the loss, a running mean."""
        self.number = step.number
        previous = step.loss if self.mean is None else self.mean
        self.mean = _SMOOTHING * previous + (1 - _SMOOTHING) * step.loss
        self.bar.update_absolute(step.number, self.steps)
        self.console.update()
        if step.number == self.steps or time.monotonic() > self.said + _SECONDS_BETWEEN_TEXTS:
            self._say(f"step {step.number} of {self.steps}, loss {self.mean:.4f}")

    def on_preview(self, picture: torch.Tensor) -> None:
        """Show a picture (H, W, 3) in [0, 1] on the node."""
        preview = ("JPEG", Image.fromarray(pixels_of(picture).numpy()), _PREVIEW_SIZE)
        self.bar.update_absolute(self.number, self.steps, preview)

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        # A program that has not started ComfyUI's server trains silently.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id, server.client_id)
