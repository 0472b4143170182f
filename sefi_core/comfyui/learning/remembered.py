"""Trainings need not be done again: finished ones are remembered, broken off ones gone on with."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...identity.identity import Identity
from ...learning.photos import Photo
from ...learning.settings import TrainingSettings
from .content import training_key
from .progress import TrainingProgress
from .snapshots import Snapshots
from .train import TrainingResult, train_identity

logger = logging.getLogger(__name__)

MOST = 8
"""Finished trainings that are remembered, those used last: a few megabytes each, its report."""

_lock = threading.Lock()
_finished: OrderedDict[str, TrainingResult] = OrderedDict()


def learn(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Sequence[Photo],
    name: str,
    class_word: str,
    settings: TrainingSettings,
    start: Identity | None,
    progress: TrainingProgress,
) -> TrainingResult:
    """What :func:`.train.train_identity` gives, and as little of its work as that takes.

    A training that this process has finished before, of the same content (see :mod:`.content`), is
    not done again. One that was cancelled, failed or died with its process goes on from its last
    snapshot, and ends where it would have ended. ``progress`` is told of either.
    """
    key = training_key(model, clip, vae, photos, name, class_word, settings, start)
    known = recall(key)
    if known is not None:
        logger.info("SeFi Train Identity: <%s> was learned before with the same settings.", name)
        progress.recalled(known.history)
        return known
    snapshots = None if key is None else Snapshots(key, progress.kept)
    result = train_identity(
        model, clip, vae, photos, name, class_word, settings, start,
        watcher=progress, snapshots=snapshots,
    )  # fmt: skip
    if snapshots is not None and not result.stopped and result.drawn:
        _remember(snapshots.key, result)
        snapshots.remove()
    return result


def recall(key: str | None) -> TrainingResult | None:
    """The finished training of this key, as new; None if there is none."""
    with _lock:
        known = None if key is None else _finished.get(key)
        if key is None or known is None:
            return None
        _finished.move_to_end(key)
    # Tensors of their own, or a node that writes into its picture would change what is remembered.
    return replace(known, history=list(known.history), report=known.report.clone())


def forget() -> None:
    """Remember none of the trainings until now."""
    with _lock:
        _finished.clear()


def _remember(key: str, result: TrainingResult) -> None:
    kept = replace(result, history=list(result.history), report=result.report.clone())
    with _lock:
        _finished[key] = kept
        while len(_finished) > MOST:
            _finished.popitem(last=False)
