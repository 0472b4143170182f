"""``make bench-styles``: does a picture have the style that its prompt names, and is it them?

People whom nothing has seen, each learned from one photo with the pack's defaults, are drawn in
the styles of the second drawn world: as ever, with the style weighted in the prompt, with the
identity at a lower strength, and with SeFi Mixed Attention in several ways. Beside them are the
class word and people whom the miniature knows by name.

Settings from the environment: ``SUBJECTS`` (16), ``PROMPTS`` (8), ``SEED`` (1), ``ROWS`` (all, by
name). Needs the second drawn world, ``WORLD=2``. Identities are those of ``make bench-people``;
finished work is kept in ``output/bench-styles``. Writes ``results.json``, ``table.md`` and the
contact sheet ``styles.png``. The last line is one JSON object of [mean, low, high] per row and
figure.
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
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from PIL import Image, ImageDraw, ImageFont
from sefi_ide.sefi_core import evaluation
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.comfyui.mixed_attention import mixed_attention
from sefi_ide.tests.mini_sd import wishes, world
from sefi_ide.tests.mini_sd.editions import EDITION, FIRST
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime
from sefi_ide.tools.comfyui import REPOSITORY

from .commit import measured_at
from .crowds import CLASS_WORD, Learning, identity_of
from .crowds import MODULES as LEARNING
from .ending import finish
from .jobs import Figures, miniature, run_all
from .measures import draw_captions, quality
from .subjects import Subject, named, noise_seeds

OUTPUT = REPOSITORY / "output" / "bench-styles"
MODULES = (*LEARNING, "styles")
NOISE = 44
WEIGHT = 1.3
CELL = 128  # pixels
LABEL = 150
SHEET_SUBJECTS = 3


@dataclass(frozen=True)
class Way:
    """How one row is drawn; without ``learned`` it is nobody's or somebody known by name."""

    title: str
    learned: bool = True
    strength: float = 1.0
    weighted: bool = False
    trajectory: str | None = None
    adain: str = "off"
    hidden: bool = True


WAYS = {
    "class_word": Way("class word", learned=False),
    "plain": Way("SeFi Apply Identity"),
    "weighted": Way(f"style weighted by {WEIGHT:g}", weighted=True),
    "weaker": Way("strength 0.7", strength=0.7),
    "weakest": Way("strength 0.5", strength=0.5),
    "same": Way("mixed, same", trajectory="same"),
    "own": Way("mixed, own", trajectory="own"),
    "own_open": Way("mixed, own, face not hidden", trajectory="own", hidden=False),
    "keys": Way("mixed, own, AdaIN of keys", trajectory="own", adain="keys"),
    "values": Way("mixed, own, AdaIN of values", trajectory="own", adain="values"),
    "adain": Way("mixed, own, AdaIN of both", trajectory="own", adain="keys and values"),
    "adain_open": Way(
        "mixed, own, AdaIN of both, face not hidden", trajectory="own", adain="keys and values",
        hidden=False,
    ),
    "named": Way("known by name (ceiling)", learned=False),
}  # fmt: skip
FIGURES = {"style": "style found", "id": "ID", "prompt": "Prompt", "id_p": "ID(P)"}


@dataclass(frozen=True)
class Styled:
    """The person ``number`` of ``seed``, drawn as ``row`` of :data:`WAYS` says.

    Every row has the same prompts and the same noise; "named" has other people.
    """

    row: str
    number: int
    prompts: int
    seed: int = 1

    @property
    def key(self) -> str:
        """A text that equal work shares."""
        return json.dumps({"styled": {**asdict(self), **asdict(WAYS[self.row])}}, sort_keys=True)

    @property
    def strip(self) -> Path:
        """Its pictures side by side."""
        return OUTPUT / "pictures" / f"{self.seed}_{self.number}_{self.prompts}_{self.row}.png"

    def run(self) -> Figures:
        """Draw and measure: :func:`.measures.quality`, and the share of styles found."""
        mini, judge = miniature("sd1")
        asked, way = wishes_of(self), WAYS[self.row]
        someone = Subject(self.seed, self.number)
        word, model, clip = CLASS_WORD, mini.model, mini.clip
        if self.row == "named":
            someone = named(self.seed, self.number)
            word = someone.name
        elif way.learned:
            word, model, clip = self._applied(mini, way)
        captions = [caption_of(wish, word, way.weighted) for wish in asked]
        seeds = noise_seeds(NOISE + self.seed, self.number, len(asked))
        drawn = draw_captions(mini, model, clip, captions, seeds)
        self.strip.parent.mkdir(parents=True, exist_ok=True)
        strip = (255 * torch.cat(list(drawn), dim=1)).round().byte()
        Image.fromarray(strip.numpy()).save(self.strip)
        figures = quality(judge, drawn, asked, someone.renders(asked))
        styles = judge.found(drawn, [{"style": wish["style"]} for wish in asked])
        return {**figures, "style": evaluation.prompt_share(styles)}

    def _applied(self, mini: MiniSDRuntime, way: Way) -> tuple[str, ModelPatcher, CLIP]:
        identity = replace(identity_of(self.seed, self.number), name="anna")
        applied = AppliedIdentity(identity, way.strength, way.strength)
        model, clip = apply_identity(mini.model, mini.clip, applied)
        if way.trajectory is not None:
            model = mixed_attention(
                model, way.trajectory, way.adain, way.hidden, 0.0, 1.0, "SeFi", None
            )
        return identity.placeholder, model, clip


