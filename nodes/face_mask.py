"""Node that finds faces and makes masks and crops of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sefi_core.checks import check_choice
from ..sefi_core.comfyui.faces import DETECTORS, detector_state, mask_faces
from ..sefi_core.errors import raised_by
from ..sefi_core.faces.extract import NONE_FOUND, Selection
from ..sefi_core.faces.face import WHICH
from ..sefi_core.faces.regions import REGIONS
from .types import CATEGORY

DEFAULTS = Selection()


class SeFiFaceMask(io.ComfyNode):
    """IMAGE in; masks of the faces and square crops around the heads out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiFaceMask",
            display_name="SeFi Face Mask",
            category=CATEGORY,
            description=(
                "Finds faces, makes a mask of the chosen ones and cuts out a square around each "
                "head. Without insightface's models it uses the face cascade of scikit-image, "
                "which sees upright faces from the front. Nothing is downloaded."
            ),
            search_aliases=["face detection", "face crop", "head mask", "insightface"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="One or more pictures; an alpha channel is unused."
                ),
                io.Combo.Input(
                    "detector",
                    options=list(DETECTORS),
                    default="auto",
                    tooltip=(
                        "auto: insightface if it is installed and its models are in "
                        "models/insightface, else the LBP cascade. insightface: precise, the mask "
                        "follows the face. lbp cascade: comes with scikit-image; faces of at least "
                        "6 % of the picture's longer side and 20 px."
                    ),
                ),
                io.Combo.Input(
                    "which_face",
                    options=list(WHICH),
                    default=DEFAULTS.which_face,
                    tooltip=(
                        "The face to use in each picture: the largest, the one nearest to the "
                        "middle, the one at face_index counted from the left, or all of them."
                    ),
                ),
                io.Int.Input(
                    "face_index",
                    default=DEFAULTS.face_index,
                    min=0,
                    max=999,
                    tooltip="For 'left to right': number of the face, 0 is the leftmost.",
                ),
                io.Combo.Input(
                    "region",
                    options=list(REGIONS),
                    default=DEFAULTS.region,
                    tooltip=(
                        "What the mask covers. face: its outline, from hairline to chin (with "
                        "insightface's 2d106det along the landmarks). head: with hair, ears and "
                        "chin. oval: an ellipse over the face."
                    ),
                ),
                io.Int.Input(
                    "grow",
                    default=DEFAULTS.grow,
                    min=-4096,
                    max=4096,
                    tooltip="Pixels by which the mask is made larger, or smaller if negative.",
                ),
                io.Int.Input(
                    "feather",
                    default=DEFAULTS.feather,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Pixels over which the mask's edge fades from 1 to 0, half of them inside "
                        "the outline and half outside."
                    ),
                ),
                io.Combo.Input(
                    "none_found",
                    options=list(NONE_FOUND),
                    default=DEFAULTS.none_found,
                    tooltip=(
                        "What to do with a picture without a face: stop with an error, or mask the "
                        "whole picture and crop the largest square in its middle."
                    ),
                ),
                io.Int.Input(
                    "crop_size",
                    default=DEFAULTS.crop_size,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Width and height of the crops in pixels; heads are scaled to fit.",
                ),
                io.Float.Input(
                    "crop_margin",
                    default=DEFAULTS.crop_margin,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip=(
                        "Space around the head in the crop, as a share of the head's longer side. "
                        "The crop is moved inside the picture where it can be; if it is larger "
                        "than the picture, the picture's edge is repeated."
                    ),
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask", tooltip="One per picture, with all its chosen faces."
                ),
                io.Image.Output(
                    display_name="crop",
                    tooltip="One square per chosen face: picture by picture, left to right.",
                ),
                io.Mask.Output(display_name="crop mask", tooltip="The mask of each crop's face."),
                io.Int.Output(
                    display_name="count",
                    tooltip="Faces found in all pictures together, chosen or not.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, detector: str = "auto", **_: object) -> str:
        """ComfyUI runs the node again when models were put into their folder."""
        return detector_state(detector)  # a linked detector is not known yet

    @classmethod
    def execute(cls, image: io.Image.Type, detector: str, **selection: Any) -> io.NodeOutput:
        given = {name: value for name, value in selection.items() if value is not None}
        with raised_by("SeFi Face Mask"):
            check_choice("detector", detector, DETECTORS)
            found = mask_faces(image, detector, Selection(**given))
        return io.NodeOutput(found.masks, found.crops, found.crop_masks, found.count)
