"""Node that puts an identity into a MODEL and a CLIP."""

from __future__ import annotations

from comfy_api.latest import io

from ..sefi_core.comfyui.apply import apply_identity
from ..sefi_core.comfyui.methods import METHODS
from ..sefi_core.dividing import DEFAULT_REGIONS, REGIONS
from ..sefi_core.errors import raised_by
from ..sefi_core.identity.identity import Identity
from ..sefi_core.stage_strengths import parse_strengths
from .types import (
    CATEGORY,
    CLIP,
    MASK,
    MODEL,
    SEFI_IDENTITY,
    TEXT,
    check_identity,
    check_input,
)

DISPLAY_NAME = "SeFi Apply Identity"


class SeFiApplyIdentity(io.ComfyNode):
    """Use an identity like a LoRA: MODEL and CLIP in, MODEL and CLIP out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiApplyIdentity",
            display_name=DISPLAY_NAME,
            category=CATEGORY,
            description=(
                "Makes MODEL and CLIP know a learned identity. Write its placeholder, for example "
                "<anna>, in any prompt that is encoded with this CLIP, and sample with this MODEL. "
                "Prompts without the placeholder are not changed. Chain several of these nodes for "
                "several people; applying a second identity of the same name replaces the first."
            ),
            search_aliases=[
                "apply identity",
                "identity",
                "person",
                "face",
                "portrait",
                "character",
                "consistent character",
                "likeness",
                "lora",
                "embedding",
                "ipadapter",
                "instantid",
                "pulid",
                "photomaker",
                "faceid",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Clip.Input("clip", tooltip="The CLIP that encodes the prompts."),
                SEFI_IDENTITY.Input(
                    "identity",
                    tooltip="The learned identity, from SeFi Train Identity or SeFi Load Identity.",
                ),
                io.Float.Input(
                    "strength_k",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip=(
                        "How much of the identity goes into the attention's keys, which decide "
                        "where in the picture the person is drawn. A factor: 0 is the class word, "
                        "1 the identity, more exaggerates it."
                    ),
                ),
                io.Float.Input(
                    "strength_v",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip=(
                        "How much of the identity goes into the attention's values, which decide "
                        "what the person looks like. A factor: 0 is the class word, 1 the "
                        "identity, more exaggerates it."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "When in the sampling the identity begins, as a share from 0 (start) to 1 "
                        "(end); before that the class word is drawn."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "When in the sampling the identity ends, as a share from 0 (start) to 1 "
                        "(end); after that the class word is drawn."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.String.Input(
                    "stage_strengths",
                    default="",
                    tooltip=(
                        "Factors on both strengths for the parts of the sampling that the identity "
                        "has vectors for, from the noisiest, which makes the layout, to the last, "
                        "which makes the details: 0.4, 0.6, 1, 1, 1 leaves the layout to the class "
                        "word. Fewer numbers are stretched over the parts. Empty: 1 everywhere."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip=(
                        "Where in the picture the identity acts: white is the person, black what "
                        "the class word draws, grey and soft edges a mixture. A mask of the whole "
                        "picture in any size; a batch of masks is for the pictures of a batch. "
                        "Not connected: everywhere."
                    ),
                ),
                io.Combo.Input(
                    "regions",
                    options=list(REGIONS),
                    default=DEFAULT_REGIONS,
                    optional=True,
                    tooltip=(
                        "For several people in one prompt. Automatic: the first steps show who is "
                        "where, and from then on each acts in their own part of the picture only, "
                        "so that faces do not mix. Needs it for two people at least who have no "
                        "region; otherwise nothing changes. Off: everywhere."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the identity."),
                io.Clip.Output(tooltip="The CLIP that understands the placeholder."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        identity: Identity,
        strength_k: float = 1.0,
        strength_v: float = 1.0,
        start_percent: float | None = 0.0,
        end_percent: float | None = 1.0,
        stage_strengths: str | None = "",
        region: io.Mask.Type | None = None,
        regions: str | None = DEFAULT_REGIONS,
    ) -> io.NodeOutput:
        with raised_by(DISPLAY_NAME):
            check_input("model", model, MODEL)
            check_input("clip", clip, CLIP)
            strengths = "" if stage_strengths is None else stage_strengths
            check_input("stage_strengths", strengths, TEXT)
            if region is not None:
                check_input("region", region, MASK)
            method = METHODS[check_identity(identity).kind]
            applied = method(
                identity,
                strength_k,
                strength_v,
                0.0 if start_percent is None else start_percent,
                1.0 if end_percent is None else end_percent,
                parse_strengths(strengths),
                region,
                DEFAULT_REGIONS if regions is None else regions,
            )
            return io.NodeOutput(*apply_identity(model, clip, applied))
