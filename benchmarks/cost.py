"""``make bench-cost``: what do training and sampling cost beyond the U-Net itself?

Measured side by side on the miniature and on a Stable Diffusion 1.5 with random weights: a step of
SeFi Train Identity against the floor (the frozen U-Net forward and backward and two passes of the
text encoder), against diffusers' textual inversion and core's TrainLoraNode; sampling with and
without identities; peak memory; and whether time and memory grow as the floor's do, from a small
training to one that is larger in all respects. Times are processor time on a CPU, on one core for
the miniature, and their figures medians of ratios that were taken in turns, as many as it takes to
say on which side of its bar each is; memory and the time before the first step are measured once.
``SHAPE`` (miniature, full_shape) measures one of the two alone. A run of both leaves ``table.md``
in ``output/bench-cost``. The last line is one JSON object; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import median

import comfy.model_management
import comfy.utils
import torch
from sefi_ide.sefi_core.text.captions import AUTO
from sefi_ide.tests.comfy import full_shape
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS
from sefi_ide.tools.comfyui import REPOSITORY

from .commit import measured_at
from .contenders import (
    Case,
    Floor,
    IdentityTraining,
    LoraTraining,
    Models,
    Sampling,
    TextualInversion,
    halves,
    seconds_of,
    some_identities,
)
from .memory import peak_in_own_process

logger = logging.getLogger(__name__)

THREADS = torch.get_num_threads()
OUTPUT = REPOSITORY / "output" / "bench-cost"
SHAPES = ("miniature", "full_shape")

HIGHEST = {
    "step_over_floor": 1.15,
    "step_over_lora": 1.0,
    "sampling_one_identity": 1.03,
    "sampling_two_identities": 1.05,
    "memory_over_floor": 1.15,
}
HIGHEST_REGIONS = 1.05
"""Of ``regions_...`` over two identities everywhere, at the true shape. On the miniature the keys
and values of one more context alone are 0.03 of a step, and small operations as much again."""
HIGHEST_INVERSION = 1.05
"""Of ``step_over_inversion``, on a GPU at 512 pixels."""
HIGHEST_GROWTH = 1.10
"""Of each ``growth_...``: as fast as the floor, and a tenth for what the measurement scatters."""
HIGHEST_SECOND_UNET = 0.6
"""Bytes for each parameter of the U-Net, where the smallest copy would have one."""

Turn = Callable[[], list[float]]
"""Does some steps, and says how many seconds each took."""
Times = dict[str, list[float]]
Ratios = Callable[[Times], list[float]]
"""The ratios, one for each round, whose median is a figure."""


@dataclass(frozen=True)
class Plan:
    """How much to measure: the pictures' side, rounds, and steps in each turn of a round.

    There are as many rounds as it takes to settle where the figures are to their bars, within
    ``rounds`` and ``most_rounds``.
    """

    side: int
    rounds: int
    steps: int
    growth: tuple[Case, Case] | None = None
    """A small training and a large one, to compare; None for no comparison."""
    most_rounds: int = 280
    threads: int | None = None
    """Of PyTorch on a CPU; None for all that it has."""


def miniature_plan() -> Plan:
    """For the miniature, whose pictures have 128 pixels.

    On one core: its layers are too small to share. With four, more than half of the processor time
    of a step is threads waiting for each other, and never the same.
    """
    large = Case(256, batch=2, photos=4, chunks=2)
    return Plan(128, rounds=7, steps=12, threads=1, growth=(Case(64), large))


def full_shape_plan() -> Plan:
    """For Stable Diffusion's true shape: small pictures on the CPU."""
    if torch.cuda.is_available():
        return Plan(512, rounds=7, steps=12)
    return Plan(128, rounds=7, steps=4, most_rounds=49)


def interleaved(
    turns: Mapping[str, Turn], plan: Plan, barred: Sequence[tuple[Ratios, float]] = ()
) -> Times:
    """The median seconds of each turn in each round; a round before warms up.

    ``barred`` are the figures that have a bar, and these bars.
    """
    times: Times = {name: [] for name in turns}
    for number in range(1 + plan.most_rounds):
        for name, turn in turns.items():
            seconds = median(turn())
            if number:
                times[name].append(seconds)
        if number >= plan.rounds and all(settled(of(times), bar) for of, bar in barred):
            break
    else:
        near = [bar for of, bar in barred if not settled(of(times), bar)]
        logger.warning("after %d rounds still too near to tell: bar %s", plan.most_rounds, near)
    return times


