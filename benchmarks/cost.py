"""``make bench-cost``: what do training and sampling cost beyond the U-Net itself?

Measured side by side on the miniature and on a Stable Diffusion 1.5 with random weights: a step of
SeFi Train Identity against the floor (the frozen U-Net forward and backward and two passes of the
text encoder), against diffusers' textual inversion and core's TrainLoraNode; sampling with and
without identities; peak memory; and how all this grows. Times are processor time on a CPU, on one
core for the miniature, and their figures medians of ratios that were taken in turns, as many as it
takes to say on which side of its bar each is; memory and the time before the first step are
measured once. ``SHAPE`` (miniature, full_shape) measures one of the two alone. The growth is drawn
into ``growth.png`` in ``output/bench-cost``, where a run of both leaves ``table.md``, too. The last
line is one JSON object; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import median
from typing import NamedTuple

from . import comfyui
from .commit import measured_at
from .contenders import (
    Case,
    Floor,
    IdentityTraining,
    LoraTraining,
    Models,
    Sampling,
    TextualInversion,
    seconds_of,
    some_identities,
)
from .memory import peak_in_own_process
from .plots import plot_growth

# isort: split
import comfy.model_management
import comfy.utils
import torch
from sefi_ide.sefi_core.text.captions import AUTO
from sefi_ide.tests.comfy import full_shape

logger = logging.getLogger(__name__)

THREADS = torch.get_num_threads()
OUTPUT = comfyui.REPOSITORY / "output" / "bench-cost"
SHAPES = ("miniature", "full_shape")

HIGHEST = {
    "step_over_floor": 1.15,
    "step_over_lora": 1.0,
    "sampling_one_identity": 1.03,
    "sampling_two_identities": 1.05,
    "memory_over_floor": 1.15,
}
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


class Curve(NamedTuple):
    """Times in each case over those of the first case's floor, and how they grow.

    ``growth`` is by how much ours grow from the first case to the last, over the floor's.
    """

    ours: list[float]
    floor: list[float]
    growth: float


@dataclass(frozen=True)
class Plan:
    """How much to measure: the pictures' side, rounds, and steps in each turn of a round.

    There are as many rounds as it takes to settle where the figures are to their bars, within
    ``rounds`` and ``most_rounds``.
    """

    side: int
    rounds: int
    steps: int
    growth: Mapping[str, tuple[Case, ...]]
    """The cases of each curve, the smallest first."""
    most_rounds: int = 280
    threads: int | None = None
    """Of PyTorch on a CPU; None for all that it has."""


def miniature_plan() -> Plan:
    """For the miniature, whose pictures have 128 pixels.

    On one core: its layers are too small to share. With four, more than half of the processor time
    of a step is threads waiting for each other, and never the same.
    """
    case = Case(128)
    return Plan(
        128,
        rounds=7,
        steps=12,
        threads=1,
        growth={
            "picture_size": tuple(replace(case, side=side) for side in (64, 128, 192, 256)),
            "batch_size": tuple(replace(case, batch=batch) for batch in (1, 2, 4)),
            "photos": tuple(replace(case, photos=photos) for photos in (1, 4, 16)),
            "prompt_length": tuple(replace(case, chunks=chunks) for chunks in (1, 2, 3)),
        },
    )


def full_shape_plan() -> Plan:
    """For Stable Diffusion's true shape: small pictures on the CPU."""
    if torch.cuda.is_available():
        return Plan(512, rounds=7, steps=12, growth={})
    return Plan(128, rounds=7, steps=4, growth={}, most_rounds=49)


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
    encoding = interleaved(
        {name: partial(seconds_of, v.encode, plan.steps) for name, v in variants.items()}, plan
    )
    figures = {f"sampling_{name}": ratio(sampling, name, "none") for name in names[1:]}
    return figures | {f"encoding_{name}": ratio(encoding, name, "none") for name in names[1:]}


def measure_memory(checkpoint: Path, side: int) -> dict[str, float]:
    """Peak memory of training against the floor's, each in a process of its own."""
    identity, floor = (
        peak_in_own_process(kind, checkpoint, side) for kind in ("identity", "floor")
    )
    return {
        "memory_over_floor": identity["peak"] / floor["peak"],
        "memory_bytes_per_unet_parameter": (identity["peak"] - floor["peak"])
        / floor["unet_parameters"],
    }


