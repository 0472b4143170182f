"""What a training tells while it lasts, for the panel on its node: state, events, pictures.

A training runs in the thread that works through ComfyUI's queue, and the routes answer in the
server's event loop; everything here may be called from any thread. Nothing needs a server.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from PIL import Image

from ...images import pixels_of
from ...learning.loop import Step
from ..notices import prompt_server

logger = logging.getLogger(__name__)

EVENT = "sefi.training"
REMEMBERED = 16
"""Trainings whose state is kept: the newest of each node of each workflow."""

LOADING, LOOKING, LEARNING, REPORTING = PHASES = (
    "loading",
    "looking at the photo",
    "learning",
    "drawing the report",
)
PICTURES = ("photo", "preview", "attention")
LOSSES = ("noise", "attention", "leak")

NO_NODE = "sefi-preview"
"""The id that previews go by, which is no node's."""

_PICTURE_SIDE = 512
_SECONDS_BETWEEN_EVENTS = 0.25

_lock = threading.RLock()
_trainings: OrderedDict[tuple[str, str], LiveTraining] = OrderedDict()
_versions = count(1)


class LiveTraining:
    """One training as others see it.

    ``workflow`` is the id of the workflow and ``node`` that of the node in it, ``prompt_id`` the
    queued prompt that it belongs to; any of them may be empty. Making one makes it the newest of
    its node. ``resumable`` is the step of a snapshot that could be gone on from, 0 for none.
    """

    def __init__(
        self,
        steps: int,
        placeholder: str = "",
        workflow: str = "",
        node: str = "",
        prompt: str = "",
    ) -> None:
        self.key = workflow, node
        self.prompt_id, self.steps, self.placeholder = prompt, steps, placeholder
        self.state, self.phase, self.message = "running", LOADING, ""
        self.number, self.resumable = 0, 0
        self.seconds_left: float | None = None
        self.losses = {name: array("d") for name in LOSSES}
        self.pictures: dict[str, tuple[int, bytes]] = {}
        self.stopping = False
        self._told, self._told_at = 0, 0.0
        with _lock:
            _trainings.pop(self.key, None)
            _trainings[self.key] = self
            while len(_trainings) > REMEMBERED:
                _trainings.popitem(last=False)
        self.tell()

    def enter(self, phase: str) -> None:
        """Tell that one of :data:`PHASES` begins."""
        with _lock:
            self.phase = phase
        self.tell()

    def step(self, step: Step, seconds_left: float | None) -> None:
        """Tell of a finished step; of some of them together, where they are quick."""
        with _lock:
            self.number, self.seconds_left = step.number, seconds_left
            for name, values in self.losses.items():
                values.append(getattr(step, name))
        if time.monotonic() > self._told_at + _SECONDS_BETWEEN_EVENTS:
            self.tell()

    def follow(self, history: Sequence[Step]) -> None:
        """Take over the steps of an earlier run."""
        with _lock:
            self.number = history[-1].number
            for name, values in self.losses.items():
                values.extend(getattr(step, name) for step in history)

    def show(self, name: str, picture: torch.Tensor) -> None:
        """Keep one of :data:`PICTURES`, (H, W, 3) in [0, 1], in place of the one before it."""
        encoded = _jpeg(picture)
        with _lock:
            self.pictures[name] = next(_versions), encoded
        self.tell()

    def end(self, state: str, message: str = "") -> None:
        """Tell how it ended: "finished", "stopped", "cancelled" or "failed"."""
        with _lock:
            self.state, self.phase, self.message = state, "", message
            self.seconds_left = None
        self.tell()

    def stop(self, prompt: str) -> str:
        """Ask it to end after the current step; why that cannot be, or nothing."""
        with _lock:
            if self.state != "running" or self.prompt_id != prompt:
                return "this training does not run now: there is nothing to stop"
            if self.phase == REPORTING:
                return "everything is learned already, and the report is being drawn"
            self.stopping = True
        return ""

    def as_json(self, first: int = 0) -> dict[str, Any]:
        """The state, with the losses of the steps from index ``first`` on."""
        with _lock:
            return {
                "workflow": self.key[0],
                "node": self.key[1],
                "prompt_id": self.prompt_id,
                "state": self.state,
                "phase": self.phase,
                "step": self.number,
                "steps": self.steps,
                "seconds_left": self.seconds_left,
                "placeholder": self.placeholder,
                "message": self.message,
                "first": first,
                "losses": {
                    name: [float(f"{value:.6g}") for value in values[first:]]
                    for name, values in self.losses.items()
                },
                "pictures": {name: self.pictures.get(name, (0,))[0] for name in PICTURES},
                "resumable": self.resumable,
            }

    def tell(self) -> None:
        """Send the state and the losses since the last time to every client."""
        server = prompt_server()
        with _lock:
            told, self._told = self._told, len(self.losses[LOSSES[0]])
            self._told_at = time.monotonic()
            if server is not None:
                server.send_sync(EVENT, self.as_json(told))


def send_preview(preview: tuple[str, Image.Image, int], prompt: str) -> bool:
    """Send a picture as ComfyUI's samplers do; whether the client that queued understands this.

    It is said to belong to a node that no graph has: App Mode and the queue show it all the same,
    and the node of the training, which has it in its panel, does not show it a second time.
    ``preview`` is what ComfyUI's progress bars take: a format, a picture, and its longest side.
    """
    server = prompt_server()
    if server is None:
        return False
    from comfy_api import feature_flags
    from protocol import BinaryEventTypes

    known = server.sockets_metadata, server.client_id
    if not feature_flags.supports_feature(*known, "supports_preview_metadata"):
        return False
    names = "node_id", "display_node_id", "real_node_id"
    about = {**dict.fromkeys(names, NO_NODE), "parent_node_id": None, "prompt_id": prompt}
    server.send_sync(
        BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, (preview, about), server.client_id
    )
    return True


def newest(workflow: str, node: str) -> LiveTraining | None:
    """The newest training of a node, if it is remembered."""
    with _lock:
        return _trainings.get((workflow, node))


def of_workflow(workflow: str) -> list[LiveTraining]:
    """The newest training of every node of a workflow, of those that are remembered."""
    with _lock:
        return [training for (id, _), training in _trainings.items() if id == workflow]


def workflow_id(extra_pnginfo: Any) -> str:
    """The id of the workflow that a prompt was queued with, from ComfyUI's hidden input, or ""."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    found = workflow.get("id") if isinstance(workflow, dict) else None
    return found[:200] if isinstance(found, str) else ""


def _jpeg(picture: torch.Tensor) -> bytes:
    image = Image.fromarray(pixels_of(picture).numpy())
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()
