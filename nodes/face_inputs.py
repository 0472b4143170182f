"""The inputs by which a node finds the face in photos without a mask."""

from __future__ import annotations

from comfy_api.latest import io

from ..sefi_core.comfyui.faces import DETECTORS
from ..sefi_core.face2diffusion.crops import WHICH, Choice


def face_inputs(detector: str, choice: Choice) -> list[io.Input]:
    """``detector``, ``which_face`` and ``face_index``, with these defaults."""
    return [
        io.Combo.Input(
            "detector",
            options=list(DETECTORS),
            default=detector,
            optional=True,
            advanced=True,
            tooltip=(
                "What finds the face. auto and yunet: comes with the pack. insightface: "
                "needs that package and its models in models/insightface."
            ),
        ),
        io.Combo.Input(
            "which_face",
            options=list(WHICH),
            default=choice.which_face,
            optional=True,
            advanced=True,
            tooltip=(
                "The face to use in a photo without a mask: the largest, the one nearest "
                "to the middle, or the one at face_index counted from the left."
            ),
        ),
        io.Int.Input(
            "face_index",
            default=choice.face_index,
            min=0,
            max=999,
            optional=True,
            advanced=True,
            tooltip="For 'left to right': number of the face, 0 is the leftmost.",
        ),
    ]
