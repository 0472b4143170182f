"""Node that finds faces and makes masks and crops of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..sefi_core.comfyui.faces import DETECTORS, check_detector, detector_state, mask_faces
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.faces.extract import NONE_FOUND, Selection
from ..sefi_core.faces.face import WHICH
from ..sefi_core.faces.regions import REGIONS
from ..sefi_core.faces.shown import masks_over
from .types import CATEGORY, IMAGE, check_input

DEFAULTS = Selection()

# Core's io.BoundingBox.Input has a default of its own: a box that nobody drew.
BOXES = io.Custom("BOUNDING_BOX")


class SeFiFaceMask(io.ComfyNode):
    """IMAGE in; masks of the faces and square crops around the heads out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiFaceMask",
            display_name="SeFi Face Mask",
            category=CATEGORY,
            description=(
                "Finds faces, makes a mask of the chosen ones, shows it over the picture, and cuts "
                "out a square around each head. What it needs for that comes with the pack; "
                "nothing is downloaded."
            ),
            search_aliases=[
                "face detection",
                "face crop",
                "head mask",
                "portrait mask",
                "insightface",
            ],
            inputs=[
                io.Image.Input(
                    "image", tooltip="One or more pictures; an alpha channel is unused."
                ),
                io.Combo.Input(
                    "detector",
                    options=list(DETECTORS),
                    default="auto",
                    tooltip=(
                        "yunet: comes with the pack; sees faces of 2 % of the picture's longer "
                        "side and more, from the front and from the side. insightface: needs that "
                        "package and its models in models/insightface; the mask of the region face "
                        "follows the outline. auto: yunet, but insightface for the region face "
                        "where its 2d106det is there."
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
                        "insightface's 2d106det along the landmarks). head: what is seen of it, "
                        "with hair and headgear. oval: an ellipse over the face."
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
                BOXES.Input(
                    "boxes",
                    optional=True,
                    extra_dict={"forceInput": True},
                    tooltip=(
                        "Boxes around faces, in pixels, from a detector of ComfyUI or another "
                        "pack: they are used instead of this node's own detector."
                    ),
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
            # So that the mask can be looked at before anything is learned, and is shown again
            # when it comes from the cache.
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, detector: str = "auto", **_: object) -> str:
        """ComfyUI runs the node again when models were put into their folder."""
        return detector_state(detector)  # a linked detector is not known yet

    @classmethod
    def validate_inputs(cls, detector: str | None = None) -> bool | str:
        """Takes the names that detectors had in former versions; a linked one is not known yet."""
        try:
            if detector is not None:
                check_detector(detector)
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, image: io.Image.Type, detector: str, boxes: Any = None, **selection: Any
    ) -> io.NodeOutput:
        given = {name: value for name, value in selection.items() if value is not None}
        with raised_by("SeFi Face Mask"):
            check_input("image", image, IMAGE)
            check_detector(detector)
            found = mask_faces(image, detector, Selection(**given), boxes)
        shown = ui.PreviewImage(masks_over(image, found.masks), cls=cls)
        return io.NodeOutput(found.masks, found.crops, found.crop_masks, found.count, ui=shown)
