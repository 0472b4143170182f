"""The plot of the quality benchmark, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def plot_id_prompt(
    figures: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], path: Path
) -> None:
    """Identity against prompt, one point with its intervals per method."""
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    colours = [*pyplot.get_cmap("tab10").colors, "black"]
    for number, (name, row) in enumerate(figures.items()):
        (x, left, right), (y, low, high) = row["prompt"], row["id"]
        axes.errorbar(
            x, y, xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]],
            fmt="o", color=colours[number % len(colours)], capsize=3, label=titles[name],
        )  # fmt: skip
    axes.set_xlabel("Prompt: share of the prompted attributes that are seen")
    axes.set_ylabel("ID: similarity to the person's renders")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_steps(
    curves: Mapping[str, Sequence[Sequence[float]]], starts: Mapping[str, float], path: Path
) -> None:
    """ID(P) against training steps: [steps, ID(P), ...] of each point, by title.

    ``starts`` are ID(P) at no step, of those that are somebody then.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for title, points in curves.items():
        steps, id_p = ([point[place] for point in points] for place in (0, 1))
        if title in starts:
            steps, id_p = [1, *steps], [starts[title], *id_p]
        axes.plot(steps, id_p, marker="o", label=title)
    axes.set_xscale("log")
    axes.set_xlabel("training steps (1: none)")
    axes.set_ylabel("ID(P): identity where the prompt is followed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
