"""``make bench-sweep``: at which learning rate and steps is each method at its best?

Every method of ``make bench-quality`` gets the same sweep on four validation subjects, which are
in no comparison, and its three best settings are tried on eight more: a rate that is too high runs
away with one subject in five, which four may not show. Only the LoRA, whose weights are of another
size, has rates of its own. ``make publish`` puts the winners where ``make bench-quality`` takes
them from. ``KIND`` (person, robot) is the class. Finished work is kept in ``output/bench-sweep``,
so a stopped run goes on where it was. Writes ``table.md`` and ``winners.json`` there; the last
line is one JSON object, the winners.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
SUBJECTS, FINAL_SUBJECTS = 4, 12
FINALISTS = 3
PROMPTS, DRAWS = 8, 1
FIGURES = ("id", "prompt", "id_p")

Settings = dict[str, float]
Row = dict[str, float]
"""Learning rate, steps, the number of subjects, and the means of :data:`FIGURES` over them."""
Run = Callable[[Sequence[Job]], Mapping[str, Figures]]


def settings_of(method: str) -> list[Settings]:
    """Everything that a method is tried with."""
    rates = LORA_RATES if method == LORA else EMBEDDING_RATES
    return [{"learning_rate": rate, "steps": steps} for rate in rates for steps in STEPS]


def sweep(kind: str, run: Run) -> dict[str, list[Row]]:
    """The rows of every method, the finalists in front, best first; ``run`` does the jobs."""
    tried = {method: settings_of(method) for method in METHODS}
    rows = _rows(kind, tried, SUBJECTS, run)
    tried = {method: [_settings(row) for row in part[:FINALISTS]] for method, part in rows.items()}
    finals = _rows(kind, tried, FINAL_SUBJECTS, run)
    return {method: finals[method] + rows[method][FINALISTS:] for method in METHODS}


def _rows(
    kind: str, tried: Mapping[str, Sequence[Settings]], subjects: int, run: Run
) -> dict[str, list[Row]]:
    """What each of the settings came to on this many subjects, by method, best first."""
    jobs = {
        (method, number): [
            Job(method, VALIDATION_SEED, subject, PROMPTS, DRAWS, kind, overrides=settings)
            for subject in range(subjects)
        ]
        for method, part in tried.items()
        for number, settings in enumerate(part)
    }
    by_subject = [job for same in zip(*jobs.values(), strict=True) for job in same]
    done = run(by_subject)
    return {
        method: sorted(
            (
                {**settings, "subjects": subjects, **_means(jobs[method, number], done)}
                for number, settings in enumerate(part)
            ),
            key=lambda row: -row["id_p"],
        )
        for method, part in tried.items()
    }


def _means(jobs: Sequence[Job], done: Mapping[str, Figures]) -> dict[str, float]:
    return {name: float(np.mean([done[job.key][name] for job in jobs])) for name in FIGURES}


def _settings(row: Row) -> Settings:
    return {name: row[name] for name in ("learning_rate", "steps")}


def winners_of(table: Mapping[str, Sequence[Row]]) -> dict[str, Settings]:
    """Learning rate and steps of the best row of every method."""
    return {method: _settings(rows[0]) for method, rows in table.items()}


def published_winners(kind: str) -> dict[str, Settings]:
    """What won the repository's sweep; a class without one gets what won for people."""
    published = json.loads(WINNERS.read_text(encoding="utf-8"))
    return published.get(kind, published["person"])


def markdown(table: Mapping[str, Sequence[Row]]) -> str:
    """The sweep as a table."""
    titles = {**TITLES, "sefi": "SeFi"}  # its defaults are one row of many
    lines = [
        "| method | learning rate | steps | identities | ID | Prompt | ID(P) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, rows in table.items():
        for row in rows:
            figures = " | ".join(f"{row[name]:.3f}" for name in FIGURES)
            settings = f"{row['learning_rate']:g} | {row['steps']} | {row['subjects']}"
            lines.append(f"| {titles[method]} | {settings} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    kind = os.environ.get("KIND") or "person"
    output = OUTPUT / kind
    commit = measured_at()
    table = sweep(kind, partial(run_all, store=output / "rows.jsonl"))
    winners = winners_of(table)
    intro = (
        f"Every method at every learning rate and number of steps, on {SUBJECTS} validation "
        f"identities that are in no comparison, and its {FINALISTS} best on {FINAL_SUBJECTS}; "
        f"best first. {commit}"
    )
    page = f"{intro}\n\n{markdown(table)}"
    (output / "table.md").write_text(page, encoding="utf-8")
    (output / "winners.json").write_text(json.dumps(winners, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps(winners) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