def settled(values: Sequence[float], bar: float) -> bool:
    """Whether their median is on one side of the bar beyond chance, by a sign test.

    It asks for three standard deviations, because it is made again after every round.
    """
    above = sum(value > bar for value in values)
    return abs(2 * above - len(values)) > 3 * sqrt(len(values))


def ratios(one: str, other: str) -> Ratios:
    """How much longer ``one`` takes than ``other`` in the same round."""
    return lambda times: [a / b for a, b in zip(times[one], times[other], strict=True)]


def ratio(times: Times, one: str, other: str) -> float:
    """The median of :func:`ratios`."""
    return median(ratios(one, other)(times))


def measure_training(models: Models, plan: Plan) -> dict[str, float]:
    """One step against the floor, textual inversion and a LoRA."""
    identity, floor = IdentityTraining(models), Floor(models)
    case = Case(plan.side)
    turns = {
        "identity": identity,
        "floor": floor,
        "text_encoder": floor.text_encoder_alone,
        "inversion": TextualInversion(models),
        "lora": LoraTraining(models),
    }
    times = interleaved(
        {name: partial(turn, case, plan.steps) for name, turn in turns.items()},
        plan,
        [(ratios("identity", name), HIGHEST[f"step_over_{name}"]) for name in ("floor", "lora")],
    )
    asking = IdentityTraining(models, captions=(AUTO,))
    asking(case, 2)
    step = median(times["identity"])
    return {
        "step_over_floor": ratio(times, "identity", "floor"),
        "text_encoder_share_of_floor": ratio(times, "text_encoder", "floor"),
        "step_over_inversion": ratio(times, "identity", "inversion"),
        "step_over_lora": ratio(times, "identity", "lora"),
        "steps_before_first": asking.seconds_before[0] / step - 1,
        "steps_before_first_without_captions": median(identity.seconds_before[1:]) / step - 1,
    }


def measure_sampling(models: Models, plan: Plan) -> dict[str, float]:
    """Sampling and encoding of a prompt for two people, with identities against without."""
    names = ("none", "one_identity", "two_identities")
    identities = some_identities(models, 2)
    variants = {name: Sampling(models, identities[:n], 2) for n, name in enumerate(names)}
    sampling = interleaved(
        {name: partial(v, plan.side, plan.steps) for name, v in variants.items()},
        plan,
        [(ratios(name, "none"), HIGHEST[f"sampling_{name}"]) for name in names[1:]],
    )
    regions = {
        "none": variants["two_identities"],
        "given": Sampling(models, identities, 2, halves()),
        "automatic": Sampling(models, identities, 2, "automatic"),
    }
    with_regions = interleaved(
        {name: partial(v, plan.side, plan.steps) for name, v in regions.items()},
        plan,
        [(ratios(name, "none"), HIGHEST_REGIONS) for name in ("given", "automatic")],
    )
    encoding = interleaved(
        {name: partial(seconds_of, v.encode, plan.steps) for name, v in variants.items()}, plan
    )
    figures = {f"sampling_{name}": ratio(sampling, name, "none") for name in names[1:]}
    for name in ("given", "automatic"):
        figures[f"regions_{name}"] = ratio(with_regions, name, "none")
    return figures | {f"encoding_{name}": ratio(encoding, name, "none") for name in names[1:]}


def measure_memory(checkpoint: Path, plan: Plan) -> dict[str, float]:
    """Peak memory of training against the floor's, each in a process of its own.

    Its growth, from the small training to the large one, is that of the steps.
    """

    def both(case: Case) -> list[dict[str, int]]:
        return [peak_in_own_process(kind, checkpoint, case) for kind in ("identity", "floor")]

    identity, floor = both(Case(plan.side))
    figures = {
        "memory_over_floor": identity["peak"] / floor["peak"],
        "memory_bytes_per_unet_parameter": (identity["peak"] - floor["peak"])
        / floor["unet_parameters"],
    }
    if plan.growth:
        small, large = (
            identity["peak_of_steps"] / floor["peak_of_steps"]
            for identity, floor in map(both, plan.growth)
        )
        figures["growth_memory"] = large / small
    return figures


