"""Node that learns several identities at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..sefi_core.checks import check_whole
from ..sefi_core.comfyui import notices
from ..sefi_core.comfyui.learning.people import people_in_folder, people_of_photos, photo_folder
from ..sefi_core.comfyui.learning.together import train_identities
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.identity.identity import Identity
from ..sefi_core.learning.settings import TrainingSettings
from ..sefi_core.text.captions import AUTO
from .training_inputs import advanced_inputs, first_of, lines_of, plain_inputs
from .types import (
    CATEGORY,
    CLIP,
    IMAGE,
    MASK,
    MODEL,
    SEFI_IDENTITY,
    TEXT,
    VAE,
    check_input,
    check_inputs,
)

DISPLAY_NAME = "SeFi Train Identities"
TOGETHER = 8


class SeFiTrainIdentities(io.ComfyNode):
    """Photos of many people in, a list of identities out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiTrainIdentities",
            display_name=DISPLAY_NAME,
            category=CATEGORY,
            description=(
                "Learns many people, pets or things at once, several of them in each batch, each "
                "exactly as SeFi Train Identity would alone. Takes a list of photos, one of each "
                "person, or a folder of photos. Who cannot be learned is named, and stops nobody."
            ),
            search_aliases=["batch", "train many", "characters", "folder", "dataset", "lora"],
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 1.x, 2.x, SDXL or their kin to learn them for.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "photos",
                    optional=True,
                    tooltip="One photo of each person, in any sizes; batch or list.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per photo, of its size. Without: as find_heads says.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder in ComfyUI's input folder, in place of photos: each picture "
                    "in it is a person, called as the file, and each subfolder a person with "
                    "several photos.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="Names for prompts, one a line, in the order of photos. Empty: "
                    "person_1, person_2 and so on. A folder brings its own names.",
                ),
                io.String.Input(
                    "class_word",
                    default="person",
                    tooltip="The general word for all of them: person, cat, chair.",
                ),
                io.String.Input(
                    "captions",
                    default=AUTO,
                    multiline=True,
                    tooltip="What the photos show beside the person, one line for all, or one for "
                    "each of photos. auto: the model itself looks for an expression.",
                ),
                io.Boolean.Input(
                    "find_heads",
                    default=True,
                    tooltip="Find the head in each photo that has no mask, as SeFi Face Mask does, "
                    "and learn what is inside. Turn it off for pets and things.",
                ),
                *plain_inputs(),
                io.Int.Input(
                    "together",
                    default=TOGETHER,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="People in one batch. Memory grows with it; the result is the same.",
                ),
                *advanced_inputs("preview_every", "predicted_steps", "predicted_learning_rate"),
            ],
            outputs=[
                SEFI_IDENTITY.Output(
                    display_name="identities",
                    is_output_list=True,
                    tooltip="A list: SeFi Save Identity behind it saves each of them.",
                ),
                io.String.Output(
                    display_name="report", tooltip="One line for each person: learned, or why not."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: object = None) -> bool | str:
        """Refuse a folder that is not there, before anything is loaded. Linked is None here."""
        name = first_of(folder)
        try:
            if isinstance(name, str) and name.strip():
                photo_folder(name)
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: object = None, **_: object) -> object:
        """Another value when a photo in the folder has changed."""
        name = first_of(folder)
        if not isinstance(name, str) or not name.strip():
            return ""
        return str(
            [
                (str(file), file.stat().st_mtime_ns, file.stat().st_size)
                for file in sorted(photo_folder(name).rglob("*"))
                if file.is_file()
            ]
        )

    @classmethod
    def execute(
        cls,
        model: list[io.Model.Type],
        clip: list[io.Clip.Type],
        vae: list[io.Vae.Type],
        photos: list[io.Image.Type] | None = None,
        masks: list[io.Mask.Type] | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        texts = {key: settings.pop(key, None) for key in ("names", "folder", "class_word")}
        texts["captions"] = settings.pop("captions", None)
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
            names, folder, class_word, captions = (
                check_inputs(key, came, TEXT) for key, came in texts.items()
            )
            templates = check_inputs("templates", given.pop("templates", [""]), TEXT)
            chosen = {key: values[0] for key, values in given.items()}
            find_heads = bool(chosen.pop("find_heads", True))
            together = chosen.pop("together", TOGETHER)
            check_whole("together", together, 1, 64)
            if lines := lines_of(templates[0]):
                chosen["templates"] = lines
            wanted = TrainingSettings(preview_every=0, **chosen)
            lines = captions if len(captions) > 1 else captions[0].split("\n")
            told = tuple(" ".join(line.split()) for line in lines)
            given_photos = [photo for photo in photos or () if photo is not None]
            given_masks = [mask for mask in masks or () if mask is not None]
            if folder[0].strip():
                if given_photos:
                    raise SeFiError("photos and folder are both given: leave one of them out")
                people = people_in_folder(check_input("folder", folder[0], TEXT), told, find_heads)
            else:
                if not given_photos:
                    raise SeFiError("there are no photos: connect photos, or name a folder")
                check_inputs("photos", given_photos, IMAGE)
                if given_masks:
                    check_inputs("masks", given_masks, MASK)
                people = people_of_photos(
                    given_photos, given_masks, lines_of("\n".join(names)), told, find_heads
                )
            bar = comfy.utils.ProgressBar(1)

            def on_step(done: int, of: int) -> None:
                bar.update_absolute(done, of)
                comfy.model_management.throw_exception_if_processing_interrupted()

            ready = [one for one in people if not isinstance(one.person, SeFiError)]

            def tell(lines: Sequence[str]) -> None:
                of_ready = iter(lines)
                said = [
                    str(one.person) if isinstance(one.person, SeFiError) else next(of_ready)
                    for one in people
                ]
                named = zip(people, said, strict=True)
                notices.say("\n".join(f"<{one.name}>: {line}" for one, line in named))

            learned = train_identities(
                model[0],
                clip[0],
                vae[0],
                [one.person for one in ready],  # pyright: ignore[reportArgumentType]
                class_word[0],
                wanted,
                together,
                tell,
                on_step,
            )
            outcomes = {id(one): outcome for one, outcome in zip(ready, learned, strict=True)}
            lines = []
            for one in people:
                outcome = outcomes.get(id(one), one.person)
                said = str(outcome) if isinstance(outcome, SeFiError) else "learned"
                lines.append(f"<{one.name}>: {said}")
            identities = [one for one in learned if isinstance(one, Identity)]
            report = "\n".join(lines)
            notices.say(report)
            if not identities:
                raise SeFiError(f"nobody could be learned: {lines[0]}")
        return io.NodeOutput(identities, report)
