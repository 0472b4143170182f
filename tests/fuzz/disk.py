"""The identity folder of this process, and processes beside it; needs POSIX."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ...sefi_core.identity.identity import Identity


def one(value: float, width: int, name: str = "anna") -> Identity:
    """An identity all of whose numbers are ``value``, so that a mixture shows."""
    rows = {"l": torch.full((2, 1, width), float(value))}
    return Identity(name, "person", "sd1", rows, rows, {"value": value})


@contextmanager
def identity_folder() -> Iterator[Path]:
    """An empty folder that is ComfyUI's for identities."""
    folder = Path(tempfile.mkdtemp(prefix="sefi-fuzz-"))
    folder_paths.folder_names_and_paths["sefi"] = ([str(folder)], {".safetensors"})
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Child:
    """A function in a process of its own."""

    def __init__(self, function: Callable[[], Any]):
        self._receiving, sending = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                told = (True, function())
            except BaseException:
                told = (False, traceback.format_exc())
            os.write(sending, json.dumps(told).encode())
            os._exit(0)
        os.close(sending)

    def result(self) -> Any:
        """What the function gave; raises AssertionError if it raised or the process died."""
        with os.fdopen(self._receiving, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert status == 0 and told, f"a process died of signal {os.WTERMSIG(status)}"
        good, result = json.loads(told)
        assert good, result
        return result

    def kill(self) -> bool:
        """End it at once; gives whether it was still at work."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._receiving)
        return os.WIFSIGNALED(status)


def pause(seconds: float) -> None:
    if seconds:
        time.sleep(seconds)
