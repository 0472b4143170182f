"""The families of base models that an identity can be learned on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family: checkpoints that share their text encoders and the shape of their U-Net."""

    id: str
    """As identity files name it."""
    label: str
    """As users know it."""
    encoders: tuple[str, ...]
    """The text encoders, as ComfyUI's tokens name them; their contexts stand side by side."""
    resolution: int
    """Side of the square pictures that it was trained on, in pixels."""


FAMILIES = {
    family.id: family
    for family in (
        Family("sd1", "SD 1.x", ("l",), 512),
        Family("sd2", "SD 2.x", ("h",), 768),
        Family("sdxl", "SDXL", ("l", "g"), 1024),
    )
}


def label_of(family: str) -> str:
    """The label of a family's id; what is no family is its own label."""
    return FAMILIES[family].label if family in FAMILIES else family
