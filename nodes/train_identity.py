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
from ..sefi_core.learning.photos import pair_photos
from ..sefi_core.learning.settings import (
    CHECKPOINTING,
    TrainingSettings,
)
from ..sefi_core.text.captions import AUTO
from ..sefi_core.text.placeholders import check_name
from .training_inputs import (
    DEFAULTS,
    advanced_inputs,
    check_texts,
    first_of,
    lines_of,
    plain_inputs,
)
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
                *plain_inputs(),
                SEFI_IDENTITY.Input(
                    "identity",
                    optional=True,
                    tooltip="An identity to go on from, with the same stages and class word; or "
                    "one of SeFi Predict Identity, which takes a quarter of the steps.",
                ),
                *advanced_inputs(),
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
        texts = (first_of(value) for value in (name, class_word, captions, templates))
        choice = first_of(gradient_checkpointing)
        try:
            check_texts(*(text if isinstance(text, str) else None for text in texts))
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
                templates=lines_of(lines),
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
