"""The peak memory of one training, in a process of its own.

``python -m benchmarks.memory identity|floor CHECKPOINT CASE`` prints one JSON object; ``CASE`` is
one, too, of the fields of :class:`Case`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from sefi_ide.tools.comfyui import REPOSITORY

from .contenders import Case, Floor, IdentityTraining, Models

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_in_own_process(kind: str, checkpoint: Path, case: Case) -> dict[str, int]:
    """:func:`measure` in a new process. Raises ``CalledProcessError`` if that fails."""
    asked = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "benchmarks.memory", kind, str(checkpoint), asked]
    run = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(kind: str, checkpoint: Path, case: Case) -> dict[str, int]:
    """``peak``, the bytes at the peak of a training of three steps, and ``peak_of_steps``.

    They are of the whole process or of the GPU; the second is without what comes after the last
    step, the report. ``unet_parameters`` tells how many bytes a second U-Net would take. The floor
    has transformers' text encoder in the place of the CLIP, and otherwise the same models loaded.
    """
    models = Models.load(checkpoint)
    peaks = []
    if kind == "identity":
        training = IdentityTraining(models)
        training.after_step = lambda: peaks.append(_peak())
    else:
        training = Floor(models)
        models = training.models = dataclasses.replace(models, clip=None)
    parameters = sum(parameter.numel() for parameter in models.unet.parameters())
    gc.collect()
    _reset_peak()
    training(case, 3)
    peaks.append(_peak())
    return {
        "peak": peaks[-1],
        "peak_of_steps": peaks[-2] if kind == "identity" else peaks[-1],
        "unet_parameters": parameters,
    }


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # Linux: forget the peak, which loading the file has set


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        return 1024 * int(STATUS.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    figures = measure(sys.argv[1], Path(sys.argv[2]), Case(**json.loads(sys.argv[3])))
    sys.stdout.write(json.dumps(figures) + "\n")
