"""The pictures that a training shows while it lasts, as its watcher wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import nn

from ...learning.loop import Batch, Prediction
from ...learning.parametrisation import Vectors
from ...learning.settings import TrainingSettings
from .denoiser import ComfyDenoiser
from .pictures import (
    MAP_TIMESTEP,
    PREVIEW_STEPS,
    SAMPLE_STEPS,
    Look,
    attention_picture,
    look,
    maps_together,
    picture_or_why_not,
    preview_side,
)
from .progress import Watcher

_LONGEST_ROUND = 50
"""Steps before a picture whose maps are kept at most."""


class Watched:
    """A denoiser for the training, which keeps where the placeholder looks in the first photo.

    It keeps the maps that a loss needs anyway, while ``keeping`` is on, and those of the last
    ``rounds`` samples of that photo only: as many as there are stages, which look each elsewhere.
    """

    def __init__(self, denoiser: ComfyDenoiser, rounds: int) -> None:
        self.denoiser = denoiser
        self.keeping = False
        self.kept: deque[list[torch.Tensor]] = deque(maxlen=rounds)

    @property
    def samples(self) -> int:
        """Number of training pictures."""
        return self.denoiser.samples

    def __call__(self, keys: Vectors, values: Vectors, batch: Batch) -> Prediction:
        """The denoiser's prediction, unchanged."""
        prediction = self.denoiser(keys, values, batch)
        rows = [row for row, sample in enumerate(batch.samples) if sample == 0]
        if self.keeping and rows and prediction.layers:
            with torch.no_grad():
                layers = prediction.placeholder_maps()
            self.kept.extend([layer[row, None] for layer in layers] for row in rows)
        return prediction

    def where(self) -> torch.Tensor | None:
        """Where the placeholder looked, (h, w) with a maximum of 1; None where no loss saw it."""
        return maps_together(self.kept) if self.kept else None


class TrainingPictures:
    """Draws for ``watcher`` what a training is like that has ``settings`` and ``parameters``.

    ``photo`` (H, W, 3) is the first training picture. ``sample(side, steps)`` draws a picture of
    ``side`` pixels with what is learned so far. The training is to use :attr:`denoiser`.
    """

    def __init__(
        self,
        watcher: Watcher,
        denoiser: ComfyDenoiser,
        parameters: nn.Module,
        settings: TrainingSettings,
        photo: torch.Tensor,
        sample: Callable[[int, int], torch.Tensor],
    ) -> None:
        self.watcher, self.parameters, self.photo = watcher, parameters, photo
        self.background, self.sample = settings.background_weight, sample
        self.denoiser = Watched(denoiser, settings.stages)
        round_of_all = -(-settings.stages * denoiser.samples // settings.batch_size)
        self.ahead = range(1, 1 + min(round_of_all, _LONGEST_ROUND))

    def look(self) -> Look:
        """How the model sees the photo now; also shown."""
        keys, values = self.parameters()
        seen = look(self.denoiser.denoiser, keys, values, self.background)
        self._show_attention(seen.where)
        self._keep_maps(0)
        return seen

    def after_step(self, number: int) -> None:
        """Show what is due after that step."""
        if self.watcher.is_due(number):
            where = self.denoiser.where()
            scale = self.watcher.preview_scale()
            if scale:
                if where is None:
                    at = (MAP_TIMESTEP,)
                    keys, values = self.parameters()
                    where = look(self.denoiser.denoiser, keys, values, self.background, at).where
                side = preview_side(self.photo.shape[0], scale)
                preview = picture_or_why_not("preview", lambda: self.sample(side, PREVIEW_STEPS))
                self.watcher.picture("preview", preview)
            if where is not None:
                self._show_attention(where)
        self._keep_maps(number)

    def sample_for_report(self) -> torch.Tensor:
        """A sample as large as the training pictures, which is also the last preview."""
        picture = self.sample(self.photo.shape[0], SAMPLE_STEPS)
        self.watcher.picture("preview", picture)
        return picture

    def _show_attention(self, where: torch.Tensor) -> None:
        self.watcher.picture("attention", attention_picture(where, self.photo))

    def _keep_maps(self, number: int) -> None:
        """Keep the maps of the steps after that one where they will be shown soon."""
        self.denoiser.keeping = any(self.watcher.is_due(number + more) for more in self.ahead)
