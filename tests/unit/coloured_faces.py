"""Faces to train encoders with: of people who differ in colour."""

from __future__ import annotations

import torch
from sefi_ide.sefi_core.face2diffusion.training.data import Faces, Record


def faces(people=6, each=4):
    """People who differ in colour; each photo is a little different."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(people, 3, 1, 1, generator=generator)
    crops = [
        colours[person] + 0.1 * torch.randn(3, 112, 112, generator=generator)
        for person in range(people)
        for _ in range(each)
    ]
    records = [Record(f"p{number // each}", None) for number in range(people * each)]
    return Faces(records, {"crop": (torch.stack(crops).clamp(0, 1) * 255).to(torch.uint8)})
