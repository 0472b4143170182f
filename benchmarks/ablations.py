"""``make bench-ablations``: what each setting of SeFi Train Identity does, one table each.

Learned and measured on the validation subjects of the quality benchmark, with everything but the
setting in question at its default; a last column compares ID(P) with that of the defaults on the
same subjects. Writes ``<table>.md`` into ``output/bench-ablations``; finished work is kept there,
so a stopped run goes on where it was. ``ONLY`` names some of the tables, with commas between. The
last line is one JSON object: per table the mean ID(P) of each value.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import miniature  # noqa: F401  (ComfyUI on the path)
from .comfyui import REPOSITORY
from .commit import measured_at
from .jobs import Figures, Job, run_all
from .measures import interval, interval_text
from .methods import IDENTITY_METHODS, INITIAL, MASKS
from .subjects import VALIDATION_SEED

# isort: split
from sefi_ide.sefi_core.comfyui.base_model import LEVELS
from sefi_ide.sefi_core.learning.settings import TrainingSettings

OUTPUT = REPOSITORY / "output" / "bench-ablations"
SUBJECTS, PROMPTS, DRAWS = 6, 30, 1
CLOSE = ("attention loss", "captions", "learning rate", "steps", "strengths when drawing")
CLOSE_SUBJECTS = 16
"""Tables whose values are too close for six subjects to tell apart, and how many they get."""
FIGURES = ("id", "prompt", "id_p", "leak", "seconds")

WITHOUT_LOSSES = IDENTITY_METHODS["sefi_no_attention_loss"]

Variants = dict[str, dict[str, Any]]


def _values(name: str, *values: Any) -> Variants:
    return {str(value): {name: value} for value in values}


TABLES: dict[str, Variants] = {
    "lambda": _values("attention_weight", 0.0, 1e-4, 1e-3, 3e-3, 1e-2, 5e-2),
    "attention loss": {
        "none": WITHOUT_LOSSES,
        "lambda 0.003": {"leak_weight": 0.0},
        "leak": {"attention_weight": 0.0},
        "both": {},
    },
    "attention loss at 900 steps": {
        "none": {**WITHOUT_LOSSES, "steps": 900},
        "both": {"steps": 900},
    },
    "lambda at twice the learning rate": {
        str(value): {"attention_weight": value, "learning_rate": 1e-2}
        for value in (0.0, 3e-3, 1e-2)
    },
    "leak": _values("leak_weight", 0.0, 1.0, 3.0, 10.0),
    "attention layers": {
        "half of the latent's side": {"levels": [2]},
        "a quarter": {"levels": [4]},
        "both": {"levels": [2, 4]},
    },
    "stages": _values("stages", 1, 3, 5, 7, 10),
    "stages with 300 steps each": {
        str(stages): {"stages": stages, "steps": 300 * stages} for stages in (1, 3, 5)
    },
    "parametrisation": {
        "direct": {},
        "K and V shared": {"parametrisation": "shared"},
        "5 stages, direct": {"stages": 5},
        "5 stages, K and V shared": {"stages": 5, "parametrisation": "shared"},
        "self-attention, learning rate 5e-4": {
            "parametrisation": "self-attention",
            "learning_rate": 5e-4,
        },
    },
    "captions": {"none": {"captions": ()}, "the model's own guess": {}},
    "learning rate": _values("learning_rate", 2.5e-3, 5e-3, 1e-2),
    "steps": _values("steps", 150, 300, 600, 900),
    "initial value": _values("initial", *INITIAL),
    "background weight": _values("background_weight", 1.0, 0.3, 0.1, 0.0),
    "batch size": _values("batch_size", 1, 2),
    "mask": _values("mask", *MASKS),
    "strengths when drawing": {
        "K and V 1": {},
        "K 0.6": {"strength_k": 0.6},
        "V 0.9": {"strength_v": 0.9},
        "V 0.8": {"strength_v": 0.8},
        "V 1.2": {"strength_v": 1.2},
        "start_percent 0.1": {"start_percent": 0.1},
        "start_percent 0.2": {"start_percent": 0.2},
    },
    "photos": {str(count): {"photos": count} for count in (1, 2, 4)},
}


_DEFAULTS = {
    **vars(TrainingSettings()),
    "initial": INITIAL[0],
    "levels": list(LEVELS),
    "mask": MASKS[0],
}


def subjects_of(name: str) -> int:
    """How many subjects a table has."""
    return CLOSE_SUBJECTS if name in CLOSE else SUBJECTS


def jobs_of(variant: dict[str, Any], subjects: int = SUBJECTS) -> list[Job]:
    """The jobs of one value of a setting; those of a default are the jobs of ``{}``.

    ``photos`` is no setting but the number of photos.
    """
    settings = {name: value for name, value in variant.items() if value != _DEFAULTS.get(name)}
    photos = settings.pop("photos", 1)
    return [
        Job(
            "sefi", VALIDATION_SEED, number, PROMPTS, DRAWS, photos=photos, overrides=settings
        )
        for number in range(subjects)
    ]  # fmt: skip


def jobs_of_table(name: str) -> dict[str, list[Job]]:
    """The jobs of every value of a table."""
    return {value: jobs_of(variant, subjects_of(name)) for value, variant in TABLES[name].items()}


def means(rows: Sequence[Figures]) -> Figures:
    """Means of the figures over the subjects."""
    return {figure: float(np.mean([row[figure] for row in rows])) for figure in FIGURES}


def table(name: str, done: Mapping[str, Figures]) -> list[str]:
    """The lines of one table; ``done`` has the figures of all jobs, those of the defaults too."""
    subjects = subjects_of(name)
    lines = [
        f"### {name}\n",
        f"{subjects} identities. {measured_at()}\n",
        f"| {name} | " + " | ".join(FIGURES) + " | below the defaults |",
        "|---" * (2 + len(FIGURES)) + "|",
    ]
    defaults = jobs_of({}, subjects)
    for value, jobs in jobs_of_table(name).items():
        rows = [done[job.key] for job in jobs]
        mean = means(rows)
        cells = [f"{mean[f]:.0f}" if f == "seconds" else f"{mean[f]:.3f}" for f in FIGURES]
        pairs = zip(defaults, rows, strict=True)
        behind = [done[ours.key]["id_p"] - row["id_p"] for ours, row in pairs]
        cells.append("" if jobs == defaults else interval_text(interval(behind)))
        lines.append(f"| {value} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    only = os.environ.get("ONLY")
    jobs = {name: jobs_of_table(name) for name in (only.split(",") if only else TABLES)}
    wanted = [job for name in jobs for job in jobs_of({}, subjects_of(name))]
    wanted += [job for part in jobs.values() for same in part.values() for job in same]
    done = run_all(wanted, OUTPUT / "rows.jsonl")
    for name in jobs:
        page = "\n".join(table(name, done)) + "\n"
        (OUTPUT / f"{name}.md").write_text(page, encoding="utf-8")
    figures = {
        name: {
            value: round(means([done[job.key] for job in same])["id_p"], 4)
            for value, same in part.items()
        }
        for name, part in jobs.items()
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
