"""Node that takes a picture's style and scene from the text and its person from the identity."""

from __future__ import annotations

from comfy_api.latest import io

from ..sefi_core.checks import check_choice, check_number
from ..sefi_core.comfyui.mixed_attention import ADAIN, IDENTITIES, TRAJECTORIES, mixed_attention
from ..sefi_core.errors import raised_by
from .types import CATEGORY, MASK, MODEL, check_input

DISPLAY_NAME = "SeFi Mixed Attention"
FACES = ("automatic", "off")


class SeFiMixedAttention(io.ComfyNode):
    """MODEL in, MODEL out; its pictures also look at what the text draws with the class word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiMixedAttention",
            display_name=DISPLAY_NAME,
            category=CATEGORY,
            description=(
                "Takes a picture's style and scene from the text and its person from the identity, "
                "as Infinite-ID does: while it is drawn, the picture also looks at what the same "
                "prompt draws with the class word. Put it between SeFi Apply Identity and the "
                "sampler. A step takes about one and a half times as long, or twice with a "
                "trajectory of its own."
            ),
            search_aliases=[
                "infinite-id",
                "mixed attention",
                "adain",
                "style",
                "style transfer",
                "stylized portrait",
                "identity",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL of SeFi Apply Identity, or of another node with a person.",
                ),
                io.Combo.Input(
                    "trajectory",
                    options=list(TRAJECTORIES),
                    default="own",
                    tooltip=(
                        "What the text draws. own: a picture of its own beside the identity's, "
                        "from the same noise; strong, a step takes about twice as long. same: each "
                        "step of the identity's picture once more with the class word; weak, about "
                        "one and a half times as long."
                    ),
                ),
                io.Combo.Input(
                    "adain_mean",
                    options=list(ADAIN),
                    default="off",
                    tooltip=(
                        "Moves the mean of what the identity's picture attends to, to that of the "
                        "text's (AdaIN-mean): in the attention's keys, which decide where it "
                        "looks, in its values, which decide what it draws, or in both."
                    ),
                ),
                io.Combo.Input(
                    "face_hidden",
                    options=list(FACES),
                    default="automatic",
                    tooltip=(
                        "The text draws another person, whose skin and hair would leak into the "
                        "picture. automatic: that person is found by the attention to the class "
                        "word, or is in face_mask, and is not looked at. off: it is."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "When in the sampling it begins, as a share from 0 (start) to 1 (end)."
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
                        "When in the sampling it ends, as a share from 0 (start) to 1 (end). "
                        "Steps after the end take no longer than without this node."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "identity",
                    options=list(IDENTITIES),
                    default="SeFi",
                    tooltip=(
                        "Where the person comes from. SeFi: from placeholders such as <anna> in "
                        "the prompts. other nodes: from nodes that patch the model's attention to "
                        "the text, as IP-Adapters and SeFi Apply Face Adapter do; the whole "
                        "positive prompt is of that person."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Mask.Input(
                    "face_mask",
                    optional=True,
                    tooltip=(
                        "Where the person is that the text draws, in the place of the automatic "
                        "search: white is hidden. A mask of the whole picture in any size; a batch "
                        "of masks is for the pictures of a batch."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model that samples with mixed attention.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        trajectory: str = "own",
        adain_mean: str = "off",
        face_hidden: str = "automatic",
        start_percent: float | None = 0.0,
        end_percent: float | None = 1.0,
        identity: str | None = "SeFi",
        face_mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        with raised_by(DISPLAY_NAME):
            check_input("model", model, MODEL)
            check_choice("trajectory", trajectory, TRAJECTORIES)
            check_choice("adain_mean", adain_mean, tuple(ADAIN))
            check_choice("face_hidden", face_hidden, FACES)
            start = 0.0 if start_percent is None else start_percent
            end = 1.0 if end_percent is None else end_percent
            check_number("start_percent", start, 0, 1)
            check_number("end_percent", end, 0, 1)
            source = "SeFi" if identity is None else identity
            check_choice("identity", source, IDENTITIES)
            if face_mask is not None:
                check_input("face_mask", face_mask, MASK)
            return io.NodeOutput(
                mixed_attention(
                    model,
                    trajectory,
                    adain_mean,
                    face_hidden == "automatic",
                    start,
                    end,
                    source,
                    face_mask,
                )
            )
