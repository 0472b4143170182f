"""``make bench-full``: a family's true shape with random weights, from the file to the sampling.

Two things are measured. ``tests/comfy/full_shape.py``, in a process of its own, trains two steps,
saves, loads, applies and samples, and notes the memory. Then, here, a step of training is taken in
turns with its floor, the frozen U-Net forward and backward with the passes of the text encoders,
and with the bare U-Net. On the CPU pictures are small, so that the text encoders are a large part
of the floor; of pictures as large as a GPU draws they are a small one. ``FAMILY`` is sd1, sd2 or
sdxl. The last line is one JSON object; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median

import comfy.utils
import torch
from sefi_ide.sefi_core.families import FAMILIES
from sefi_ide.tests.comfy import full_shape

from . import cost
from .contenders import Case, Floor, IdentityTraining, Models

logger = logging.getLogger(__name__)

BARS = {
    "extra_bytes_per_weight": cost.HIGHEST_SECOND_UNET,
    "step_over_floor": cost.HIGHEST["step_over_floor"],
}


def plan_of(family: str) -> cost.Plan:
    """The family's own picture size on a GPU; small pictures, and few steps, on the CPU."""
    if torch.cuda.is_available():
        return cost.Plan(FAMILIES[family].resolution, rounds=7, steps=12)
    return cost.Plan(128, rounds=5, steps=2, most_rounds=13)


def measure_memory(family: str) -> dict:
    """What ``tests/comfy/full_shape.py`` says. Raises ``CalledProcessError`` if it fails."""
    # Large blocks go back to the system when they are freed, so that only what is used counts.
    environment = {**os.environ, "FAMILY": family, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(
        [sys.executable, full_shape.__file__],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


def measure_steps(models: Models, plan: cost.Plan) -> dict[str, float]:
    """A step over its floor's and over the bare U-Net's, and what part the text encoders are."""
    identity, floor = IdentityTraining(models), Floor(models)
    turns = {"identity": identity, "floor": floor, "unet": floor.unet_alone}
    case = Case(plan.side)
    times = cost.interleaved(
        {name: partial(turn, case, plan.steps) for name, turn in turns.items()},
        plan,
        [(cost.ratios("identity", "floor"), BARS["step_over_floor"])],
    )
    return {
        "step_side": plan.side,
        "step_rounds": len(times["floor"]),
        "step_seconds": median(times["identity"]),
        "step_over_floor": cost.ratio(times, "identity", "floor"),
        "step_over_unet": cost.ratio(times, "identity", "unet"),
        "floor_over_unet": cost.ratio(times, "floor", "unet"),
    }


def missed(figures: Mapping[str, float]) -> list[str]:
    """The bars that the figures do not reach, in words."""
    return [
        f"{name} is {figures[name]:.3f}, the bar is {highest:.2f}"
        for name, highest in BARS.items()
        if figures[name] > highest
    ]


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    comfy.utils.set_progress_bar_enabled(False)
    family = os.environ.get("FAMILY") or "sd1"
    if family not in full_shape.UNET_CONFIGS:
        raise SystemExit(f"FAMILY is {family}; there are {', '.join(full_shape.UNET_CONFIGS)}.")
    figures = measure_memory(family)
    logger.info("memory: %s", figures)
    with tempfile.TemporaryDirectory(prefix="sefi-full-shape-") as folder:
        checkpoint = Path(folder) / "full.safetensors"
        full_shape.write_checkpoint(checkpoint, family)
        models = Models.load(checkpoint)
        figures |= measure_steps(models, plan_of(family))
    lines = missed(figures)
    for line in lines:
        logger.error("missed: %s", line)
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
