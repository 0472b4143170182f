"""``make bench-quality``: does SeFi learn an identity better than its alternatives?

Every method is measured with the learning rate and steps that won its sweep
(``methods.SWEPT``), on subjects that neither the miniature nor the sweep has seen. The pack's
defaults are measured as they are too, whatever won; the bars are for them.
Finished work is kept in ``output/bench-quality``, so a stopped run goes on where it was.

Settings from the environment: ``SEEDS`` ("1 2" by default) chooses subjects and prompts;
``SUBJECTS``, ``PROMPTS`` and ``DRAWS`` how many subjects for each seed, prompts and pictures of
each; ``KIND`` (person, robot) the class; ``METHODS`` some of the methods, to measure no others
beside the defaults, class word and named people. ``QUICK=1`` is a small run, 15 minutes at most on
two cores. These two have folders of their own. Writes ``results.json`` and, to be copied into a
page of ``docs/``, ``table.md`` and ``id_prompt.png`` to the output folder. The last line is one
JSON object of [mean, low, high] per method and figure; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from sefi_ide.sefi_core import evaluation
from sefi_ide.tools.comfyui import REPOSITORY

from .commit import measured_at
from .ending import finish
from .jobs import Figures, Job, run_all
from .methods import LORA, TITLES, swept
from .plots import plot_id_prompt
from .subjects import VALIDATION_SEED

logger = logging.getLogger(__name__)

OUTPUT = REPOSITORY / "output" / "bench-quality"
FIGURES = ("id", "prompt", "id_p", "leak", "seconds", "bytes")

# The paper's ratios of ID(P), over textual inversion and over ProSpect.
RATIOS = {"textual_inversion": 1.5, "per_stage_5": 1.35, "per_stage_10": 1.35}
STRONG_BASELINE = 0.6
ALWAYS = ("class_word", "sefi", "named")
"""Floor, defaults and ceiling, which every run has."""
PROMPT_TOLERANCE = 0.05
LEAK_SHARE = 1 / 3


@dataclass(frozen=True)
class Size:
    """How much is measured: subjects per seed, prompts, pictures per prompt."""

    subjects: int
    prompts: int
    draws: int


FULL, QUICK = Size(16, 30, 2), Size(1, 10, 1)


def chosen(names: Sequence[str]) -> list[str]:
    """The methods that are named, and :data:`ALWAYS`, in the order of the table; all without names.

    Raises ``SystemExit`` for a name that no method has.
    """
    if unknown := set(names) - set(TITLES):
        raise SystemExit(f"METHODS has {', '.join(sorted(unknown))}: choose of {', '.join(TITLES)}")
    wanted = {*names, *ALWAYS} if names else set(TITLES)
    return [name for name in TITLES if name in wanted]


def benchmark(
    seeds: Sequence[int],
    kind: str,
    size: Size,
    methods: Sequence[str],
    store: Path,
) -> dict[str, list[Figures]]:
    """The figures of these methods for every subject."""
    jobs = {
        name: [
            Job(name, seed, number, size.prompts, size.draws, kind, overrides=swept(name, kind))
            for number in range(size.subjects)
            for seed in seeds
        ]
        for name in methods
    }
    by_subject = [job for same in zip(*jobs.values(), strict=True) for job in same]
    done = run_all(by_subject, store)
    return {name: [done[job.key] for job in part] for name, part in jobs.items()}


def relative_rows(rows: Mapping[str, list[Figures]]) -> dict[str, list[float]]:
    """r of every subject by method: ID(P) from 0 at the class word to 1 at named people."""
    ends = [float(np.mean([row["id_p"] for row in rows[name]])) for name in ("class_word", "named")]
    return {
        name: [evaluation.relative(row["id_p"], *ends) for row in part]
        for name, part in rows.items()
    }


def missed(rows: Mapping[str, list[Figures]]) -> list[str]:
    """The bars that the figures do not reach, in words; those of methods that are there."""
    lines = []
    r = {name: evaluation.interval(values) for name, values in relative_rows(rows).items()}
    ours = r["sefi"]
    for name, ratio in RATIOS.items():
        if name not in r:
            continue
        theirs = r[name]
        bar = ratio * theirs[0]
        if theirs[0] > STRONG_BASELINE:
            bar = theirs[0] + (1 - theirs[0]) / 2
        if ours[0] < bar:
            lines.append(f"r of sefi is {ours[0]:.3f}, the bar from {name} is {bar:.3f}")
        if ours[1] <= theirs[2]:
            lines.append(f"the interval of r overlaps that of {name}: {ours} and {theirs}")
    if LORA in r and ours[0] <= r[LORA][0]:
        lines.append(f"r of sefi is {ours[0]:.3f}, that of the LoRA {r[LORA][0]:.3f}")
    mean = {
        name: {figure: float(np.mean([row[figure] for row in part])) for figure in FIGURES}
        for name, part in rows.items()
    }
    if "textual_inversion" in mean:
        bar = LEAK_SHARE * mean["textual_inversion"]["leak"]
        if mean["sefi"]["leak"] > bar:
            lines.append(f"leak of sefi is {mean['sefi']['leak']:.4f}, the bar is {bar:.4f}")
    bar = mean["class_word"]["prompt"] - PROMPT_TOLERANCE
    if mean["sefi"]["prompt"] < bar:
        lines.append(f"prompt of sefi is {mean['sefi']['prompt']:.3f}, the bar is {bar:.3f}")
    return lines


def summary(rows: Mapping[str, list[Figures]]) -> dict[str, dict[str, list[float]]]:
    """[mean, low, high] of every figure, and of r, by method.

    ``behind`` is how far the method's ID(P) is below the defaults', of the same subjects; named
    people are others, and have none.
    """
    r = relative_rows(rows)
    figures = {
        name: {
            **{figure: evaluation.interval([row[figure] for row in part]) for figure in FIGURES},
            "r": evaluation.interval(r[name]),
        }
        for name, part in rows.items()
    }
    for name, part in rows.items():
        if name not in ("sefi", "named"):
            pairs = zip(rows["sefi"], part, strict=True)
            behind = [ours["id_p"] - row["id_p"] for ours, row in pairs]
            figures[name]["behind"] = evaluation.interval(behind)
    return figures


def markdown(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The summary as a table."""
    lines = [
        "| method | ID | Prompt | ID(P) | below the defaults | r | Leak | seconds | KB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        cells = [
            evaluation.interval_text(row[figure]) if figure in row else ""
            for figure in ("id", "prompt", "id_p", "behind", "r", "leak")
        ]
        cells += [f"{row['seconds'][0]:.0f}", f"{row['bytes'][0] / 1000:.0f}"]
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measured(seeds: Sequence[int], size: Size, commit: str) -> str:
    """What was measured, in words; ``commit`` is the sentence that says where."""
    pictures = "1 picture" if size.draws == 1 else f"{size.draws} pictures"
    return (
        f"`SEEDS` {' '.join(map(str, seeds))}: {size.subjects * len(seeds)} identities, "
        f"{size.prompts} prompts, {pictures} of each. {commit}"
    )


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    quick = bool(int(os.environ.get("QUICK") or 0))
    kind = os.environ.get("KIND") or "person"
    seeds = [int(seed) for seed in (os.environ.get("SEEDS") or "1 2").split()]
    if VALIDATION_SEED in seeds:
        raise SystemExit(f"SEEDS has {VALIDATION_SEED}, whose subjects chose the settings")
    commit = measured_at()
    size = QUICK if quick else FULL
    asked = {name: os.environ.get(name.upper()) for name in asdict(size)}
    size = replace(size, **{name: int(value) for name, value in asked.items() if value})
    some = (os.environ.get("METHODS") or "").split()
    rows = benchmark(seeds, kind, size, chosen(some), OUTPUT / kind / "rows.jsonl")
    output = OUTPUT / kind / ("quick" if quick else "some" if some else "")
    output.mkdir(parents=True, exist_ok=True)
    figures = summary(rows)
    (output / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    page = f"{measured(seeds, size, commit)}\n\n{markdown(figures)}"
    (output / "table.md").write_text(page, encoding="utf-8")
    plot_id_prompt(figures, TITLES, output / "id_prompt.png")
    return finish(figures, missed(rows))


if __name__ == "__main__":
    sys.exit(main())
