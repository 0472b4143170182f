"""``make bench-start``: how far does a predicted identity come, and a few steps from it?

The face encoder of the drawn world (``make encoder-mini``) predicts people whom nothing has seen,
from one photo; SeFi then trains on from there, or from the class word as ever. r is ID(P) from 0
at the class word to 1 at people whom the miniature knows by name.

Settings from the environment: ``SEEDS`` ("1 2" by default), ``SUBJECTS`` of each seed (16),
``PROMPTS`` (12). ``CURVE=1`` adds the curve of steps against ID(P), with textual inversion and LoRA
beside, on ``CURVE_SUBJECTS`` (8) of the people; ``BESIDE`` ("targets rates forms") adds comparisons
on ``BESIDE_SUBJECTS`` (12): what the picture outside the mask should be, learning rates of
refining, and what a mapping predicts (trained first where it is not, some minutes each). Finished
work is kept in ``output/bench-start``. Writes ``results.json``, ``table.md`` and, with the curve,
``curve.png``. The last line is one JSON object; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sefi_ide.sefi_core import evaluation
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.tools.comfyui import REPOSITORY

from .commit import measured_at
from .encoder_mini import FORMS, trained_form
from .ending import finish
from .jobs import Figures, Job, run_all
from .methods import ENCODER, FORM, LORA, REFINED
from .plots import plot_steps

logger = logging.getLogger(__name__)

OUTPUT = REPOSITORY / "output" / "bench-start"
DEFAULTS = TrainingSettings()
ZERO_SHOT_BAR = 0.85
TIME_BAR = 0.1
LOWEST_SHARE = 0.5

ROWS = {
    "class_word": ("class_word", {}),
    ENCODER: (ENCODER, {}),
    REFINED: (REFINED, {}),
    "sefi": ("sefi", {}),
    "named": ("named", {}),
}
"""What is compared on all people: name -> method and changed settings."""
TITLES = {
    "class_word": "class word",
    ENCODER: "predicted, no training",
    REFINED: f"predicted, then {DEFAULTS.predicted_steps} steps",
    "sefi": f"from the class word, {DEFAULTS.steps} steps (the defaults)",
    "named": "known by name",
}
TARGETS = {
    "nothing": {},
    "photo": {"background_weight": 1.0},
    "class word": {"background_target": "class word"},
}
RATES = (0.0025, 0.005, 0.01, 0.02)
"""Of refining; the second one is the default, that of the class word's training."""
BESIDE = {
    "targets": {
        f"{title}; outside the mask: {target}": (method, changes)
        for method, title in (("sefi", "defaults"), (REFINED, "predicted, refined"))
        for target, changes in TARGETS.items()
    },
    "rates": {
        f"predicted, refined at {rate:g}": (REFINED, {"predicted_learning_rate": rate})
        for rate in RATES
    },
    "forms": {
        f"{form}, {title}": (method, {FORM: form} if changes else {})
        for form, changes in FORMS.items()
        for method, title in ((ENCODER, "no training"), (REFINED, "refined"))
    },
}
"""Comparisons, of rows as :data:`ROWS`; class word and named people are beside."""


class Curve(NamedTuple):
    """A method at several numbers of steps; ``setting`` is what they are called there."""

    title: str
    method: str
    setting: str
    steps: tuple[int, ...]
    changes: Mapping[str, float] = {}


CURVES = (
    Curve("SeFi from a predicted identity", REFINED, "predicted_steps", (5, 10, 25, 50, 100)),
    Curve("SeFi from the class word", "sefi", "steps", (10, 25, 50, 100, 300)),
    Curve(
        "textual inversion", "textual_inversion", "steps", (25, 100, 300), {"learning_rate": 5e-3}
    ),
    Curve("LoRA", LORA, "steps", (25, 100, 300), {"learning_rate": 5e-4}),
)


def jobs_of(method: str, changes: Mapping, seeds: Sequence[int], subjects: int, prompts: int):
    """One job for each person."""
    return [
        Job(method, seed, number, prompts, 1, overrides=dict(changes))
        for number in range(subjects)
        for seed in seeds
    ]


def measure(
    wanted: Mapping[str, tuple[str, Mapping]], seeds: Sequence[int], subjects: int, prompts: int
) -> dict[str, list[Figures]]:
    """The figures of all people for rows as :data:`ROWS`."""
    jobs = {
        name: jobs_of(method, changes, seeds, subjects, prompts)
        for name, (method, changes) in wanted.items()
    }
    by_subject = [job for same in zip(*jobs.values(), strict=True) for job in same]
    done = run_all(by_subject, OUTPUT / "rows.jsonl")
    return {name: [done[job.key] for job in part] for name, part in jobs.items()}


