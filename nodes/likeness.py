"""Node that says how much pictures look like a person, and keeps the best."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..sefi_core.comfyui.likeness import ENCODERS, Choice, encoder_state, judge_pictures
from ..sefi_core.contact_sheet import Entry, contact_sheet
from ..sefi_core.errors import raised_by
from ..sefi_core.likeness import LEAST, ranked, table, words_of
from .types import CATEGORY, IMAGE, Socket, check_input

DEFAULTS = Choice()

SEFI_LIKENESS = io.Custom("SEFI_LIKENESS")
"""Carries one number for each picture of a batch, a tuple, in the order of the batch."""
LIKENESS = Socket(
    lambda value: isinstance(value, tuple) and all(map(_is_finite, value)),
    "connect the output likeness of SeFi Likeness",
)


def _is_finite(number: Any) -> bool:
    return isinstance(number, float) and isfinite(number)


class SeFiLikeness(io.ComfyNode):
    """Photos of a person and pictures in; the pictures with the most alike first out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiLikeness",
            display_name="SeFi Likeness",
            category=CATEGORY,
            description=(
                "Says how much each picture looks like a person: 0 is a stranger, 1 another photo "
                "of the same person. Sorts the pictures, the most alike first. Needs a recognition "
                "model in models/face_recognition or models/insightface; nothing is downloaded."
            ),
            is_output_node=True,
            search_aliases=[
                "likeness",
                "similarity",
                "face recognition",
                "face match",
                "faceid",
                "best of",
                "portrait",
                "consistent character",
                "arcface",
            ],
            inputs=[
                io.Image.Input(
                    "reference",
                    tooltip=(
                        "One or more photos of the person, each with a face; the largest face of "
                        "a photo counts. Best are photos that were not trained on."
                    ),
                ),
                io.Image.Input(
                    "images",
                    tooltip=(
                        "The pictures to compare. Of several faces in one the most alike counts; "
                        "a picture without a face comes last."
                    ),
                ),
                io.Image.Input(
                    "training_photo",
                    optional=True,
                    tooltip=(
                        "The photo that was trained on. With it copying is told: 1 is the training "
                        "photo again, 0 is as far from it as another photo of the person. The "
                        "reference must then have other photos."
                    ),
                ),
                io.Combo.Input(
                    "encoder",
                    options=list(ENCODERS),
                    default=DEFAULTS.encoder,
                    optional=True,
                    tooltip=(
                        "The model that compares. auto: sface if it is there, else insightface. "
                        "sface: models/face_recognition. insightface: models/insightface, for "
                        "non-commercial research only, and its scale is an estimate."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=DEFAULTS.threshold,
                    min=LEAST,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "Likeness below which a picture is left out; the best one always stays. "
                        "-1 leaves nothing out."
                    ),
                ),
                io.Int.Input(
                    "keep",
                    default=DEFAULTS.keep,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="How many of the best pictures to give out; 0 gives all of them.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The pictures that are kept, the best first."
                ),
                io.Image.Output(
                    display_name="contact sheet",
                    tooltip="The first reference photo, then all pictures with their numbers.",
                ),
                io.Int.Output(
                    display_name="best index",
                    tooltip="Number of the best picture in the batch that came in, from 0.",
                ),
                io.Float.Output(
                    display_name="best likeness",
                    tooltip="Likeness of that picture; 0 if no picture has a face.",
                ),
                SEFI_LIKENESS.Output(
                    display_name="likeness",
                    tooltip="The numbers of all pictures as they came in, for SeFi Prompt Score.",
                ),
                io.String.Output(
                    display_name="table", tooltip="All numbers, one picture a line, best first."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder: str = "auto", **_: object) -> str:
        """ComfyUI runs the node again when models were put into their folder."""
        return encoder_state(encoder)

    @classmethod
    def execute(
        cls,
        reference: io.Image.Type,
        images: io.Image.Type,
        training_photo: io.Image.Type | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        given = {name: value for name, value in settings.items() if value is not None}
        with raised_by("SeFi Likeness"):
            check_input("reference", reference, IMAGE)
            check_input("images", images, IMAGE)
            if training_photo is not None:
                check_input("training_photo", training_photo, IMAGE)
            choice = Choice(**given)
            judged, pictures = judge_pictures(images, reference, training_photo, choice.encoder)
        order = ranked(judged)
        kept = ranked(judged, choice.threshold, choice.keep)
        entries = [Entry(pictures.reference[0], "reference")]
        entries += [
            Entry(
                pictures.images[one.number],
                f"{one.number}: {words_of(one)}",
                one.face,
                faint=rank >= len(kept),
            )
            for rank, one in enumerate(order)
        ]
        sheet = contact_sheet(entries)[None]
        best = torch.tensor([one.number for one in kept], device=images.device)
        return io.NodeOutput(
            images[best],
            sheet,
            order[0].number,
            order[0].likeness,
            tuple(one.likeness for one in judged),
            table(order, len(kept)),
            ui=ui.PreviewImage(sheet, cls=cls),
        )
