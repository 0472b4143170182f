"""Node that says whether pictures show what their prompts ask for, and computes ID(P)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..sefi_core.comfyui.prompt_score import prompt_scores
from ..sefi_core.errors import raised_by
from ..sefi_core.prompt_score import FULFILLED, Rule
from .likeness import LIKENESS, SEFI_LIKENESS
from .types import (
    CATEGORY,
    CLIP,
    CLIP_VISION,
    IMAGE,
    SEFI_IDENTITY,
    TEXT,
    check_identity,
    check_input,
)

DEFAULTS = Rule()


class SeFiPromptScore(io.ComfyNode):
    """Pictures and their prompts in; how well they fit, and ID(P), out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiPromptScore",
            display_name="SeFi Prompt Score",
            category=CATEGORY,
            description=(
                "Says how well pictures fit their prompts, as the cosine of their CLIP embeddings, "
                "and computes ID(P): the mean likeness, where a picture whose prompt is not "
                "fulfilled counts 0. To compare two identities, draw the same prompts with both."
            ),
            is_output_node=True,
            search_aliases=["clip score", "prompt adherence", "text alignment", "id(p)", "metric"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "The text encoder that goes with clip_vision: of SDXL for ViT-bigG, of SD "
                        "2.x for ViT-H. For ViT-L load clip_l with CLIP Loader, since SD 1.x "
                        "checkpoints have not all of it."
                    ),
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The CLIP vision model, from Load CLIP Vision."
                ),
                io.Image.Input("images", tooltip="The pictures, in the order of their prompts."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of <anna> on the beach",
                    tooltip=(
                        "One prompt a line, a line for each picture; a single line is for all. "
                        "The placeholder counts as its class word."
                    ),
                ),
                SEFI_LIKENESS.Input(
                    "likeness",
                    optional=True,
                    tooltip="likeness of SeFi Likeness for the same pictures; ID(P) needs it.",
                ),
                SEFI_IDENTITY.Input(
                    "identity",
                    optional=True,
                    tooltip=(
                        "The identity whose placeholder is in the prompts. Not needed where clip "
                        "comes from SeFi Apply Identity."
                    ),
                ),
                io.Combo.Input(
                    "fulfilled",
                    options=list(FULFILLED),
                    default=DEFAULTS.fulfilled,
                    optional=True,
                    tooltip=(
                        "When a prompt counts as fulfilled. closest prompt: the picture is closer "
                        "to it than to the other prompts and to the bare class word. threshold: "
                        "its prompt score is at least threshold."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=DEFAULTS.threshold,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "For 'threshold': a cosine from -1 to 1. Every CLIP model has a scale of "
                        "its own: look at the scores of a good and of a bad picture first."
                    ),
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="prompt score",
                    tooltip="Mean cosine of pictures and prompts, from -1 to 1.",
                ),
                io.Float.Output(
                    display_name="fulfilled",
                    tooltip="Share of the pictures whose prompt is fulfilled, from 0 to 1.",
                ),
                io.Float.Output(
                    display_name="ID", tooltip="Mean likeness; needs the input likeness."
                ),
                io.Float.Output(
                    display_name="ID(P)",
                    tooltip=(
                        "Mean likeness, 0 for a picture whose prompt is not fulfilled; needs the "
                        "input likeness."
                    ),
                ),
                io.String.Output(
                    display_name="table", tooltip="All numbers, one picture a line, in order."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        clip_vision: io.ClipVision.Type,
        images: io.Image.Type,
        prompts: str,
        likeness: tuple[float, ...] | None = None,
        identity: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        given = {name: value for name, value in settings.items() if value is not None}
        with raised_by("SeFi Prompt Score"):
            for name, value, socket in (
                ("clip", clip, CLIP),
                ("clip_vision", clip_vision, CLIP_VISION),
                ("images", images, IMAGE),
                ("prompts", prompts, TEXT),
            ):
                check_input(name, value, socket)
            if likeness is not None:
                check_input("likeness", likeness, LIKENESS)
            if identity is not None:
                check_identity(identity)
            scores = prompt_scores(images, prompts, clip, clip_vision, identity, Rule(**given))
            figures = None if likeness is None else scores.quality(likeness)
        table = scores.table(likeness)
        summary = f"prompt score {scores.mean:.3f}, fulfilled {scores.share:.2f}"
        if figures is None:
            who = person = ExecutionBlocker(
                "SeFi Prompt Score: ID and ID(P) need the input likeness: connect SeFi Likeness"
            )
        else:
            who, person = figures["id"], figures["id_p"]
            summary += f", ID {who:.3f}, ID(P) {person:.3f}"
        return io.NodeOutput(
            scores.mean, scores.share, who, person, table, ui=ui.PreviewText(f"{summary}\n{table}")
        )
