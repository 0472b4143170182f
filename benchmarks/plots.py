"""Figures of the benchmarks, drawn with matplotlib."""

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


def plot_growth(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    places: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Times of training and of the floor against what grows, one panel for each curve.

    ``places`` are the sizes at which a curve was measured, 0, 1, 2 and so on if it has none.
    """
    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(4 * len(curves), 3.4), squeeze=False, layout="constrained"
    )
    for panel, (name, (ours, floor)) in zip(panels[0], curves.items(), strict=True):
        sizes = places.get(name, range(len(ours)))
        panel.plot(sizes, floor, "o-", color="#888888", label="floor")
        panel.plot(sizes, ours, "o-", color="#2662be", label="SeFi")
        panel.set_xlabel(name.replace("_", " "))
        panel.set_ylim(0, 1.15 * max(*floor, *ours))
        panel.legend()
    panels[0][0].set_ylabel("time, floor of the smallest = 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_panels(columns: Mapping[str, Sequence], path: Path) -> None:
    """Pictures (H, W, 3) in [0, 1] in columns, each with its title on top."""
    rows = max(len(pictures) for pictures in columns.values())
    figure, panels = pyplot.subplots(
        rows,
        len(columns),
        figsize=(1.6 * len(columns), 1.6 * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for panel in panels.flat:
        panel.axis("off")
    for column, (title, pictures) in enumerate(columns.items()):
        panels[0][column].set_title(title.replace(" (", "\n("), fontsize=7)
        for row, picture in enumerate(pictures):
            panels[row][column].imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
