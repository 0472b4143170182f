"""Faces with their five points from YuNet, whose weights the pack brings along.

The network: Wu, Peng and Yu, YuNet: A Tiny Millisecond-level Face Detector, Machine Intelligence
Research 20 (2023). The weights: ``yunet.safetensors``, made by ``tools/face_weights.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from .face import Face, face_in_box

WEIGHTS = Path(__file__).with_name("yunet.safetensors")

LONG_SIDE = 640
STRIDES = (8, 16, 32)
THRESHOLD, THRESHOLD_AGAIN = 0.7, 0.5
# The surest faces of 70 upright photos have 0.73 to 0.96, and turned at most 0.002 more.
UPRIGHT, UPRIGHT_MARGIN = 0.9, 0.03
# Whether a face lies is seen in its surroundings at this side.
CLOSE_LOOK = 192
# What is found at the second look is a person's photo if it is of this share of the longer side.
LARGE = 0.1
# Faces of fewer pixels, in the picture at its long side, are too small to be told from specks.
SMALLEST = 12
# Of two boxes that share more than this, intersection over union, the surer one is kept.
OVERLAP = 0.3
# A face that fills the picture is found when there is something around it: a third on every side.
PADDING = 1 / 3


class YuNetDetector:
    """Finds faces of about 10 to 500 pixels in the picture at a long side of 640 pixels."""

    def detect(self, picture: np.ndarray) -> list[Face]:
        """The faces of an RGB picture (height, width, 3), uint8.

        Where it is not quite sure of any it looks at the picture turned by quarters too, as a
        camera that lay on its side leaves it: of a face that lies the score is low and the points
        are wrong. Where there is none it takes a less sure one if it is seen in the mirrored
        picture and in one with a margin as well, or a sure one with that margin.
        """
        found = _found(picture)
        faces = found[found[:, 0] >= THRESHOLD]
        for quarters in _quarters(picture, found):
            other = _turned_back(_found(np.rot90(picture, quarters)), quarters, picture.shape)
            other = other[(other[:, 0] >= THRESHOLD) & _is_large(other, picture)]
            if _best(other) >= max(_best(found), _best(faces)) + UPRIGHT_MARGIN:
                faces = other
        if not len(faces):
            margin = ceil(max(picture.shape[:2]) * PADDING)
            around = ((margin, margin), (margin, margin), (0, 0))
            padded = _found(np.pad(picture, around, mode="edge"))
            padded[:, 1:] -= margin
            faces = found[_is_large(found, picture)]
            if len(faces):
                mirrored = _mirrored(_found(picture[:, ::-1]), picture.shape[1])
                faces = _seen_in_both(_seen_in_both(faces, padded), mirrored)
            else:
                faces = padded[(padded[:, 0] >= THRESHOLD) & _is_large(padded, picture)]
        return [face_in_box(one[1:5], one[5:].reshape(5, 2)) for one in faces]


class YuNet(nn.Module):
    """A picture (n, 3, height, width) in, BGR of 0 to 255, with sides that 32 divides.

    One tensor (n, rows, columns, 16) comes out for each of :data:`STRIDES`: the two parts of the
    score, the box's centre from the cell's corner in strides, the logarithm of its size in strides,
    and five points like the centre.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv2d(3, 16, 3, 2, 1), _Pair(16, 16)])
        widths = (16, 32, 64, 64, 64, 64)
        self.stages = nn.ModuleList(
            nn.ModuleList([_Pair(before, before), _Pair(before, after)])
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.neck = nn.ModuleList(_Pair(64, 64) for _ in STRIDES)  # from coarse to fine
        self.heads = nn.ModuleList(
            nn.ModuleList(_Pair(64, width) for _ in STRIDES) for width in (1, 4, 1, 10)
        )

    def forward(self, picture: torch.Tensor) -> list[torch.Tensor]:
        x = F.relu(self.stem[1](F.relu(self.stem[0](picture))))
        levels = []
        for number, (first, second) in enumerate(self.stages):  # type: ignore[misc]
            if number != 1:
                x = F.max_pool2d(x, 2)
            x = F.relu(second(F.relu(first(x))))
            levels.append(x)
        fine, middle, coarse = levels[2:]
        coarse = F.relu(self.neck[0](coarse))
        middle = F.relu(self.neck[1](middle + F.interpolate(coarse, scale_factor=2)))
        fine = F.relu(self.neck[2](fine + F.interpolate(middle, scale_factor=2)))
        results = []
        for level, x in enumerate((fine, middle, coarse)):
            kind, box, place, points = (head[level](x) for head in self.heads)  # type: ignore[index]
            scores = torch.cat([kind, place], 1).sigmoid()
            results.append(torch.cat([scores, box, points], 1).movedim(1, -1))
        return results


class _Pair(nn.Module):
    """A mixture of the channels, then a 3 x 3 filter in each."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(before, after, 1)
        self.filter = nn.Conv2d(after, after, 3, padding=1, groups=after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.filter(self.mix(x))


@lru_cache(maxsize=1)
def network() -> YuNet:
    """The network with its weights, on the CPU."""
    with torch.inference_mode(False):
        model = YuNet().eval().requires_grad_(False)
        model.load_state_dict(load_file(WEIGHTS))
    return model


def _found(picture: np.ndarray, long_side: int = LONG_SIDE) -> np.ndarray:
    """Faces (n, 15) of at least :data:`THRESHOLD_AGAIN`: score, box, five points, in pixels.

    The box is left, top, right, bottom; the surest is first.
    """
    height, width = picture.shape[:2]
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = Image.fromarray(np.ascontiguousarray(picture)).resize(
        size, Image.Resampling.BILINEAR, reducing_gap=3.0
    )
    planes = torch.from_numpy(np.array(small)).movedim(-1, 0).flip(0)[None].float()
    planes = F.pad(planes, (0, -size[0] % 32, 0, -size[1] % 32))
    with torch.no_grad():
        levels = network()(planes)
    rows = []
    for stride, level in zip(STRIDES, levels, strict=True):
        score = (level[0, ..., 0] * level[0, ..., 1]).sqrt()
        where = torch.nonzero(score >= THRESHOLD_AGAIN)
        cells = level[0][where[:, 0], where[:, 1]]
        corner = where.flip(1).float()
        centre, half = cells[:, 2:4] + corner, cells[:, 4:6].exp() / 2
        points = cells[:, 6:].reshape(-1, 5, 2) + corner[:, None]
        places = torch.cat([centre - half, centre + half, points.flatten(1)], 1) * stride
        rows.append(torch.cat([score[where[:, 0], where[:, 1]][:, None], places], 1))
    found = torch.cat(rows).numpy()
    found = found[found[:, 4] - found[:, 2] >= SMALLEST]
    found[:, 1::2] *= width / size[0]
    found[:, 2::2] *= height / size[1]
    return _without_doubles(found)


def _without_doubles(found: np.ndarray) -> np.ndarray:
    found = found[np.argsort(-found[:, 0], kind="stable")]
    kept: list[np.ndarray] = []
    for one in found:
        if all(_overlap(one[1:5], other[1:5]) <= OVERLAP for other in kept):
            kept.append(one)
    return np.array(kept).reshape(-1, found.shape[1])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / max(float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared, 1e-9)


def _best(found: np.ndarray) -> float:
    return float(found[:, 0].max(initial=0))


def _is_large(found: np.ndarray, picture: np.ndarray) -> np.ndarray:
    return found[:, 4] - found[:, 2] >= LARGE * max(picture.shape[:2])


def _quarters(picture: np.ndarray, found: np.ndarray) -> Sequence[int]:
    """By which quarters the picture may have to be turned for its faces to be upright."""
    if _best(found) >= UPRIGHT:
        return ()
    if _best(found) < THRESHOLD:
        return (1, 2, 3)
    left, top, right, bottom = found[0, 1:5]
    reach = max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    rows, columns = (slice(max(int(at - reach), 0), int(at + reach) + 1) for at in (y, x))
    close = picture[rows, columns]
    scores = [_best(_found(np.rot90(close, quarters), CLOSE_LOOK)) for quarters in range(4)]
    surest = int(np.argmax(scores))
    return (surest,) if scores[surest] > scores[0] + UPRIGHT_MARGIN else ()


def _seen_in_both(found: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Those of ``found`` that are in ``again`` too."""
    both = [any(_overlap(one[1:5], other[1:5]) > OVERLAP for other in again) for one in found]
    return found[np.array(both, bool)]


def _mirrored(found: np.ndarray, width: int) -> np.ndarray:
    """Boxes of a mirrored picture as boxes of the picture; the points stay as they are."""
    mirrored = found.copy()
    mirrored[:, 1], mirrored[:, 3] = width - found[:, 3], width - found[:, 1]
    return mirrored


def _turned_back(found: np.ndarray, quarters: int, shape: tuple[int, ...]) -> np.ndarray:
    """What was found in ``numpy.rot90(picture, quarters)`` in pixels of the picture itself."""
    height, width = shape[:2]
    x, y = found[:, 1::2], found[:, 2::2]
    turned = found.copy()
    turned[:, 1::2], turned[:, 2::2] = {
        1: (width - y, x),
        2: (width - x, height - y),
        3: (y, height - x),
    }[quarters]
    for first in (1, 2):
        turned[:, [first, first + 2]] = np.sort(turned[:, [first, first + 2]], axis=1)
    return turned
