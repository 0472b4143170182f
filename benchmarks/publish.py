"""``make publish``: put what the benchmarks last measured into ``docs/`` and ``winners.json``.

Reads the output folders of ``bench-sweep``, ``bench-quality``, ``bench-ablations``,
``bench-figures`` and ``bench-cost``; what was not measured stays as it is. Pages say which command
made them.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence

from .ablations import TABLES
from .comfyui import REPOSITORY
from .sweep import WINNERS

logger = logging.getLogger(__name__)

OUTPUT = REPOSITORY / "output"
DOCS = REPOSITORY / "docs"
KINDS = {"person": "people", "robot": "robots"}
PICTURES = {
    "bench-figures/attention.png": "attention.png",
    "bench-figures/keys_values.png": "keys_values.png",
    "bench-cost/growth.png": "cost_growth.png",
}


def publish_quality(kind: str) -> None:
    """``docs/quality_<people>.md`` with table and plot."""
    folder, plural = OUTPUT / "bench-quality" / kind, KINDS[kind]
    if not (folder / "table.md").exists():
        return
    parts = [
        f"# Quality of {plural}",
        f"Made by `{_command('bench-quality', kind)}`, where `SEEDS`, `SUBJECTS` and `QUICK` say "
        "how much is measured. Means over identities, with 95 % bootstrap intervals; those of *r* "
        "take floor and ceiling as known. The mask of every training picture is the head as the "
        "renderer drew it.",
        (folder / "table.md").read_text(encoding="utf-8").strip(),
        f"![Identity against prompt](id_prompt_{plural}.png)",
    ]
    _write(f"quality_{plural}.md", parts)
    shutil.copyfile(folder / "id_prompt.png", DOCS / f"id_prompt_{plural}.png")
    logger.info("published %s", plural)


def publish_some(kind: str) -> None:
    """``docs/quality_<people>_some.md``, of a run with ``METHODS``."""
    folder, plural = OUTPUT / "bench-quality" / kind / "some", KINDS[kind]
    if not (folder / "table.md").exists():
        return
    parts = [
        f"# Quality of {plural}, some methods",
        f"Made by `{_command('bench-quality', kind)}` with `METHODS`: a run of its own beside "
        f"[that of all methods](quality_{plural}.md).",
        (folder / "table.md").read_text(encoding="utf-8").strip(),
    ]
    _write(f"quality_{plural}_some.md", parts)
    logger.info("published some methods on %s", plural)


def publish_sweep(kind: str) -> None:
    """``docs/sweep_<people>.md``, and the winners."""
    folder, plural = OUTPUT / "bench-sweep" / kind, KINDS[kind]
    if not (folder / "table.md").exists():
        return
    parts = [
        f"# Sweep on {plural}",
        f"Made by `{_command('bench-sweep', kind)}`. In [the comparison](quality_{plural}.md) "
        "every method has the best settings of this grid; the pack's defaults are there as they "
        "are, too.",
        (folder / "table.md").read_text(encoding="utf-8").strip(),
    ]
    _write(f"sweep_{plural}.md", parts)
    winners = json.loads(WINNERS.read_text(encoding="utf-8"))
    winners[kind] = json.loads((folder / "winners.json").read_text(encoding="utf-8"))
    WINNERS.write_text(json.dumps(winners, indent=1) + "\n", encoding="utf-8")
    logger.info("published the sweep on %s", plural)


def _command(target: str, kind: str) -> str:
    return f"make {target}" if kind == "person" else f"KIND={kind} make {target}"


def _write(name: str, paragraphs: Sequence[str]) -> None:
    """A page of ``docs/``."""
    (DOCS / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def publish_ablations() -> None:
    """``docs/ablations.md``; a table that was not measured stays there as it is."""
    page = DOCS / "ablations.md"
    known = page.read_text(encoding="utf-8").split("\n### ")[1:] if page.exists() else []
    tables = {text.splitlines()[0]: f"### {text.strip()}" for text in known}
    files = [OUTPUT / "bench-ablations" / f"{name}.md" for name in TABLES]
    measured = {
        file.stem: file.read_text(encoding="utf-8").strip() for file in files if file.exists()
    }
    if not measured:
        return
    tables |= measured
    intro = (
        "Made by `make bench-ablations`: SeFi with everything but one setting at the default "
        "that it had at the table's commit, means over validation identities and thirty "
        "prompts. The last column is how far ID(P) is below that of the defaults on the same "
        "identities, with its 95 % bootstrap interval. With six identities such an interval is "
        "too narrow: it holds the true mean 87 times in a hundred, with sixteen 92 times."
    )
    in_order = [tables[name] for name in TABLES if name in tables]
    _write("ablations.md", ["# Ablations", intro, *in_order])
    logger.info("published ablations")


def publish_figures() -> None:
    """``docs/figures.md``, with what each part of an identity does in figures."""
    table = OUTPUT / "bench-figures" / "table.md"
    if not table.exists():
        return
    parts = [
        "# Where words look, and what K, V and the stages decide",
        "Made by `make bench-figures`.",
        "One person, learned from the training picture by each method, in the prompt *at the "
        "Eiffel Tower, holding a basketball, with eyes closed*; below each picture where the "
        "person's word looked in it.",
        "![Attention of each method's word](attention.png)",
        "Four people learned with five stages, and drawn with a part of what was learned: only the "
        "vectors for K, only those for V, or only those of one stage, with the class word's in the "
        "place of the others. Stage 1 is the noisiest. The last three columns were learned without "
        "the attention loss.",
        "![Parts of an identity](keys_values.png)",
        "*leak* is the share of the word's attention on cells that show nothing of the head; "
        "*layout* and *detail* say how far pictures are from the class word's, root mean square: "
        "of squares of 16 pixels, and of the rest.",
        table.read_text(encoding="utf-8").strip(),
    ]
    _write("figures.md", parts)
    logger.info("published figures")


def publish_cost() -> None:
    """``docs/cost.md``."""
    table = OUTPUT / "bench-cost" / "table.md"
    if not table.exists():
        return
    parts = [
        "# Cost",
        "Made by `make bench-cost`. Ratios; those with a bar may be no higher.",
        table.read_text(encoding="utf-8").strip(),
        "![Growth](cost_growth.png)",
    ]
    _write("cost.md", parts)
    logger.info("published the cost")


def main() -> int:
    """Publish everything that is there."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for kind in KINDS:
        publish_sweep(kind)
        publish_quality(kind)
        publish_some(kind)
    publish_ablations()
    publish_figures()
    publish_cost()
    for source, name in PICTURES.items():
        if (OUTPUT / source).exists():
            shutil.copyfile(OUTPUT / source, DOCS / name)
            logger.info("published %s", name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
