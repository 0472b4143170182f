"""Node that learns an identity from photos."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..sefi_core.checks import check_choice
from ..sefi_core.comfyui.learning.live import workflow_id
from ..sefi_core.comfyui.learning.progress import TrainingProgress
from ..sefi_core.comfyui.learning.remembered import learn
from ..sefi_core.comfyui.library import check_saveable_name
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.learning.parametrisation import PARAMETRISATIONS
from ..sefi_core.learning.photos import pair_photos
from ..sefi_core.learning.settings import (
    BACKGROUND_TARGETS,
    CHECKPOINTING,
    DTYPES,
    TrainingSettings,
)
from ..sefi_core.text.captions import AUTO, check_caption
from ..sefi_core.text.placeholders import check_class_word, check_name, expand_template
from .types import (
    CATEGORY,
    CLIP,
    IMAGE,
    MASK,
    MODEL,
    SEFI_IDENTITY,
    TEXT,
    VAE,
    check_identity,
    check_inputs,
)

DISPLAY_NAME = "SeFi Train Identity"
DEFAULTS = TrainingSettings()


class SeFiTrainIdentity(io.ComfyNode):
    """Photos in, identity out: optimises per-stage K and V vectors against the loaded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiTrainIdentity",
            display_name=DISPLAY_NAME,
            category=CATEGORY,
            description=(
                "Learns a person, pet or thing from one photo or several of it, as a few vectors "
                "(about 40 KB) that SeFi Apply Identity puts into prompts as <name>. The "
                "model itself is not changed. Connect the mask of SeFi Face Mask for faces."
            ),
            search_aliases=["train", "learn face", "identity", "textual inversion", "dreambooth"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 1.x, 2.x, SDXL or their kin to learn it for.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "photos",
                    tooltip="One photo, or several of the same person in any sizes; batch or list.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip=(
                        "One mask per photo, of its size, from SeFi Face Mask or painted. The "
                        "pictures are cropped around it, and only what is inside is learned. "
                        "Without: the middle square of each photo."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="anna",
                    tooltip="Write <name> in prompts later. Letters, digits, _ and -.",
                ),
                io.String.Input(
                    "class_word",
                    default="person",
                    tooltip="The general word for it, where <name> will stand: person, cat, chair.",
                ),
                io.String.Input(
                    "captions",
                    default=AUTO,
                    multiline=True,
                    tooltip=(
                        "What the photo shows beside the person, such as: smiling, on the beach. "
                        "One line per photo, or one for all; a list has one per photo. It is left "
                        "out of what is learned. "
                        "auto: the model itself looks for an expression. Empty: nothing."
                    ),
                ),
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
                *_advanced_inputs(),
            ],
            outputs=[
                SEFI_IDENTITY.Output(
                    display_name="identity",
                    tooltip="For SeFi Apply Identity and SeFi Save Identity.",
                ),
                io.LossMap.Output(
                    display_name="losses", tooltip="The loss of every step, for Plot Loss Graph."
                ),
                io.Image.Output(
                    display_name="report",
                    tooltip="Photo and caption, attention before and after, a sample, the losses.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        name: object = None,
        class_word: object = None,
        captions: object = None,
        templates: object = None,
        gradient_checkpointing: object = None,
    ) -> bool | str:
        """Refuse texts that cannot be trained with, before anything is loaded.

        Linked ones are None here. ComfyUI marks every input that this takes, whichever is at
        fault, so it takes texts only, each sentence names its input, and there is one at a time.
        The choice is among them for workflows of before it was one, which have a truth value.
        """
        texts = (_first(value) for value in (name, class_word, captions, templates))
        choice = _first(gradient_checkpointing)
        try:
            _check_texts(*(text if isinstance(text, str) else None for text in texts))
            if choice is not None and not isinstance(choice, bool):
                check_choice("gradient_checkpointing", choice, CHECKPOINTING)
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: list[io.Model.Type],
        clip: list[io.Clip.Type],
        vae: list[io.Vae.Type],
        photos: list[io.Image.Type],
        masks: list[io.Mask.Type] | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        # Optional inputs may be missing, or None where a switch node gives nothing.
        given = {
            key: list(values)
            for key, values in settings.items()
            if values and values[0] is not None
        }
        with raised_by(DISPLAY_NAME):
            check_inputs("model", model, MODEL)
            check_inputs("clip", clip, CLIP)
            check_inputs("vae", vae, VAE)
            check_inputs("photos", photos, IMAGE)
            given_masks = [mask for mask in masks or () if mask is not None]
            if given_masks:
                check_inputs("masks", given_masks, MASK)
            given.setdefault("templates", ["\n".join(DEFAULTS.templates)])
            captions, (name, *_), (class_word, *_), (lines, *_) = (
                check_inputs(key, given.pop(key, None), TEXT)
                for key in ("captions", "name", "class_word", "templates")
            )
            captions = captions if len(captions) > 1 else captions[0].split("\n")
            chosen = {key: values[0] for key, values in given.items()}
            start = chosen.pop("identity", None)
            if start is not None:
                check_identity(start)
            chosen = TrainingSettings(
                templates=_lines(lines),
                captions=tuple(" ".join(caption.split()) for caption in captions),
                **chosen,
            ).going_on_from(start)
            check_saveable_name(check_name(name))
            context = get_executing_context()
            with TrainingProgress(
                chosen.steps,
                cls.hidden.unique_id,
                chosen.preview_every,
                f"<{name}>",
                workflow_id(cls.hidden.extra_pnginfo),
                context.prompt_id if context is not None else "",
            ) as progress:
                result = learn(
                    model[0],
                    clip[0],
                    vae[0],
                    pair_photos(photos, given_masks),
                    name,
                    class_word,
                    chosen,
                    start,
                    progress,
                )
        losses = {"loss": [step.loss for step in result.history]}
        return io.NodeOutput(result.identity, losses, result.report[None])


def _first(value: object) -> object:
    """The value of an input, which comes as a list."""
    return value[0] if isinstance(value, list) and value else value


def _check_texts(
    name: str | None, class_word: str | None, captions: str | None, templates: str | None
) -> None:
    """Raises :class:`SeFiError` for the first text that training would refuse; None is unknown."""
    if name is not None:
        check_saveable_name(check_name(name))
    if class_word is not None:
        check_class_word(class_word)
    for caption in (captions or "").split("\n"):
        check_caption(caption)
    lines = None if templates is None else _lines(templates)
    if lines is not None:
        TrainingSettings(templates=lines)
    for line in lines or ():
        if name is not None:
            expand_template(line, check_name(name))


def _lines(templates: str) -> tuple[str, ...]:
    """The prompts of a text, one a line."""
    return tuple(line.strip() for line in templates.splitlines() if line.strip())


def _advanced_inputs() -> list[io.Input]:
    """Everything that a first training need not touch."""
    return [
        SEFI_IDENTITY.Input(
            "identity",
            optional=True,
            tooltip="An identity to go on from, with the same stages and class word; or one of "
            "SeFi Predict Identity, which takes a quarter of the steps.",
        ),
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
            "Predict Identity.",
        ),
    ]
