"""Two judges: who is in a picture, and what does it show.

The identity judge gives an embedding, compared by cosine. As face recognisers do, it learns from
pictures of the same individual against pictures of others, the hardest of which share hair and
skin. The attribute judge classifies scene, object, expression, eyes and style. They are
outputs of one small network, which halves the cost of training them; a third output, the look's
code, only helps it learn. Pictures are as samplers make them, (B, 128, 128, 3) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from ...sefi_core import evaluation
from . import world
from .checkpoints import CHECKPOINTS, FIRST_WORLD
from .editions import EDITION
from .parts import part_of

WEIGHTS = CHECKPOINTS["sd1"].with_name("judges.safetensors")
FIRST_WEIGHTS = FIRST_WORLD["sd1"].with_name("judges.safetensors")
"""The first world's."""
EMBEDDING_DIM = 64
TEMPERATURE = 0.1
ATTRIBUTES = {
    "expression": world.EXPRESSIONS,
    "eyes": ("open", "closed"),
    "object": world.OBJECTS,
    "scene": world.SCENES,
    **({"style": world.STYLES} if len(world.STYLES) > 1 else {}),
}


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return F.relu(x + self.body(x))


class JudgeNet(nn.Sequential):
    """Pictures (B, 3, 128, 128) in [0, 1] to all outputs side by side, see ``_split``."""

    def __init__(self):
        outputs = sum(_sizes())
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        previous = 12
        for width in (32, 64, 96, 128):
            stride = 1 if previous == 12 else 2
            layers += [
                nn.Conv2d(previous, width, 3, padding=1, stride=stride, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            if width >= 64:
                layers.append(_Residual(width))
            previous = width
        layers += [
            nn.Conv2d(128, 24, 1),
            nn.Flatten(),
            nn.ReLU(),
            nn.Linear(24 * 64, 256),
            nn.ReLU(),
        ]
        super().__init__(*layers, nn.Linear(256, outputs))


@dataclass(frozen=True)
class Judges:
    """The trained pair. Pictures are (B, 128, 128, 3) in [0, 1], as ComfyUI's IMAGE."""

    net: JudgeNet

    @torch.no_grad()
    def identity_embeddings(self, pictures: torch.Tensor) -> torch.Tensor:
        """Identity embeddings (B, EMBEDDING_DIM) of unit length."""
        return F.normalize(self._outputs(pictures)[0], dim=-1)

    def part_embeddings(self, pictures: torch.Tensor, count: int, place: str) -> torch.Tensor:
        """Identity embeddings of who is at a place of pictures with ``count`` actors."""
        return self.identity_embeddings(part_of(pictures, count, place))

    def identity_similarity(self, pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """ID (B,) of each picture, of the person whom the reference pictures show."""
        return evaluation.identity_similarity(
            self.identity_embeddings(pictures), self.identity_embeddings(reference)
        )

    @torch.no_grad()
    def _outputs(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``_split``."""
        pictures = _channels_first(pictures)
        return _split(torch.cat([self.net(part) for part in pictures.split(64)]))

    def read(self, pictures: torch.Tensor) -> dict[str, list[str]]:
        """What each picture shows: the most likely value of each of ``ATTRIBUTES``."""
        scores = self._outputs(pictures)[2:]
        return {
            name: [values[i] for i in part.argmax(dim=-1).tolist()]
            for (name, values), part in zip(ATTRIBUTES.items(), scores, strict=True)
        }

    def found(self, pictures: torch.Tensor, prompted: Sequence[dict[str, str]]) -> list[list[bool]]:
        """For each picture, whether each prompted attribute is seen in it."""
        seen = self.read(pictures)
        return [
            [seen[name][row] == value for name, value in wanted.items()]
            for row, wanted in enumerate(prompted)
        ]


def _channels_first(pictures: torch.Tensor) -> torch.Tensor:
    pictures = pictures[..., :3].movedim(-1, 1).float()
    if pictures.shape[-1] != 128 or pictures.shape[-2] != 128:
        pictures = F.interpolate(pictures, size=(128, 128), mode="bilinear", antialias=True)
    return pictures


def _sizes() -> list[int]:
    code = world.IDENTITY_DIM + (world.MARK_DIM if EDITION.marked else 0)
    return [EMBEDDING_DIM, code, *(len(values) for values in ATTRIBUTES.values())]


def _split(outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Identity embeddings, codes of the looks, then the scores of each of ``ATTRIBUTES``."""
    return outputs.split(_sizes(), dim=-1)


def load_judges(path: Path = WEIGHTS) -> Judges:
    """Read the trained judges."""
    net = JudgeNet()
    net.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(path).items()})
    return Judges(net.eval())


def grown_judges() -> JudgeNet:
    """A network that has learned what the first world's judges know, but its last layer."""
    net, state = JudgeNet(), safetensors.torch.load_file(FIRST_WEIGHTS)
    own = net.state_dict()
    known = {k: v.to(own[k]) for k, v in state.items() if own[k].shape == v.shape}
    net.load_state_dict({**own, **known})
    return net


def save_judges(net: JudgeNet, path: Path = WEIGHTS) -> None:
    """Write trained judges in half precision."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)


def judge_step(
    net: Callable[[torch.Tensor], torch.Tensor], data, rows, people, round_trip
) -> torch.Tensor:
    """Training loss on pictures of one actor, a random half of them as a VAE returns them.

    ``net`` gives what ``JudgeNet`` gives; ``people`` (B,) tells who is in each picture.
    """
    pictures = data.pictures[rows].float() / 255
    decoded = torch.rand(len(rows)) < 0.5
    with torch.no_grad():
        pictures[decoded] = round_trip(pictures[decoded])
    pictures = pictures + 0.02 * torch.randn_like(pictures)
    embedding, code, *scores = _split(net(pictures))
    said = data.said[rows, 0]
    targets = (said[:, 0], said[:, 1], said[:, 2], data.scenes[rows], data.styles[rows])
    looks = torch.cat([data.looks[rows, 0], data.marks[rows, 0]], dim=-1)[:, : code.shape[1]]
    loss = 20 * (code - looks).square().mean() + _contrast(embedding, people)
    for score, target in zip(scores, targets, strict=False):  # the first world has no styles
        loss = loss + F.cross_entropy(score, target, label_smoothing=0.02)
    return loss


def _contrast(embedding: torch.Tensor, people: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive loss: pictures of one individual against all others of the batch."""
    embedding = F.normalize(embedding, dim=-1)
    itself = torch.eye(len(people), dtype=torch.bool)
    scores = (embedding @ embedding.T / TEMPERATURE).masked_fill(itself, float("-inf"))
    same = (people[:, None] == people[None]) & ~itself
    return -scores.log_softmax(dim=-1)[same].mean()
