"""``make bench-sweep``: at which learning rate and steps is each method at its best?

Every method of ``make bench-quality`` gets the same sweep on four validation subjects, which are
in no comparison; only the LoRA, whose weights are of another size, has rates of its own. ``make
publish`` puts the winners where ``make bench-quality`` takes them from. ``KIND`` (person, robot) is
the class. Finished work is kept in ``output/bench-sweep``, so a stopped run goes on where it was.
Writes ``table.md`` and ``winners.json`` there; the last line is one JSON object, the winners.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from . import miniature  # noqa: F401  (ComfyUI on the path)
from .comfyui import REPOSITORY
from .commit import measured_at
from .jobs import Figures, Job, run_all
from .methods import LORA, METHODS, TITLES
from .subjects import VALIDATION_SEED

OUTPUT = REPOSITORY / "output" / "bench-sweep"
WINNERS = Path(__file__).with_name("winners.json")
"""Learning rate and steps that won, by class and method."""

STEPS = (100, 300, 900)
EMBEDDING_RATES = (1.25e-3, 5e-3, 2e-2)
LORA_RATES = (5e-4, 2.5e-3, 1.25e-2)
"""As many as for embeddings; the least is the default of core's node."""
SUBJECTS, PROMPTS, DRAWS = 4, 8, 1
FIGURES = ("id", "prompt", "id_p")

Settings = dict[str, float]
Row = dict[str, float]
"""Learning rate, steps, and the means of :data:`FIGURES`."""


def jobs_of(method: str, kind: str) -> list[tuple[Settings, list[Job]]]:
    """The settings that a method is tried with, and their jobs."""
    rates = LORA_RATES if method == LORA else EMBEDDING_RATES
    settings = [{"learning_rate": rate, "steps": steps} for rate in rates for steps in STEPS]
    return [
        (
            tried,
            [
                Job(method, VALIDATION_SEED, number, PROMPTS, DRAWS, kind, overrides=tried)
                for number in range(SUBJECTS)
            ],
        )
        for tried in settings
    ]


def rows_of(method: str, kind: str, done: Mapping[str, Figures]) -> list[Row]:
    """What each setting of a method came to, best first; ``done`` has the figures of all jobs."""
    rows = [
        {
            **settings,
            **{name: float(np.mean([done[job.key][name] for job in jobs])) for name in FIGURES},
        }
        for settings, jobs in jobs_of(method, kind)
    ]
    return sorted(rows, key=lambda row: -row["id_p"])


def winners_of(table: Mapping[str, Sequence[Row]]) -> dict[str, Settings]:
    """Learning rate and steps of the best row of every method."""
    return {
        method: {name: rows[0][name] for name in ("learning_rate", "steps")}
        for method, rows in table.items()
    }


def published_winners(kind: str) -> dict[str, Settings]:
    """What won the repository's sweep; a class without one gets what won for people."""
    published = json.loads(WINNERS.read_text(encoding="utf-8"))
    return published.get(kind, published["person"])


def markdown(table: Mapping[str, Sequence[Row]]) -> str:
    """The sweep as a table."""
    lines = [
        "| method | learning rate | steps | ID | Prompt | ID(P) |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in table.items():
        for row in rows:
            figures = " | ".join(f"{row[name]:.3f}" for name in FIGURES)
            lines.append(
                f"| {TITLES[method]} | {row['learning_rate']:g} | {row['steps']} | {figures} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    kind = os.environ.get("KIND") or "person"
    output = OUTPUT / kind
    jobs = [job for method in METHODS for _, part in jobs_of(method, kind) for job in part]
    done = run_all(sorted(jobs, key=lambda job: job.number), output / "rows.jsonl")
    table = {method: rows_of(method, kind, done) for method in METHODS}
    winners = winners_of(table)
    page = f"{measured_at()}\n\n{markdown(table)}"
    (output / "table.md").write_text(page, encoding="utf-8")
    (output / "winners.json").write_text(json.dumps(winners, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps(winners) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