def missed(rows: Mapping[str, Sequence[Figures]]) -> list[str]:
    """The bars that the figures do not reach, in words."""
    id_p = {name: [row["id_p"] for row in part] for name, part in rows.items()}
    seconds = {
        name: float(np.mean([row["seconds"] for row in part])) for name, part in rows.items()
    }
    lines = []
    ends = np.mean(id_p["class_word"]), np.mean(id_p["named"])
    zero_shot = evaluation.relative(float(np.mean(id_p[ENCODER])), *map(float, ends))
    if zero_shot < ZERO_SHOT_BAR:
        lines.append(f"r of predicted identities is {zero_shot:.3f}, the bar is {ZERO_SHOT_BAR}")
    ahead = [a - b for a, b in zip(id_p[REFINED], id_p["sefi"], strict=True)]
    if evaluation.interval(ahead)[2] < 0:
        lines.append(f"refined identities are behind the defaults by {-np.mean(ahead):.3f} ID(P)")
    share = seconds[REFINED] / seconds["sefi"]
    if share > TIME_BAR:
        lines.append(f"refining takes {share:.2f} of the defaults' time, the bar is {TIME_BAR}")
    lowest, half = min(id_p[REFINED]), LOWEST_SHARE * float(np.median(id_p[REFINED]))
    if lowest < half:
        lines.append(f"the lowest refined ID(P) is {lowest:.3f}, half of the median is {half:.3f}")
    return lines


def summary(rows: Mapping[str, Sequence[Figures]]) -> dict[str, dict[str, list[float]]]:
    """[mean, low, high] of ID, Prompt, ID(P), r and seconds, and the lowest ID(P), by row."""
    ends = [float(np.mean([row["id_p"] for row in rows[name]])) for name in ("class_word", "named")]
    return {
        name: {
            **{
                figure: evaluation.interval([row[figure] for row in part])
                for figure in ("id", "prompt", "id_p", "seconds")
            },
            "r": evaluation.interval([evaluation.relative(row["id_p"], *ends) for row in part]),
            "lowest": [min(row["id_p"] for row in part)],
        }
        for name, part in rows.items()
    }


def markdown(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The summary as a table."""
    lines = ["| | ID | Prompt | ID(P) | lowest | r | seconds |", "|---|---|---|---|---|---|---|"]
    for name, row in figures.items():
        cells = [evaluation.interval_text(row[figure]) for figure in ("id", "prompt", "id_p")]
        cells += [f"{row['lowest'][0]:.2f}", evaluation.interval_text(row["r"])]
        title = TITLES.get(name, name)
        lines.append(f"| {title} | {' | '.join(cells)} | {row['seconds'][0]:.1f} |")
    return "\n".join(lines) + "\n"


def curves(seeds: Sequence[int], subjects: int, prompts: int) -> dict[str, list[list[float]]]:
    """Title -> [steps, mean ID(P), seconds] of each point."""
    wanted = {
        (curve.title, steps): jobs_of(
            curve.method, {**curve.changes, curve.setting: steps}, seeds, subjects, prompts
        )
        for curve in CURVES
        for steps in curve.steps
    }
    by_subject = [job for same in zip(*wanted.values(), strict=True) for job in same]
    done = run_all(by_subject, OUTPUT / "rows.jsonl")
    points: dict[str, list[list[float]]] = {}
    for (title, steps), jobs in wanted.items():
        rows = [done[job.key] for job in jobs]
        means = [float(np.mean([row[name] for row in rows])) for name in ("id_p", "seconds")]
        points.setdefault(title, []).append([steps, *means])
    return points


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    seeds = [int(seed) for seed in (os.environ.get("SEEDS") or "1 2").split()]
    subjects = int(os.environ.get("SUBJECTS") or 16)
    prompts = int(os.environ.get("PROMPTS") or 12)
    commit = measured_at()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    rows = measure(ROWS, seeds, subjects, prompts)
    figures = summary(rows)
    page = (
        f"`SEEDS` {' '.join(map(str, seeds))}: {subjects * len(seeds)} people, {prompts} prompts, "
        f"one picture of each. {commit}\n\n{markdown(figures)}"
    )
    result: dict = {"rows": figures}
    for name in (os.environ.get("BESIDE") or "").split():
        some = int(os.environ.get("BESIDE_SUBJECTS") or 12) // len(seeds)
        if name == "forms":  # one after the other, before several processes want them
            for form in FORMS:
                trained_form(form)
        ends = {end: ROWS[end] for end in ("class_word", "named")}
        result[name] = summary(measure({**ends, **BESIDE[name]}, seeds, some, prompts))
        page += f"\n### {name}, {some * len(seeds)} people\n\n{markdown(result[name])}"
    (OUTPUT / "table.md").write_text(page, encoding="utf-8")
    if os.environ.get("CURVE"):
        some = int(os.environ.get("CURVE_SUBJECTS") or 8) // len(seeds)
        result["curves"] = curves(seeds, some, prompts)
        zero_shot = [row["id_p"] for row in rows[ENCODER][: some * len(seeds)]]
        start = {"SeFi from a predicted identity": float(np.mean(zero_shot))}
        plot_steps(result["curves"], start, OUTPUT / "curve.png")
    (OUTPUT / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return finish(figures, missed(rows))


if __name__ == "__main__":
    sys.exit(main())