def measure_growth(models: Models, plan: Plan) -> dict[str, float]:
    """By how much a step grows from the small training to the large one, over the floor's.

    Every round visits both: a machine that is slow for a minute is slow for both of them.
    """
    if not plan.growth:
        return {}
    identity, floor = IdentityTraining(models), Floor(models)
    turns = {
        f"{name} {size}": partial(training, case, plan.steps)
        for size, case in zip(("small", "large"), plan.growth, strict=True)
        for name, training in (("ours", identity), ("floor", floor))
    }

    def growth(times: Times) -> list[float]:
        small, large = (ratios(f"ours {s}", f"floor {s}")(times) for s in ("small", "large"))
        return [b / a for a, b in zip(small, large, strict=True)]

    times = interleaved(turns, plan, [(growth, HIGHEST_GROWTH)])
    return {"growth_time": median(growth(times))}


def measure(checkpoint: Path, plan: Plan) -> dict[str, float]:
    """All figures of one checkpoint."""
    torch.set_num_threads(plan.threads or THREADS)
    models = Models.load(checkpoint)
    figures = measure_training(models, plan)
    logger.info("training: %s", figures)
    figures |= measure_sampling(models, plan)
    figures |= measure_growth(models, plan)
    del models  # there may be no room for two more beside it
    comfy.model_management.unload_all_models()
    figures |= measure_memory(checkpoint, plan)
    logger.info("all of %s: %s", checkpoint.name, figures)
    return figures


def bars_of(shape: str, found: Mapping[str, float]) -> dict[str, float]:
    """How high the figures of a shape may be; not all have a bar."""
    bars = dict(HIGHEST)
    bars |= {name: HIGHEST_GROWTH for name in found if name.startswith("growth_")}
    if shape == "full_shape":
        # A copy of the miniature would be too small to see in the memory of a process.
        bars["memory_bytes_per_unet_parameter"] = HIGHEST_SECOND_UNET
        bars |= {name: HIGHEST_REGIONS for name in found if name.startswith("regions_")}
        if torch.cuda.is_available():
            bars["step_over_inversion"] = HIGHEST_INVERSION
    return bars


def missed(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The bars that the figures of each shape do not reach, in words."""
    return [
        f"{shape}: {name} is {found[name]:.3f}, the bar is {highest:.2f}"
        for shape, found in figures.items()
        for name, highest in bars_of(shape, found).items()
        if found[name] > highest
    ]


def markdown(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of all shapes as a table."""
    bars = {}
    for shape, found in figures.items():
        bars |= bars_of(shape, found)
    lines = ["| figure | " + " | ".join(figures) + " | bar |", "|---" * (2 + len(figures)) + "|"]
    for name in dict.fromkeys(name for found in figures.values() for name in found):
        cells = [f"{found[name]:.3f}" if name in found else "" for found in figures.values()]
        cells.append(f"{bars[name]:.2f}" if name in bars else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _wanted_shapes() -> tuple[str, ...]:
    """The models that the environment asks for."""
    shape = os.environ.get("SHAPE")
    if shape and shape not in SHAPES:
        raise SystemExit(f"SHAPE is {shape}: choose of {', '.join(SHAPES)}, or leave it out")
    return (shape,) if shape else SHAPES


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    comfy.utils.set_progress_bar_enabled(False)
    commit = measured_at()
    shapes = _wanted_shapes()
    figures = {}
    if "miniature" in shapes:
        figures["miniature"] = measure(CHECKPOINTS["sd1"], miniature_plan())
    if "full_shape" in shapes:
        with tempfile.TemporaryDirectory(prefix="sefi-full-shape-") as folder:
            checkpoint = Path(folder) / "full_shape.safetensors"
            full_shape.write_checkpoint(checkpoint, "sd1")
            figures["full_shape"] = measure(checkpoint, full_shape_plan())
    if shapes == SHAPES:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "table.md").write_text(f"{commit}\n\n{markdown(figures)}", encoding="utf-8")
    lines = missed(figures)
    for line in lines:
        logger.error("missed: %s", line)
    rounded = {
        shape: {name: round(value, 4) for name, value in found.items()}
        for shape, found in figures.items()
    }
    sys.stdout.write(json.dumps(rounded) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
