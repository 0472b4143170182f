"""Training pictures of many sizes, some of them cut, and the numbers that say so.

SDXL is told how large a picture was before it was brought to the size of training, and where it
was cut, so that it can be asked for sharp and whole ones. Its miniature learns the same: of some
pictures a small version is drawn large again, of others only a part is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIDE = 128
WHOLE, SMALL, CUT = 0.65, 0.20, 0.15
"""Shares of pictures as they are, blurred by their size, and cut."""
LARGEST = 1024
SMALL_SIDES = (40, 48, 56, 64, 72, 80, 88, 96, 104, 112)
ZOOMS = (1.15, 1.75)


@dataclass
class Framing:
    """How each of N pictures is shown.

    ``originals`` (N,) are their sides in pixels before they were brought to ``SIDE``, ``zooms``
    (N,) how much larger than ``SIDE`` they were made, and ``corners`` (N, 2) the top and left of
    the square of ``SIDE`` pixels that was cut out of that.
    """

    originals: torch.Tensor
    zooms: torch.Tensor
    corners: torch.Tensor

    def __getitem__(self, rows) -> Framing:
        return Framing(self.originals[rows], self.zooms[rows], self.corners[rows])

    @property
    def sizes(self) -> torch.Tensor:
        """SDXL's size conditioning, (N, 6) in pixels."""
        sides = self.originals[:, None].expand(-1, 2)
        return torch.cat([sides, self.corners, torch.full_like(sides, SIDE)], dim=1).float()

    def show(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (N, C, SIDE, SIDE) as they are framed."""
        shown = pictures.clone()
        for side in self.originals[self.originals < SIDE].unique().tolist():
            rows = self.originals == side
            small = F.interpolate(pictures[rows], (side, side), mode="bilinear", antialias=True)
            shown[rows] = F.interpolate(small, (SIDE, SIDE), mode="bilinear")
        return self.cut(shown)

    def cut(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, h, w) over whole pictures, over what is shown of them."""
        rows = self.zooms > 1
        if not rows.any():
            return maps
        scale = 1 / self.zooms[rows]
        middle = (self.corners[rows].flip(-1) + SIDE / 2) * scale[:, None] * 2 / SIDE - 1
        theta = torch.zeros(len(scale), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = middle
        grid = F.affine_grid(theta, list(maps[rows].shape), align_corners=False)
        out = maps.clone()
        out[rows] = F.grid_sample(maps[rows], grid, padding_mode="border", align_corners=False)
        return out


def random_framing(count: int, generator: torch.Generator) -> Framing:
    """Draw the framing of ``count`` pictures. Half of the whole ones are just ``SIDE`` wide."""
    draw = torch.rand(count, generator=generator)
    large = torch.exp2(torch.rand(count, generator=generator) * 3) * SIDE
    originals = large.round().long().clamp(max=LARGEST)
    originals[draw < WHOLE / 2] = SIDE
    small = (draw >= WHOLE) & (draw < WHOLE + SMALL)
    sides = torch.tensor(SMALL_SIDES)
    picked = torch.randint(len(SMALL_SIDES), (count,), generator=generator)
    originals[small] = sides[picked][small]
    zooms = torch.ones(count)
    low, high = ZOOMS
    cut = draw >= WHOLE + SMALL
    zooms[cut] = (low + (high - low) * torch.rand(count, generator=generator))[cut]
    room = SIDE * (zooms - 1)
    corners = (torch.rand(count, 2, generator=generator) * room[:, None]).round().long()
    return Framing(originals, zooms, corners)
