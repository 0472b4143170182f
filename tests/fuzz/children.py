"""Campaigns in processes of their own, which faults may end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from .campaign import MOST_FAILURES, Campaign

WITH_COMFYUI = ("training", "graphs")
"""Campaigns that have ComfyUI in their own process."""

CAMPAIGNS = ("files", "readers", "kills", *WITH_COMFYUI, "prompts")


def campaign_of(name: str) -> Campaign:
    """The module of a campaign."""
    return import_module(f".{name}", __package__)  # type: ignore[return-value]


def watched(
    name: str,
    seed: int,
    first: int = 0,
    cases: int | None = None,
    seconds: float | None = None,
    command: tuple[str, ...] = (sys.executable, str(Path(__file__).parent)),
) -> dict:
    """What :func:`campaign.told_of` gives, from another process.

    A case that ends the process is not clean, and the next process goes on behind it. Raises
    ValueError if there is no such campaign.
    """
    if name not in CAMPAIGNS:
        raise ValueError(f"There is no campaign {name}, but {', '.join(CAMPAIGNS)}.")
    total: dict = {"tried": 0, "clean": 0, "failures": {}}
    end = None if seconds is None else time.monotonic() + seconds
    environment = {**os.environ, "SEED": str(seed), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="sefi-fuzz-") as folder:
        note = Path(folder) / "note"
        while True:
            arguments = ["--campaign", name, "--first", str(first), "--note", str(note)]
            if cases is not None:
                arguments += ["--cases", str(cases)]
            if end is not None:
                arguments += ["--seconds", str(max(0.0, end - time.monotonic()))]
            note.unlink(missing_ok=True)
            done = subprocess.run(
                [*command, *arguments], env=environment, capture_output=True, text=True
            )
            if done.returncode == 0:
                _add(total, json.loads(done.stdout.splitlines()[-1]))
                return total
            if not note.exists():
                raise RuntimeError(f"{name} did not begin:\n{done.stderr[-4000:]}")
            told = json.loads(note.read_text())
            number = told["case"]
            what = f"the process ended with {done.returncode}:\n{done.stderr[-4000:]}"
            _add(total, {**told, "failures": {number: what}, "tried": told["tried"] + 1})
            if cases is not None:
                cases -= number + 1 - first
            first = number + 1
            spent = cases == 0 or (end is not None and time.monotonic() >= end)
            if spent or len(total["failures"]) >= MOST_FAILURES:
                return total


def _add(total: dict, told: dict) -> None:
    total["tried"] += told["tried"]
    total["clean"] += told["clean"]
    total["failures"] |= told["failures"]
