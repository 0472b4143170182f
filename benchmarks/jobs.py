"""Small, resumable pieces of work: learn one subject one way, and measure it.

A :class:`Job` says everything its figures depend on. :func:`run_all` works through many of them
in parallel processes, keeps every finished one in a file, and skips what that file has already.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS, FACE_ENCODER, FIRST_WORLD
from sefi_ide.tools.comfyui import REPOSITORY

if TYPE_CHECKING:
    from sefi_ide.tests.mini_sd.judges import Judges
    from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime

logger = logging.getLogger(__name__)

Figures = dict[str, float]
MEASURING = ("encoder_mini", "jobs", "lora", "measures", "methods", "subjects")
"""The modules of this package that figures depend on."""
MADE = (
    ()
    if CHECKPOINTS == FIRST_WORLD
    else (*CHECKPOINTS.values(), CHECKPOINTS["sd1"].with_name("judges.safetensors"))
)
"""What this process's drawn world has in the place of the first one's checkpoints."""


@dataclass(frozen=True)
class Job:
    """Learn subject ``number`` of ``seed`` by ``method``, draw ``prompts`` prompts, measure.

    ``method`` is one of ``methods.TITLES``: "class_word" learns nothing, and with "named"
    ``number`` counts people whom the miniature knows by name. ``overrides`` are the settings that
    differ from the method's own. ``draws`` is the number of pictures for each prompt, ``family``
    the miniature that learns.
    """

    method: str
    seed: int
    number: int
    prompts: int
    draws: int
    kind: str = "person"
    overrides: dict[str, Any] = field(default_factory=dict)
    family: str = "sd1"

    @property
    def key(self) -> str:
        """A text that equal jobs share."""
        return json.dumps(asdict(self), sort_keys=True)

    def run(self) -> Figures:
        """:func:`run_job`."""
        return run_job(self)

    def __str__(self) -> str:
        return f"{self.method} {self.kind} {self.number} {self.overrides}"


class Work(Protocol):
    """What :func:`run_all` works through, as :class:`Job`; a process of its own may run it."""

    @property
    def key(self) -> str:
        """A text that equal work shares."""
        ...

    def run(self) -> Figures:
        """Do it."""
        ...


def run_job(job: Job) -> Figures:
    """``id``, ``prompt``, ``id_p``, ``leak``, ``seconds`` and ``bytes``."""
    from .measures import LEAK_SEED, draw, leak, quality
    from .methods import Learned, learn
    from .subjects import Subject, named, noise_seeds, prompts

    mini, judge = miniature(job.family)
    asked = prompts(job.seed, job.prompts)
    if job.method == "named":
        subject = named(job.seed, job.number, job.kind)
        learned = Learned(mini.model, mini.clip, subject.name)
    else:
        subject = Subject(job.seed, job.number, job.kind)
        if job.method == "class_word":
            learned = Learned(mini.model, mini.clip, job.kind)
        else:
            learned = learn(mini, job.method, subject.photos(1), job.kind, job.overrides)
    wished = [wish for wish in asked for _ in range(job.draws)]
    noise = noise_seeds(job.seed, job.number, len(wished))
    pictures = draw(mini, learned, wished, noise, job.kind)
    figures = quality(judge, pictures, wished, subject.renders(asked))
    (seed,) = noise_seeds(LEAK_SEED + job.seed, job.number, 1)
    figures["leak"] = leak(mini, learned, subject.look, seed)
    return {**figures, "seconds": learned.seconds, "bytes": learned.size}


@cache
def miniature(family: str) -> tuple[MiniSDRuntime, Judges]:
    """The miniature of a family and the judges, in this process."""
    import comfy.utils
    from sefi_ide.tests.mini_sd import judges
    from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime

    comfy.utils.set_progress_bar_enabled(False)  # core's LoRA training shows one
    return MiniSDRuntime(family), judges.load_judges()


def run_all(
    jobs: Sequence[Work], store: Path, modules: tuple[str, ...] = MEASURING
) -> dict[str, Figures]:
    """The figures of all jobs by their :attr:`Job.key`; ``store`` is a file of JSON lines.

    Lines that another checkpoint, judge or code wrote are left alone and not used; ``modules`` are
    those of this package that figures depend on.
    """
    version = code_version(modules)
    done = {row["job"]: row["figures"] for row in _rows(store) if row["version"] == version}
    wanted = {job.key: job for job in jobs}
    todo = [job for key, job in wanted.items() if key not in done]
    logger.info("%d of %d jobs are done already", len(wanted) - len(todo), len(wanted))
    if todo:
        store.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number, (job, figures) in enumerate(_work(todo), start=1):
        done[job.key] = figures
        row = {"version": version, "job": job.key, "figures": figures}
        with store.open("a", encoding="utf-8") as file:
            # A newline in front too: the line before may have been cut off.
            file.write("\n" + json.dumps(row) + "\n")
        left = (time.monotonic() - started) / number * (len(todo) - number) / 60
        logger.info(
            "%d of %d, %.0f min left: %s: %s",
            number, len(todo), left, job, {name: round(x, 3) for name, x in figures.items()},
        )  # fmt: skip
    return {key: done[key] for key in wanted}


def _work(jobs: Sequence[Work]) -> Iterator[tuple[Work, Figures]]:
    """Finished jobs as they come, from one process per core, or from this one."""
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers <= 1:
        for job in jobs:
            yield job, job.run()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        running = {pool.submit(_run, job): job for job in jobs}
        for future in as_completed(running):
            yield running[future], future.result()


def _run(job: Work) -> Figures:
    return job.run()


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)


@cache
def code_version(modules: tuple[str, ...] = MEASURING) -> str:
    """A hash of everything but the job that its figures depend on."""
    made = [*MADE, *([FACE_ENCODER] if "encoder_mini" in modules else [])]
    files = {
        *(file for file in made if file.exists()),
        *(REPOSITORY / "sefi_core").rglob("*.py"),
        *(REPOSITORY / "tests" / "mini_sd").glob("*.safetensors"),
        *(REPOSITORY / "tests" / "mini_sd").glob("*.py"),
        *(REPOSITORY / "tests" / "mini_sd").glob("*.txt"),
        *(REPOSITORY / "benchmarks" / f"{name}.py" for name in modules),
    }
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _rows(store: Path) -> Iterator[dict[str, Any]]:
    if not store.exists():
        return
    for line in filter(None, store.read_text(encoding="utf-8").splitlines()):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the run was stopped while it wrote this line
            logger.warning("%s has a line that was cut off; its job is done again", store)