def wishes_of(job: Styled) -> list[wishes.Wish]:
    """What is asked for: a style, in every other prompt with something else."""
    rng = np.random.default_rng((job.seed, job.number))
    styles = [world.STYLES[1:][n % len(world.STYLES[1:])] for n in range(job.prompts)]
    asked = []
    for n, style in enumerate(styles):
        wish = {"style": style}
        if n // len(world.STYLES[1:]) % 2:
            other = str(rng.choice(["scene", "expression", "object"]))
            wish[other] = str(rng.choice(wishes.PROMPTABLE[other]))
        asked.append(wish)
    return asked


def caption_of(wish: wishes.Wish, word: str, weighted: bool = False) -> str:
    """The prompt, with the style's phrase at :data:`WEIGHT` if ``weighted``."""
    caption = wishes.caption_of(wish, word, CLASS_WORD)
    phrase = world.STYLE_PHRASES[wish["style"]]
    return caption.replace(phrase, f"({phrase}:{WEIGHT:g})") if weighted else caption


def benchmark(
    rows: Sequence[str], subjects: int, prompts: int, seed: int
) -> dict[str, list[Figures]]:
    """The figures of all people by row."""
    jobs = {row: [Styled(row, n, prompts, seed) for n in range(subjects)] for row in rows}
    store = OUTPUT / "rows.jsonl"
    run_all([Learning(seed, n) for n in range(subjects)], store, MODULES)
    by_subject = [job for same in zip(*jobs.values(), strict=True) for job in same]
    done = run_all(by_subject, store, MODULES)
    return {row: [done[job.key] for job in part] for row, part in jobs.items()}


def summary(rows: Mapping[str, Sequence[Figures]]) -> dict[str, dict[str, list[float]]]:
    """[mean, low, high] of every figure by row, over people."""
    return {
        row: {name: evaluation.interval([one[name] for one in part]) for name in FIGURES}
        for row, part in rows.items()
    }


def markdown(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The summary as a table."""
    lines = ["| | " + " | ".join(FIGURES.values()) + " |", "|---" * (1 + len(FIGURES)) + "|"]
    for row, cells in figures.items():
        texts = [evaluation.interval_text(cells[name]) for name in FIGURES]
        lines.append(f"| {WAYS[row].title} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def sheet(rows: Sequence[str], subjects: int, prompts: int, seed: int) -> Image.Image:
    """A block for each person, a row for each way, a column for each prompt."""
    shown = [row for row in rows if row != "named"]
    width = LABEL + (1 + prompts) * CELL
    paper = Image.new("RGB", (width, subjects * len(shown) * CELL), "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(size=12)
    for n in range(subjects):
        photo = (255 * Subject(seed, n).photos(1)[0].picture.numpy()).round().astype(np.uint8)
        for m, row in enumerate(shown):
            top = (n * len(shown) + m) * CELL
            draw.text((4, top + CELL // 2), WAYS[row].title.replace(", ", ",\n"), "black", font)
            paper.paste(Image.fromarray(photo), (LABEL, top))
            paper.paste(Image.open(Styled(row, n, prompts, seed).strip), (LABEL + CELL, top))
    return paper


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    if EDITION is FIRST:
        raise SystemExit("The first drawn world has no styles: run with WORLD=2.")
    subjects, prompts, seed = (
        int(os.environ.get(name) or default)
        for name, default in (("SUBJECTS", 16), ("PROMPTS", 8), ("SEED", 1))
    )
    rows = (os.environ.get("ROWS") or " ".join(WAYS)).split()
    if unknown := [row for row in rows if row not in WAYS]:
        raise SystemExit(f"ROWS has {unknown[0]}; there are {', '.join(WAYS)}.")
    commit = measured_at()
    figures = summary(benchmark(rows, subjects, prompts, seed))
    (OUTPUT / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    page = f"{subjects} people, {prompts} prompts, one picture of each. {commit}\n\n"
    (OUTPUT / "table.md").write_text(page + markdown(figures), encoding="utf-8")
    some = min(subjects, SHEET_SUBJECTS)
    sheet(rows, some, prompts, seed).save(OUTPUT / "styles.png")
    return finish(figures)


if __name__ == "__main__":
    sys.exit(main())
