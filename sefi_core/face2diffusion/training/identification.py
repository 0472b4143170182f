"""Training an encoder to tell people apart (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...digest import digest
from ...learning.loop import first_loss_scale
from ...learning.settings import TORCH_DTYPES
from .arcface import ArcFace, identification_auc
from .data import Faces
from .loops import Log
from .settings import EncoderTraining


class Identification(nn.Module):
    """An encoder and its ArcFace loss on photos; a :class:`loops.Task` of its own."""

    def __init__(
        self, encoder: nn.Module, faces: Faces, tests: Faces, settings: EncoderTraining
    ) -> None:
        super().__init__()
        self.encoder = encoder
        features = settings.shape.features
        self.loss = ArcFace(features, len(faces.names), settings.margin, settings.scale)
        self.faces, self.tests, self.settings = faces, tests, settings
        self.people = faces.people

    @property
    def module(self) -> nn.Module:
        """Itself."""
        return self

    @property
    def samples(self) -> int:
        """Number of photos to learn from."""
        return len(self.faces)

    @property
    def loss_scale(self) -> float:
        """That of what the encoder computes in."""
        return first_loss_scale(self._dtype)

    @property
    def depends_on(self) -> dict[str, str]:
        """The people, each of whom has a direction, and what the encoder sees of a photo."""
        return {"list of people": digest(self.faces.names), "crop": self.settings.crop}

    @property
    def _dtype(self) -> torch.dtype:
        return TORCH_DTYPES.get(self.settings.dtype, torch.float32)

    def forward(self, rows: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """The loss of these photos, some of them mirrored."""
        index = torch.tensor(rows)
        device = self.loss.directions.device
        pixels = self.faces.pixels(index).to(device)
        mirrored = torch.tensor(
            [(seed % 10_000) / 10_000 < self.settings.flip for seed in seeds], device=device
        )
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        half = self._dtype != torch.float32
        with torch.autocast(device.type, self._dtype if half else None, enabled=half):
            features = self.encoder(pixels)
        return self.loss(features.float(), self.people[index].to(device))

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Stochastic gradient descent, as ArcFace's models are trained."""
        return torch.optim.SGD(
            module.parameters(),
            self.settings.encoder_learning_rate,
            momentum=0.9,
            weight_decay=self.settings.encoder_weight_decay,
        )

    @torch.no_grad()
    def validate(self, step: int, log: Log) -> None:
        """How well photos of people who were kept out are told apart."""
        if len(self.tests.names) > 1:
            found = features_of(self.encoder, self.tests)
            log.figures(step, identification_auc=identification_auc(found, self.tests.people))


@torch.no_grad()
def features_of(encoder: nn.Module, faces: Faces, batch: int = 64) -> torch.Tensor:
    """Features (N, F) of all photos, on the CPU, from an encoder in evaluation mode."""
    device = next(encoder.parameters()).device
    training, encoder = encoder.training, encoder.eval()
    found = [
        encoder(faces.pixels(rows).to(device)).cpu()
        for rows in torch.arange(len(faces)).split(batch)
    ]
    encoder.train(training)
    return torch.cat(found)
