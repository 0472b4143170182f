"""Nodes that draw a person from photos with a face adapter, without any training."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sefi_core.comfyui import face_adapters
from ..sefi_core.comfyui.face_adapters import MOST_STRENGTH, OpenedAdapter, Wish
from ..sefi_core.comfyui.faces import check_detector, detector_state
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.face2diffusion.crops import Choice
from ..sefi_core.face_adapter.files import ASKED, AUTO
from ..sefi_core.learning.photos import pair_photos
from .face_inputs import face_inputs
from .types import (
    CATEGORY,
    CLIP_VISION,
    FACE_ADAPTER,
    IMAGE,
    MASK,
    MODEL,
    SEFI_FACE_ADAPTER,
    TEXT,
    check_input,
    check_inputs,
)

DEFAULTS = Wish()
ALIASES = ["ipadapter", "ip-adapter", "faceid", "infinite-id", "face adapter", "zero-shot"]


class SeFiLoadFaceAdapter(io.ComfyNode):
    """Open a face adapter of ``{models}/face_adapters`` or ``{models}/ipadapter``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiLoadFaceAdapter",
            display_name="SeFi Load Face Adapter",
            category=CATEGORY,
            description=(
                "Opens an adapter that draws a person from a photo: a FaceID file of IP-Adapter "
                "for Stable Diffusion 1.5 or SDXL, or a file that was trained for this pack, in "
                "models/face_adapters or models/ipadapter. Nothing is downloaded."
            ),
            search_aliases=[*ALIASES, "load adapter"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=face_adapters.adapter_files(),
                    tooltip=(
                        "Face adapter in models/face_adapters or models/ipadapter: a FaceID file "
                        "of IP-Adapter, or one of this pack. Press R to see files that are new."
                    ),
                ),
                io.Combo.Input(
                    "variant",
                    options=list(ASKED),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "FaceID plus and plus v2 have files that only their names tell apart. "
                        "auto: as the name says. For all other files it says nothing."
                    ),
                ),
            ],
            outputs=[
                SEFI_FACE_ADAPTER.Output(
                    display_name="face adapter", tooltip="For SeFi Apply Face Adapter."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Check the file before the graph runs. What is linked is None here."""
        try:
            if file is not None:
                face_adapters.find_file(check_input("file", file, TEXT))
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: object) -> object:
        """Another value when the file has changed, so that it is read again."""
        # A linked name is not known yet: NaN equals nothing, so the file is looked at each time.
        if file is None:
            return float("nan")
        return face_adapters.fingerprint(check_input("file", file, TEXT))

    @classmethod
    def execute(cls, file: str, variant: str | None = AUTO) -> io.NodeOutput:
        with raised_by("SeFi Load Face Adapter"):
            check_input("file", file, TEXT)
            asked = AUTO if variant is None else variant
            return io.NodeOutput(face_adapters.load_face_adapter(file, asked))


class SeFiApplyFaceAdapter(io.ComfyNode):
    """MODEL and photos in; out a MODEL that draws who is in the photos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiApplyFaceAdapter",
            display_name="SeFi Apply Face Adapter",
            category=CATEGORY,
            description=(
                "Draws the person of one photo or several, without training: an attention to the "
                "face beside that to the prompt. Write the prompt as for anybody, a photo of a "
                "woman. Chain several of these nodes, each with a region, for several people; it "
                "goes together with SeFi Apply Identity, LoRAs and ControlNets."
            ),
            search_aliases=[*ALIASES, "instantid", "pulid", "photomaker", "portrait", "likeness"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                SEFI_FACE_ADAPTER.Input(
                    "face_adapter", tooltip="The adapter of SeFi Load Face Adapter."
                ),
                io.Image.Input(
                    "photos",
                    tooltip=(
                        "One photo, or several in any sizes; batch or list. Faces of several are "
                        "averaged; a portrait adapter sees up to five side by side."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULTS.strength,
                    min=-MOST_STRENGTH,
                    max=MOST_STRENGTH,
                    step=0.05,
                    tooltip=(
                        "How much of the attention to the face is added to that to the prompt. A "
                        "factor: 0 is nothing, bit by bit, 1 as it was trained; less follows the "
                        "prompt more closely."
                    ),
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip=(
                        "One mask per photo, of its size, from SeFi Face Mask or painted: the face "
                        "that lies most in it is meant, and a recogniser that looks at heads sees "
                        "the square around it. Without: a face is found and chosen as below."
                    ),
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip=(
                        "CLIP ViT-H of Load CLIP Vision, for adapters that look at the picture as "
                        "well: FaceID plus, plus v2 and Infinite-ID."
                    ),
                ),
                io.String.Input(
                    "weights",
                    default=DEFAULTS.weights,
                    optional=True,
                    tooltip=(
                        "How much each photo counts in the average, one number from 0 for each, in "
                        "their order: 0.7, 0.3 mixes two people. Empty: all alike."
                    ),
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip=(
                        "Where in the picture the adapter acts: white is the person, black the "
                        "prompt alone, grey and soft edges a mixture. A mask of the whole picture "
                        "in any size; a batch of masks is for the pictures of a batch. Not "
                        "connected: everywhere."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=DEFAULTS.start_percent,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "When in the sampling the adapter begins, as a share from 0 (start) to 1 "
                        "(end); before that the prompt alone is drawn."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=DEFAULTS.end_percent,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "When in the sampling the adapter ends, as a share from 0 (start) to 1 "
                        "(end); after that the prompt alone is drawn."
                    ),
                ),
                io.Boolean.Input(
                    "text",
                    default=DEFAULTS.text,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "On: the face beside the prompt. Off: the face alone, the prompt is not "
                        "looked at while the adapter acts; Infinite-ID's identity stream."
                    ),
                ),
                io.Float.Input(
                    "lora_strength",
                    default=DEFAULTS.lora_strength,
                    min=-MOST_STRENGTH,
                    max=MOST_STRENGTH,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Factor on the LoRA inside FaceID files, which acts on the whole picture "
                        "at all times. It is loaded once, also where the model has it from Load "
                        "LoRA or another of these nodes. 0 leaves it out."
                    ),
                ),
                *face_inputs(DEFAULTS.detector, DEFAULTS.choice),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that draws the person."),
                io.Image.Output(
                    display_name="faces", tooltip="What the adapter saw of each photo."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, detector: Any = None, **_: object) -> str:
        """ComfyUI runs the node again when models were put into their folders."""
        (name,) = detector if isinstance(detector, list) and len(detector) == 1 else ("auto",)
        return detector_state(name if isinstance(name, str) else "auto")

    @classmethod
    def execute(
        cls,
        model: list[io.Model.Type],
        face_adapter: list[OpenedAdapter],
        photos: list[io.Image.Type],
        masks: list[io.Mask.Type] | None = None,
        clip_vision: list[io.ClipVision.Type] | None = None,
        region: list[io.Mask.Type] | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        # Optional inputs may be missing, or None where a switch node gives nothing.
        given = {
            key: values[0] for key, values in settings.items() if values and values[0] is not None
        }
        with raised_by("SeFi Apply Face Adapter"):
            patcher, *_ = check_inputs("model", model, MODEL)
            opened, *_ = check_inputs("face_adapter", face_adapter, FACE_ADAPTER)
            check_inputs("photos", photos, IMAGE)
            given_masks = [mask for mask in masks or () if mask is not None]
            if given_masks:
                check_inputs("masks", given_masks, MASK)
            vision = next((one for one in clip_vision or () if one is not None), None)
            if vision is not None:
                check_input("clip_vision", vision, CLIP_VISION)
            mask = next((one for one in region or () if one is not None), None)
            if mask is not None:
                check_input("region", mask, MASK)
            check_input("weights", given.get("weights", ""), TEXT)
            check_detector(given.get("detector", DEFAULTS.detector))
            which = {key: given.pop(key) for key in ("which_face", "face_index") if key in given}
            wish = Wish(**given, choice=Choice(**which))
            found = face_adapters.apply_face_adapter(
                patcher, opened, pair_photos(photos, given_masks), wish, vision, mask
            )
        return io.NodeOutput(*found)
