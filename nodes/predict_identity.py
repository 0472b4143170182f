"""Nodes that predict an identity from photos, in a moment, with a face encoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sefi_core.comfyui import face_encoders
from ..sefi_core.comfyui.face_encoders import BESIDE, OpenedEncoder, Wish
from ..sefi_core.comfyui.faces import check_detector, detector_state
from ..sefi_core.comfyui.library import check_saveable_name
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.face2diffusion.crops import Choice
from ..sefi_core.learning.photos import pair_photos
from ..sefi_core.text.placeholders import check_name
from .face_inputs import face_inputs
from .types import (
    CATEGORY,
    FACE_ENCODER,
    IMAGE,
    MASK,
    SEFI_FACE_ENCODER,
    SEFI_IDENTITY,
    TEXT,
    check_input,
    check_inputs,
)

DEFAULTS = Wish()
ALIASES = ["face2diffusion", "face encoder", "zero-shot", "one-shot", "faceid", "ipadapter"]


class SeFiLoadFaceEncoder(io.ComfyNode):
    """Open a face encoder of ``{models}/face2diffusion``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiLoadFaceEncoder",
            display_name="SeFi Load Face Encoder",
            category=CATEGORY,
            description=(
                "Opens an encoder that predicts an identity from a photo: Face2Diffusion's msid.pt "
                "and mapping.pt, or a file that was trained for this pack, in "
                "models/face2diffusion. Nothing is downloaded."
            ),
            search_aliases=[*ALIASES, "msid", "load encoder"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=face_encoders.encoder_files(),
                    tooltip=(
                        "Encoder in models/face2diffusion: msid.pt of Face2Diffusion, or a "
                        ".safetensors file made for this pack. Press R to see files that are new."
                    ),
                ),
                io.Combo.Input(
                    "mapping",
                    options=face_encoders.mapping_files(),
                    default=BESIDE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For msid.pt only: the file with Face2Diffusion's mapping. auto is "
                        "mapping.pt in the same folder."
                    ),
                ),
            ],
            outputs=[
                SEFI_FACE_ENCODER.Output(
                    display_name="face encoder", tooltip="For SeFi Predict Identity."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, mapping: str | None = None) -> bool | str:
        """Check the files before the graph runs. What is linked is None here."""
        try:
            if file is not None:
                face_encoders.find_files(check_input("file", file, TEXT), _or_beside(mapping))
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, mapping: str | None = None) -> object:
        """Another value when a file has changed, so that it is read again."""
        # A linked name is not known yet: NaN equals nothing, so the files are looked at each time.
        if file is None:
            return float("nan")
        return face_encoders.fingerprint(check_input("file", file, TEXT), _or_beside(mapping))

    @classmethod
    def execute(cls, file: str, mapping: str | None = BESIDE) -> io.NodeOutput:
        with raised_by("SeFi Load Face Encoder"):
            check_input("file", file, TEXT)
            return io.NodeOutput(face_encoders.load_face_encoder(file, _or_beside(mapping)))


class SeFiPredictIdentity(io.ComfyNode):
    """Photos in, identity out: what a face encoder says of them, without any training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiPredictIdentity",
            display_name="SeFi Predict Identity",
            category=CATEGORY,
            description=(
                "Predicts an identity from one photo or several, in about a second and without "
                "training. Use it at once with SeFi Apply Identity, or let SeFi Train Identity "
                "refine it. Needs a face encoder for the family of your checkpoint."
            ),
            search_aliases=[*ALIASES, "instantid", "photomaker", "predict", "fast", "portrait"],
            is_input_list=True,
            inputs=[
                SEFI_FACE_ENCODER.Input(
                    "face_encoder", tooltip="The encoder of SeFi Load Face Encoder."
                ),
                io.Image.Input(
                    "photos",
                    tooltip=(
                        "One photo, or several of the same person in any sizes; batch or list. "
                        "What the encoder says of them is averaged."
                    ),
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip=(
                        "One mask per photo, of its size, from SeFi Face Mask or painted: the face "
                        "that lies most in it is meant, and an encoder that looks at heads sees "
                        "the square around it. Without: a face is found and chosen as below."
                    ),
                ),
                io.Image.Input(
                    "expression",
                    optional=True,
                    tooltip=(
                        "One picture of a face with the expression to give to the identity. It "
                        "needs a model of your own in models/face2diffusion, expression*.onnx; see "
                        "the help page. Without: the prompt says the expression."
                    ),
                ),
                io.String.Input(
                    "name",
                    default=DEFAULTS.name,
                    tooltip="Write <name> in prompts later. Letters, digits, _ and -.",
                ),
                io.String.Input(
                    "class_word",
                    default=DEFAULTS.class_word,
                    optional=True,
                    tooltip=(
                        "The general word for it, in whose place <name> stands. Empty: the "
                        "encoder's own, mostly person."
                    ),
                ),
                *face_inputs(DEFAULTS.detector, DEFAULTS.choice),
            ],
            outputs=[
                SEFI_IDENTITY.Output(
                    display_name="identity",
                    tooltip=(
                        "For SeFi Apply Identity and SeFi Save Identity, or for SeFi Train "
                        "Identity to go on from."
                    ),
                ),
                io.Image.Output(
                    display_name="crops",
                    tooltip="What the encoder saw of each photo, 112 x 112 pixels.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, detector: Any = None, **_: object) -> str:
        """ComfyUI runs the node again when models were put into their folders."""
        (name,) = detector if isinstance(detector, list) and len(detector) == 1 else ("auto",)
        detectors = detector_state(name if isinstance(name, str) else "auto")
        return f"{detectors} {face_encoders.expression_state()}"

    @classmethod
    def execute(
        cls,
        face_encoder: list[OpenedEncoder],
        photos: list[io.Image.Type],
        masks: list[io.Mask.Type] | None = None,
        expression: list[io.Image.Type] | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        # Optional inputs may be missing, or None where a switch node gives nothing.
        given = {
            key: values[0] for key, values in settings.items() if values and values[0] is not None
        }
        with raised_by("SeFi Predict Identity"):
            opened, *_ = check_inputs("face_encoder", face_encoder, FACE_ENCODER)
            check_inputs("photos", photos, IMAGE)
            given_masks = [mask for mask in masks or () if mask is not None]
            if given_masks:
                check_inputs("masks", given_masks, MASK)
            expressions = [picture for picture in expression or () if picture is not None]
            if expressions:
                check_inputs("expression", expressions, IMAGE)
            name = check_input("name", given.pop("name", None), TEXT)
            check_saveable_name(check_name(name))
            class_word = check_input("class_word", given.pop("class_word", ""), TEXT)
            detector = given.pop("detector", DEFAULTS.detector)
            check_detector(detector)
            wish = Wish(name, class_word, detector, Choice(**given))
            if len(expressions) > 1:
                raise SeFiError(
                    f"expression is a list of {len(expressions)}: connect one picture, whose "
                    "expression is meant"
                )
            found = face_encoders.predict_identity(
                opened,
                pair_photos(photos, given_masks),
                wish,
                expressions[0] if expressions else None,
            )
        return io.NodeOutput(*found)


def _or_beside(mapping: str | None) -> str:
    return BESIDE if mapping is None else check_input("mapping", mapping, TEXT)
