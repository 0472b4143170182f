"""Faces from the frontal LBP cascade that comes with scikit-image: no model to download.

The cascade alone sees faces in clothes, walls and gravel. So what it finds is looked at again, at
several sizes and rolls and mirrored, and has to convince twice: the cascade by its margin, and a
second opinion that knows how faces differ from the cascade's usual false alarms: a linear
discriminant over histograms of oriented gradients (``tools/fit_face_verifier.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from scipy.ndimage import map_coordinates

from ..errors import SeFiError
from .cascade import WINDOW, CascadeMargin
from .face import Face

CASCADE_FILE = "lbpcascade_frontalface_opencv.xml"
VERIFIER_FILE = Path(__file__).with_name("lbp_verifier.safetensors")

# The picture is searched at this size, so faces of 6 % of its longer side and more are found.
SEARCH_SIDE = 400
# Fewer pixels of the picture hold no face that would be worth learning.
SMALLEST_FACE = 20
# The cascade knows upright faces; it still sees them at about 12 degrees.
SEARCH_ROLLS = (-18, 0, 18)
SEARCH_ZOOM, SEARCH_STEP = 1.1, 1.3
MOST_CANDIDATES = 40

# The second look: windows of 48 pixels, moved by up to 8.
SCALE, REACH, STEP = 2, 8, 2
ZOOMS, ROLLS = (0.87, 1.0, 1.15), (-9, 0, 9)
BEST_WINDOWS = 9

# Evidence for a face is the cascade's margin plus MARGIN_PER_VOTE times the discriminant's vote, of
# which more than MOST_VOTE does not count. The smaller a face, the more windows of its size were
# tried, so the more evidence it needs: with each halving of its size. Who is in the company of
# people needs less: a candidate as large as the median of at least two that are certain.
MARGIN_PER_VOTE, MOST_VOTE = 8.0, 1.5
NEEDED, NEEDED_PER_OCTAVE = 27.0, 4.0
LESS_IN_COMPANY, AS_LARGE, LEAST_VOTE_IN_COMPANY = 11.0, 1.35, 0.4
LEAST_MARGIN = 15.0
# Standard deviation in grey levels of 0 to 1; local binary patterns see shapes in any noise.
LEAST_CONTRAST = 0.02

# A cascade window is as high as the face, hairline to chin, and wider.
WIDTH_IN_WINDOW = 0.8


@dataclass(frozen=True)
class Candidate:
    """Something that the cascade took for a face: a square window of ``size`` pixels.

    ``margin`` is the cascade's, ``patches`` (n, 24, 24) is what was seen, ``vote`` the
    discriminant's mean over the better half of it: about 1 and more for faces, below 0 for other
    things.
    """

    center: tuple[float, float]
    size: float
    roll: float
    margin: float
    vote: float
    patches: np.ndarray

    @property
    def face(self) -> Face:
        return Face(self.center, WIDTH_IN_WINDOW * self.size, self.size, self.roll)


class LbpDetector:
    """Raises :class:`SeFiError` when scikit-image, or its cascade, is not there."""

    def __init__(self) -> None:
        try:
            import skimage.data
            from skimage.feature import Cascade, hog
        except ImportError as error:
            raise SeFiError(
                f"the LBP cascade needs scikit-image, which cannot be imported ({error}): run "
                "'pip install scikit-image' in ComfyUI's Python, or use insightface"
            ) from error
        # Not skimage.data.lbp_frontal_face_cascade_filename(): it downloads what is missing.
        file = Path(skimage.data.__file__).with_name(CASCADE_FILE)
        if not file.is_file():
            raise SeFiError(
                f"this scikit-image comes without {CASCADE_FILE}: install it again with "
                "'pip install --force-reinstall scikit-image' in ComfyUI's Python"
            )
        self._search = Cascade(str(file))
        self._margin = CascadeMargin(file)
        self._hog = hog
        verifier = load_file(VERIFIER_FILE)
        self._weights, self._bias = verifier["weights"], float(verifier["bias"])

    def detect(self, picture: np.ndarray) -> list[Face]:
        """The faces of an RGB picture (height, width, 3), uint8."""
        longer_side = max(picture.shape[:2])
        candidates = sorted(self.candidates(picture), key=_evidence, reverse=True)
        accepted: list[Candidate] = []

        def accept(company: float | None) -> None:
            for one in candidates:
                needed = NEEDED + NEEDED_PER_OCTAVE * log2(longer_side / one.size)
                if company is not None:
                    ratio = max(one.size / company, company / one.size)
                    if ratio > AS_LARGE or one.vote < LEAST_VOTE_IN_COMPANY:
                        continue
                    needed -= LESS_IN_COMPANY
                if _evidence(one) >= needed and not any(_overlap(one, other) for other in accepted):
                    accepted.append(one)

        accept(company=None)
        if len(accepted) >= 2:
            accept(company=float(np.median([one.size for one in accepted])))
        return [one.face for one in accepted]

    def candidates(self, picture: np.ndarray) -> list[Candidate]:
        """Everything that the cascade takes for a face, with what speaks for it."""
        height, width = picture.shape[:2]
        enlarged = 2 * SEARCH_SIDE / max(height, width)
        grey = Image.fromarray(picture).convert("L")
        levels = [_resized(grey, enlarged / 2**level) for level in range(6)]
        windows = self._windows(levels[1], max(WINDOW, round(SMALLEST_FACE * enlarged / 2)))
        found = []
        for group in _groups(windows)[:MOST_CANDIDATES]:
            x, y, size, roll = group.mean(0)
            first = self._looked_at_again(levels, (2 * x, 2 * y), 2 * size, roll)
            if first.margin < LEAST_MARGIN or first.patches.std((1, 2)).mean() < LEAST_CONTRAST:
                continue
            # Once more from where it seems to be, so that little depends on where it was found.
            one = self._looked_at_again(levels, first.center, first.size, first.roll)
            x, y = one.center
            found.append(
                replace(one, center=(x / enlarged, y / enlarged), size=one.size / enlarged)
            )
        return found

    def features(self, patches: np.ndarray) -> np.ndarray:
        """Histograms of oriented gradients of patches (n, 24, 24), (n, 800)."""
        return np.array(
            [
                self._hog(patch, orientations=8, pixels_per_cell=(4, 4), cells_per_block=(2, 2))
                for patch in patches
            ]
        )

    def _windows(self, picture: np.ndarray, smallest: int) -> np.ndarray:
        """All windows (n, 4) that the cascade accepts: centre x and y, size, roll."""
        height, width = picture.shape
        middle = np.array([width / 2, height / 2])
        largest = min(height, width)
        windows = [np.empty((0, 4))]
        for roll in SEARCH_ROLLS if smallest <= largest else ():
            turned = sample(picture, middle, 1.0, roll, (height, width))
            # An overlap that is never reached and no neighbours needed: windows as they are.
            accepted = self._search.detect_multi_scale(
                turned, SEARCH_ZOOM, SEARCH_STEP, (smallest,) * 2, (largest,) * 2, 0, 2.0
            )
            for window in accepted:
                size = window["width"]
                offset = np.array([window["c"], window["r"]]) + size / 2 - middle
                center = middle + _rotation(roll) @ offset
                if (center > 0).all() and (center < (width, height)).all():
                    windows.append(np.array([[*center, size, roll]]))
        return np.concatenate(windows)

    def _looked_at_again(
        self,
        levels: list[np.ndarray],
        center: tuple[float, float],
        size: float,
        roll: float,
    ) -> Candidate:
        """All places and sizes are in pixels of the first of the ``levels``."""
        side = WINDOW * SCALE
        patch_side = side + 2 * REACH + 1
        views = [(zoom, turn, flip) for zoom in ZOOMS for turn in ROLLS for flip in (False, True)]
        patches = []
        for zoom, turn, flip in views:
            level = min(max(int(log2(size * zoom / side)), 0), len(levels) - 1)
            patch = sample(
                levels[level],
                np.array(center) / 2**level,
                size * zoom / side / 2**level,
                roll + turn,
                (patch_side, patch_side),
            )
            patches.append(patch[:, ::-1] if flip else patch)
        patches = np.stack(patches)
        margins = self._margin(patches, SCALE, STEP)
        flat = margins.reshape(len(views), -1)
        margin = np.sort(flat, axis=1)[:, -BEST_WINDOWS:].mean(1)
        rows, columns = np.unravel_index(flat.argmax(1), margins.shape[1:])

        seen, places = [], []
        for (zoom, turn, flip), patch, row, column in zip(
            views, patches, rows * STEP, columns * STEP, strict=True
        ):
            window = patch[row : row + side, column : column + side]
            seen.append(window.reshape(WINDOW, SCALE, WINDOW, SCALE).mean((1, 3)))
            offset = np.array([(column - REACH) * (-1 if flip else 1), row - REACH])
            moved = _rotation(roll + turn) @ offset * size * zoom / side
            places.append([*moved, np.log(zoom), turn])
        seen = np.stack(seen)
        votes = np.sort(self.features(seen) @ self._weights + self._bias)
        weights = np.exp((margin - margin.max()) / 4)
        x, y, zoom, turn = np.average(places, axis=0, weights=weights)
        return Candidate(
            (center[0] + float(x), center[1] + float(y)),
            size * float(np.exp(zoom)),
            float(roll + turn),
            float(margin.mean()),
            float(votes[len(votes) // 2 :].mean()),
            seen,
        )


def _evidence(candidate: Candidate) -> float:
    return candidate.margin + MARGIN_PER_VOTE * min(candidate.vote, MOST_VOTE)


def _overlap(one: Candidate, other: Candidate) -> bool:
    distance = np.hypot(*np.subtract(one.center, other.center))
    return distance < 0.5 * max(one.size, other.size)


def _groups(windows: np.ndarray) -> list[np.ndarray]:
    """Windows at about the same place and of about the same size, the largest groups first.

    A window that nothing confirms is dropped.
    """
    x, y, size = windows[:, 0], windows[:, 1], windows[:, 2]
    distance = np.hypot(x[:, None] - x, y[:, None] - y) / np.minimum(size[:, None], size)
    near = (distance < 0.35) & (abs(np.log(size[:, None] / size)) < 0.4)
    left = np.ones(len(windows), bool)
    groups = []
    while left.any():
        confirming = (near & left).sum(1) * left
        members = near[confirming.argmax()] & left
        if members.sum() < 2:
            break
        groups.append(windows[members])
        left &= ~members
    return groups


def _resized(grey: Image.Image, factor: float) -> np.ndarray:
    size = [max(1, round(side * factor)) for side in grey.size]
    return np.asarray(grey.resize(size, Image.Resampling.LANCZOS), np.float64) / 255


def _rotation(degrees: float) -> np.ndarray:
    """Turns (x, y) clockwise, as y grows downwards."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s], [s, c]])


def sample(
    picture: np.ndarray, center: np.ndarray, step: float, roll: float, shape: tuple[int, int]
) -> np.ndarray:
    """What is around ``center`` of a grey picture, ``step`` pixels apart, with ``roll`` undone."""
    rows, columns = np.indices(shape)
    offsets = np.stack([columns - (shape[1] - 1) / 2, rows - (shape[0] - 1) / 2])
    x, y = np.tensordot(_rotation(roll) * step, offsets, 1)
    x, y = x + center[0] - 0.5, y + center[1] - 0.5
    return map_coordinates(picture, [y, x], order=1, mode="nearest")
