"""ArcFace (arXiv 1801.07698): people as classes, apart by an angle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ArcFace(nn.Module):
    """The loss of features (B, F) whose people are numbered from 0.

    Each person has a direction; the angle between a photo's features and its person's is made
    larger by ``margin`` radians before the softmax over ``scale`` times all cosines.
    """

    def __init__(self, features: int, people: int, margin: float, scale: float) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale
        self.directions = nn.Parameter(torch.randn(people, features) * 0.01)

    def forward(self, features: torch.Tensor, people: torch.Tensor) -> torch.Tensor:
        """The mean loss; ``people`` (B,) are the numbers of those in the photos."""
        cosines = F.normalize(features) @ F.normalize(self.directions).T
        own = cosines.gather(1, people[:, None])
        # cos(angle + margin) would rise again behind pi - margin, so it goes on in a line there.
        wide = torch.pi - self.margin
        angle = own.clamp(-1 + 1e-7, 1 - 1e-7).acos()
        harder = torch.where(
            angle < wide, torch.cos(angle + self.margin), -1 - (angle - wide) * self.margin
        )
        return F.cross_entropy(self.scale * cosines.scatter(1, people[:, None], harder), people)


def identification_auc(features: torch.Tensor, people: torch.Tensor) -> float:
    """How often two photos of one person are nearer than two of different people, 0.5 to 1.

    All pairs of ``features`` (N, F) are compared by their cosine. NaN without pairs of both kinds.
    """
    directions = F.normalize(features.double())
    rows, columns = torch.triu_indices(len(people), len(people), offset=1)
    cosines = (directions @ directions.T)[rows, columns]
    same = people[rows] == people[columns]
    pairs = int(same.sum()) * int((~same).sum())
    if not pairs:
        return float("nan")
    ranks = cosines.argsort().argsort().double() + 1
    below = float(ranks[same].sum()) - int(same.sum()) * (int(same.sum()) + 1) / 2
    return below / pairs
