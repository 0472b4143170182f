"""What the nodes that train have in common: settings as inputs, and the check of their texts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sefi_core.comfyui.library import check_saveable_name
from ..sefi_core.learning.parametrisation import PARAMETRISATIONS
from ..sefi_core.learning.settings import (
    BACKGROUND_TARGETS,
    CHECKPOINTING,
    DTYPES,
    TrainingSettings,
)
from ..sefi_core.text.captions import check_caption
from ..sefi_core.text.placeholders import check_class_word, check_name, expand_template

DEFAULTS = TrainingSettings()


def first_of(value: object) -> object:
    """The value of an input, which comes as a list."""
    return value[0] if isinstance(value, list) and value else value


def check_texts(
    name: str | None, class_word: str | None, captions: str | None, templates: str | None
) -> None:
    """Raises :class:`SeFiError` for the first text that training would refuse; None is unknown."""
    if name is not None:
        check_saveable_name(check_name(name))
    if class_word is not None:
        check_class_word(class_word)
    for caption in (captions or "").split("\n"):
        check_caption(caption)
    lines = None if templates is None else lines_of(templates)
    if lines is not None:
        TrainingSettings(templates=lines)
    for line in lines or ():
        if name is not None:
            expand_template(line, check_name(name))


def lines_of(templates: str) -> tuple[str, ...]:
    """The prompts of a text, one a line."""
    return tuple(line.strip() for line in templates.splitlines() if line.strip())


def plain_inputs() -> list[Any]:
    """What a first training may touch."""
    return [
        io.Int.Input(
            "steps",
            default=DEFAULTS.steps,
            min=1,
            max=20000,
            tooltip="Training steps. Time grows with them. More learn the photo better, "
            "and from some number on follow prompts less.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="The same seed and settings give the same identity.",
        ),
    ]


def advanced_inputs(*without: str) -> list[io.Input]:
    """Everything that a first training need not touch, but for those of these ids."""
    return [one for one in _advanced_inputs() if one.id not in without]


def _advanced_inputs() -> list[Any]:
    return [
        io.Int.Input(
            "stages",
            default=DEFAULTS.stages,
            min=1,
            max=20,
            optional=True,
            advanced=True,
            tooltip="Parts of the denoising with vectors of their own, from outlines to details. 5 "
            "as in the paper; 1 is one set for all of it, as in textual inversion.",
        ),
        io.Combo.Input(
            "parametrisation",
            options=list(PARAMETRISATIONS),
            default=DEFAULTS.parametrisation,
            optional=True,
            advanced=True,
            tooltip="How the vectors of the stages are learned. offsets: together, and what "
            "differs between stages in smaller steps. direct: each stage alone, from its share of "
            "the steps. shared: as direct, with the same for K and V, as in textual inversion (1 "
            "stage) and ProSpect. self-attention: a small block makes the vectors; it wants a "
            "learning_rate of 0.0005 or so.",
        ),
        io.Float.Input(
            "learning_rate",
            default=DEFAULTS.learning_rate,
            min=1e-6,
            max=1.0,
            step=1e-5,
            round=False,
            optional=True,
            advanced=True,
            tooltip="Learning rate of AdamW, for vectors the size of Stable Diffusion 1.x's token "
            "embeddings; scaled for others, but not with self-attention. It falls to 0 over the "
            "steps.",
        ),
        io.Int.Input(
            "batch_size",
            default=DEFAULTS.batch_size,
            min=1,
            max=64,
            optional=True,
            advanced=True,
            tooltip="Noised pictures per step. Time and memory grow with it.",
        ),
        io.Float.Input(
            "attention_weight",
            default=DEFAULTS.attention_weight,
            min=0.0,
            max=10.0,
            step=1e-4,
            round=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Weight (lambda) of the face-wise attention loss, a factor, which keeps the name's "
                "attention where the class word's is; 0 turns it off. The paper has 0.003."
            ),
        ),
        io.Float.Input(
            "leak_weight",
            default=DEFAULTS.leak_weight,
            min=0.0,
            max=100.0,
            step=0.01,
            round=False,
            optional=True,
            advanced=True,
            tooltip="Weight of the leak, a factor: of the name's attention the share that is "
            "outside the mask. 0 turns it off, as in the paper. Without a mask it changes nothing.",
        ),
        io.Float.Input(
            "background_weight",
            default=DEFAULTS.background_weight,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Weight of the noise loss outside the mask, a factor. 0 learns from the masked "
            "part only, 1 from all alike. Without a mask it changes nothing.",
        ),
        io.Int.Input(
            "resolution",
            default=DEFAULTS.resolution,
            min=0,
            max=2048,
            step=64,
            optional=True,
            advanced=True,
            tooltip="Side of the square training pictures in pixels; 0 is what the model was made "
            "for: 512 (SD 1.x), 768 (SD 2.x) or 1024 (SDXL).",
        ),
        io.String.Input(
            "templates",
            multiline=True,
            default="\n".join(DEFAULTS.templates),
            optional=True,
            advanced=True,
            tooltip="Training prompts, one a line, each with <name> exactly once.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default=DEFAULTS.dtype,
            optional=True,
            advanced=True,
            tooltip="Precision of the U-Net while training; auto is the model's own.",
        ),
        io.Combo.Input(
            "gradient_checkpointing",
            options=list(CHECKPOINTING),
            default=DEFAULTS.gradient_checkpointing,
            optional=True,
            advanced=True,
            tooltip="Less memory for more time: the U-Net is computed once more going back. auto: "
            "where a step does not fit into the memory that is free; the log says so.",
        ),
        io.Int.Input(
            "preview_every",
            default=DEFAULTS.preview_every,
            min=0,
            max=20000,
            optional=True,
            advanced=True,
            tooltip="Steps between preview pictures; fewer where they would take more than "
            "3 % of the time. 0 for none.",
        ),
        # Last, and optional: saved workflows list values by position, and prompts lack it.
        io.Int.Input(
            "vectors",
            default=DEFAULTS.vectors,
            min=1,
            max=16,
            optional=True,
            advanced=True,
            tooltip="Vectors per token: how many of a prompt's 75 tokens <name> takes. More can "
            "hold more of the person, and of the photo; 1 is usual. A class word of several "
            "tokens has at least one for each.",
        ),
        io.Combo.Input(
            "background_target",
            options=list(BACKGROUND_TARGETS),
            default=DEFAULTS.background_target,
            optional=True,
            advanced=True,
            tooltip="What is learned outside the mask. photo: its background, as much as "
            "background_weight says. class word: what the model draws there itself for the class "
            "word (class-guided denoising), with weight 1 where background_weight is 0; a step "
            "takes a third longer.",
        ),
        io.Int.Input(
            "predicted_steps",
            default=DEFAULTS.predicted_steps,
            min=1,
            max=20000,
            optional=True,
            advanced=True,
            tooltip="Training steps in place of steps, where identity comes from SeFi Predict "
            "Identity: it is nearly there.",
        ),
        io.Float.Input(
            "predicted_learning_rate",
            default=DEFAULTS.predicted_learning_rate,
            min=1e-6,
            max=1.0,
            step=1e-5,
            round=False,
            optional=True,
            advanced=True,
            tooltip="Learning rate in place of learning_rate, where identity comes from SeFi "
            "Predict Identity. Lower it where the person is lost on the way.",
        ),
    ]
