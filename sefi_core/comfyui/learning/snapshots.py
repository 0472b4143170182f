"""Snapshots of trainings under way, on the disk: what a cancel or a crash leaves to go on from.

They lie in ComfyUI's own folder for what is not served to browsers, ``{user}/__sefi/snapshots``,
since they hold a face as an identity does. ComfyUI empties its temporary folder whenever it starts
and ends, so nothing there would outlive a crash.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...identity.saving import make_folder, write_whole
from ...learning.loop import KeepState
from ...learning.state import LoopState, Snapshot, from_bytes, to_bytes

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""Between two snapshots of a training, and so what a crash loses at most."""

SHARE = 0.01
"""Of a training's time that snapshots may take; where one takes long, they are fewer."""

MOST = 8
"""Snapshots that are kept, the newest ones: of trainings that nobody went on with."""

DAYS = 14
"""How long they are kept."""


def folder() -> Path:
    """Where snapshots lie; the folder may not be there yet."""
    return Path(folder_paths.get_system_user_directory("sefi"), "snapshots")


class Snapshots:
    """The snapshot of one training, whose ``key`` is that of :func:`.content.training_key`.

    ``on_kept`` is told the step of each snapshot that has been written. A disk that does not take
    snapshots is named in the log, once, and hinders no training.
    """

    def __init__(self, key: str, on_kept: Callable[[int], None] | None = None) -> None:
        self.key, self.on_kept = key, on_kept
        self.path = folder() / f"{key}.safetensors"
        self.captions: list[str] = []
        self.step = 0
        self._next = time.monotonic() + SECONDS
        self._refused = False
        _remove_old()

    def load(self) -> Snapshot | None:
        """The state to go on from, None if there is none."""
        try:
            snapshot = from_bytes(self.path.read_bytes(), self.key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "SeFi Train Identity begins anew, the snapshot %s cannot be used: %s",
                self.path,
                error,
            )
            return None
        self.step = len(snapshot.state.history)
        return snapshot

    def of(self, captions: Sequence[str]) -> KeepState:
        """What keeps the states of a training whose photos show this."""
        self.captions = list(captions)
        return self._keep

    def _keep(self, state: Callable[[], LoopState], last: bool) -> None:
        """See :data:`KeepState`: keep it if it is time for it, or if it is the last."""
        started = time.monotonic()
        if self._refused or not (last or started >= self._next):
            return
        try:
            self.keep_now(state())
        except OSError as error:
            self._refused = True
            logger.warning(
                "SeFi Train Identity keeps no snapshots, %s cannot be written (%s).",
                self.path,
                error.strerror or error,
            )
            return
        took = time.monotonic() - started
        self._next = started + took + max(SECONDS, took / SHARE)

    def keep_now(self, state: LoopState) -> None:
        """Write a snapshot; raises OSError where the disk does not take it."""
        step = len(state.history)
        if step != self.step:
            make_folder(self.path.parent)
            content = to_bytes(Snapshot(state, self.captions), self.key)
            write_whole(self.path, content, overwrite=True)
        self.step = step
        if self.on_kept is not None:
            self.on_kept(step)

    def remove(self) -> None:
        """Remove the snapshot of a training that is finished."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _remove_old() -> None:
    """Remove what is too old, and of the rest all but the newest."""
    ages: list[tuple[float, Path]] = []
    for path in folder().glob("*.safetensors"):
        with suppress(OSError):
            ages.append((time.time() - os.stat(path).st_mtime, path))
    for number, (age, path) in enumerate(sorted(ages)):
        if number >= MOST or age > DAYS * 24 * 3600:
            with suppress(OSError):
                path.unlink()
