"""How sure a cascade of local binary patterns is, which scikit-image's ``Cascade`` does not say.

Multi-block local binary patterns: Liao et al., Learning Multi-scale Block Local Binary Patterns for
Face Recognition, ICB 2007. The cascade's file has OpenCV's format.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

WINDOW = 24
# The eight blocks around the middle one, clockwise from the upper left: bits 7 to 0 of the code.
_NEIGHBOURS = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))


class CascadeMargin:
    """By how much windows pass, or miss, the thresholds of a cascade."""

    def __init__(self, file: Path) -> None:
        cascade = ElementTree.parse(file).getroot()[0]
        rectangles = [
            tuple(int(v) for v in (rect.text or "").split())
            for rect in cascade.iterfind("features/_/rect")
        ]
        self._thresholds = 0.0
        self._classifiers = []  # (x, y, width, height) of the first block, value for each code
        for stage in cascade.iterfind("stages/_"):
            self._thresholds += float(stage.findtext("stageThreshold", ""))
            for weak in stage.iterfind("weakClassifiers/_"):
                _, _, feature, *subset = (
                    int(v) for v in weak.findtext("internalNodes", "").split()
                )
                below, above = (float(v) for v in weak.findtext("leafValues", "").split())
                bits = np.array(subset)[:, None] >> np.arange(32) & 1
                values = np.where(bits.reshape(-1), below, above)
                self._classifiers.append((rectangles[feature], values))

    def __call__(self, patches: np.ndarray, scale: int, step: int) -> np.ndarray:
        """The margins of all windows of ``patches`` (n, height, width), grey in [0, 1].

        Windows are ``24 * scale`` pixels and ``step`` pixels apart. The result (n, rows, columns)
        is the sum over the stages of what the stage counted less its threshold.
        """
        n, height, width = patches.shape
        integral = np.zeros((n, height + 1, width + 1))
        integral[:, 1:, 1:] = patches.cumsum(1).cumsum(2)
        rows = np.arange(0, height - WINDOW * scale + 1, step)
        columns = np.arange(0, width - WINDOW * scale + 1, step)
        margin = np.full((n, len(rows), len(columns)), -self._thresholds)
        for (x, y, block_width, block_height), values in self._classifiers:
            ys = (rows + y * scale)[:, None] + np.arange(4) * block_height * scale
            xs = (columns + x * scale)[:, None] + np.arange(4) * block_width * scale
            corners = integral[:, ys[:, None, :, None], xs[None, :, None, :]]
            blocks = np.diff(np.diff(corners, axis=-1), axis=-2)
            code = np.zeros(margin.shape, np.intp)
            for bit, (row, column) in enumerate(_NEIGHBOURS):
                brighter = blocks[..., row, column] >= blocks[..., 1, 1]
                code |= brighter.astype(np.intp) << (7 - bit)
            margin += values[code]
        return margin
