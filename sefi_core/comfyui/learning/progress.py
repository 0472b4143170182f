"""Tell the user how far a training is: progress bars, live previews, the panel on the node."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from tqdm import tqdm

from ...errors import printable
from ...images import pixels_of
from ...learning.loop import Step
from .live import LiveTraining, send_preview
from .pace import Pace

logger = logging.getLogger(__name__)

_PREVIEW_SIZE = 512


class Watcher:
    """What a training tells to, step by step; this one listens to nothing and stops nothing."""

    def phase(self, name: str) -> None:
        """One of :data:`.live.PHASES` begins. May raise to stop."""

    def step(self, step: Step) -> None:
        """A step is finished. May raise to stop."""

    def going_on(self, history: Sequence[Step]) -> None:
        """These steps were taken before it was interrupted, and the next one follows on them."""

    def picture(self, name: str, picture: torch.Tensor) -> None:
        """There is a newer one of :data:`.live.PICTURES`, (H, W, 3) in [0, 1]."""

    def is_due(self, number: int) -> bool:
        """Whether pictures are wanted after the step of that number."""
        return False

    def preview_scale(self) -> float:
        """Whether one of these is to be a preview, which takes time: its side, 0 for none.

        As a share of the training pictures' side.
        """
        return 0.0

    def stopping(self) -> bool:
        """Whether the training shall end now, with what was learned."""
        return False


class TrainingProgress(Watcher):
    """Tells ComfyUI of a training of ``steps`` steps in the node ``node``; see :mod:`.live`.

    ``every`` is the number of steps between pictures, 0 for none.

    A context manager: inside it there is a bar in the console, as of ComfyUI's samplers. While
    there is one, ComfyUI does not log every time that it prepares a model in dynamic VRAM. How the
    block ends is how the training ended.
    """

    def __init__(
        self,
        steps: int,
        node: str | None,
        every: int = 0,
        placeholder: str = "",
        workflow: str = "",
        prompt: str = "",
    ) -> None:
        self.steps, self.every = steps, every
        self.live = LiveTraining(steps, placeholder, workflow, node or "", prompt)
        self.bar = comfy.utils.ProgressBar(steps, node_id=node)
        self.console = tqdm(total=steps, disable=not comfy.utils.PROGRESS_BAR_ENABLED)
        self.number = 0
        self.recall = ""
        self.pace = Pace(steps)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.console.close()
        where = f"at step {self.number} of {self.steps}" if self.number else "before the first step"
        if error is None and self.number == self.steps:
            self.live.resumable = 0
            self.live.end("finished", self.recall)
        elif error is None:
            self._end("stopped", f"stopped {where}, and kept")
        elif isinstance(error, comfy.model_management.InterruptProcessingException):
            again = "; queue it again to go on from there" if self.live.resumable else ""
            self._end("cancelled", f"cancelled {where}{again}")
        else:
            self.live.end("failed", printable(str(error)) or type(error).__name__)

    def phase(self, name: str) -> None:
        """Name what begins; raises ComfyUI's exception where the user has cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.pace.begin()
        self.live.enter(name)

    def step(self, step: Step) -> None:
        """Move the bars, and tell the losses and the time left.

        Raises ComfyUI's exception where the user has cancelled.
        """
        self.number = step.number
        self.pace.step(step.number)
        self.live.step(step, self.pace.seconds_left())
        self.console.update()
        self.bar.update_absolute(step.number, self.steps)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def going_on(self, history: Sequence[Step]) -> None:
        """Say from which step it goes on, and show the losses of those before."""
        self._follow(history)
        self.kept(self.number)
        self.live.message = f"going on from step {self.number} of {self.steps}"
        logger.info("SeFi Train Identity: %s.", self.live.message)
        self.live.tell()

    def recalled(self, history: Sequence[Step]) -> None:
        """Say that all of it was learned before, with the losses of then."""
        self._follow(history)
        self.recall = "learned before with the same settings"

    def kept(self, step: int) -> None:
        """There is a snapshot of that step to go on from."""
        self.live.resumable = step

    def _follow(self, history: Sequence[Step]) -> None:
        self.number = history[-1].number
        self.live.follow(history)
        self.console.update(len(history))
        self.bar.update_absolute(self.number, self.steps)

    def is_due(self, number: int) -> bool:
        """Every so many steps, and after the last."""
        return self.every > 0 and (number % self.every == 0 or number == self.steps)

    def preview_scale(self) -> float:
        """As large as there is time for; the one after the last step is drawn for the report."""
        scale = self.pace.affordable_preview() if self.number < self.steps else 0.0
        if scale:
            self.pace.draw(scale)
        return scale

    def picture(self, name: str, picture: torch.Tensor) -> None:
        """Show a picture on the panel, and a preview as ComfyUI shows its own as well."""
        if name == "preview":
            self.pace.drawn()
        self.live.show(name, picture)
        if name == "preview":
            preview = ("JPEG", Image.fromarray(pixels_of(picture).numpy()), _PREVIEW_SIZE)
            if not send_preview(preview, self.live.prompt_id):
                self.bar.update_absolute(self.number, self.steps, preview)

    def stopping(self) -> bool:
        """Whether somebody has asked to stop and keep."""
        return self.live.stopping

    def _end(self, state: str, message: str) -> None:
        self.live.end(state, message)
        logger.info("SeFi Train Identity: %s.", message)