def measure_growth(models: Models, plan: Plan) -> dict[str, Curve]:
    """Curve -> the times of training and of the floor over those of the smallest case's floor.

    For identities it is the time of sampling with 0 to 3 of them; the floor has the same prompt
    and none.
    """
    identity, floor = IdentityTraining(models), Floor(models)
    turns = {
        name: [
            (partial(identity, case, plan.steps), partial(floor, case, plan.steps))
            for case in cases
        ]
        for name, cases in plan.growth.items()
    }
    if plan.growth:
        people = some_identities(models, 3)
        with_people = [Sampling(models, people[:n], len(people)) for n in range(len(people) + 1)]
        turns["identities"] = [
            tuple(partial(v, plan.side, plan.steps) for v in (ours, with_people[0]))
            for ours in with_people
        ]
    curves = {}
    for name, pairs in turns.items():
        curves[name] = _curve(pairs, plan)
        logger.info("growth with %s: %s", name, curves[name])
    return curves


def _curve(pairs: Sequence[tuple[Turn, Turn]], plan: Plan) -> Curve:
    """Times of ours and of the floor in each case, over those of the first case's floor.

    Every round visits all cases: a machine that is slow for a minute is slow for all of them.
    """
    turns = {
        f"{name} {case}": turn
        for case, pair in enumerate(pairs)
        for name, turn in zip(("ours", "floor"), pair, strict=True)
    }
    over_floor = [ratios(f"ours {case}", f"floor {case}") for case in range(len(pairs))]

    def growth(times: Times) -> list[float]:
        smallest, largest = over_floor[0](times), over_floor[-1](times)
        return [b / a for a, b in zip(smallest, largest, strict=True)]

    times = interleaved(turns, plan, [(growth, HIGHEST_GROWTH)])
    floor = [ratio(times, f"floor {case}", "floor 0") for case in range(len(pairs))]
    ours = [value * median(of(times)) for value, of in zip(floor, over_floor, strict=True)]
    return Curve(ours, floor, median(growth(times)))


def draw(curves: Mapping[str, Curve], plan: Plan, path: Path) -> None:
    """Save one panel for each curve."""
    fields = {"picture_size": "side", "batch_size": "batch", "prompt_length": "chunks"}
    places = {
        name: [getattr(case, fields.get(name, name)) for case in cases]
        for name, cases in plan.growth.items()
    }
    plot_growth({name: (ours, floor) for name, (ours, floor, _) in curves.items()}, places, path)


def measure(checkpoint: Path, plan: Plan) -> dict[str, float]:
    """All figures of one checkpoint."""
    torch.set_num_threads(plan.threads or THREADS)
    models = Models(*comfyui.load(checkpoint))
    figures = measure_training(models, plan)
    logger.info("training: %s", figures)
    figures |= measure_sampling(models, plan)
    curves = measure_growth(models, plan)
    if curves:
        draw(curves, plan, OUTPUT / "growth.png")
    figures |= {f"growth_{name}": curve.growth for name, curve in curves.items()}
    del models  # there may be no room for two more beside it
    comfy.model_management.unload_all_models()
    figures |= measure_memory(checkpoint, plan.side)
    logger.info("all of %s: %s", checkpoint.name, figures)
    return figures


def bars_of(shape: str, found: Mapping[str, float]) -> dict[str, float]:
    """How high the figures of a shape may be; not all have a bar."""
    bars = dict(HIGHEST)
    bars |= {name: HIGHEST_GROWTH for name in found if name.startswith("growth_")}
    if shape == "full_shape":
        # A copy of the miniature would be too small to see in the memory of a process.
        bars["memory_bytes_per_unet_parameter"] = HIGHEST_SECOND_UNET
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
        figures["miniature"] = measure(comfyui.MINIATURE, miniature_plan())
    if "full_shape" in shapes:
        with tempfile.TemporaryDirectory(prefix="sefi-full-shape-") as folder:
            checkpoint = Path(folder) / "full_shape.safetensors"
            full_shape.write_checkpoint(checkpoint)
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
