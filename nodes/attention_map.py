"""Node that shows where in a picture the words of a prompt look."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..sefi_core.attention.heat_maps import heat_picture
from ..sefi_core.attention.region_pictures import region_picture
from ..sefi_core.comfyui.attention_maps import attention_maps
from ..sefi_core.dividing import divided_pictures
from ..sefi_core.errors import SeFiError, raised_by
from .types import CATEGORY, CLIP, IMAGE, LATENT, MODEL, TEXT, check_input


class SeFiAttentionMap(io.ComfyNode):
    """Heat maps of the attention that the words of a prompt get, one picture per word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiAttentionMap",
            display_name="SeFi Attention Map",
            category=CATEGORY,
            description=(
                "Shows where in a picture the words of its prompt look, as heat maps of the "
                "model's cross-attention at one timestep: does <anna> stay on the face? Use the "
                "MODEL and CLIP of SeFi Apply Identity, or plain ones for plain words."
            ),
            search_aliases=["attention", "heat map", "activation map", "daam"],
            inputs=[
                io.Model.Input("model", tooltip="The model to look into."),
                io.Clip.Input("clip", tooltip="The CLIP that encodes the prompt."),
                io.Latent.Input(
                    "latent",
                    tooltip="The latent of a finished picture, from KSampler or VAE Encode.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of <anna>",
                    tooltip="The prompt of the picture; weights and long prompts are understood.",
                ),
                io.String.Input(
                    "words",
                    default="<anna>",
                    tooltip=(
                        "The words to show, separated by commas: placeholders, words of the "
                        "prompt, or several that follow each other in it (red hair)."
                    ),
                ),
                io.Int.Input(
                    "timestep",
                    default=400,
                    min=0,
                    max=999,
                    tooltip=(
                        "How much noise the model sees, as a training timestep: 0 is the finished "
                        "picture, 999 pure noise."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the noise. The same seed gives the same maps.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The picture to lay the heat maps over; they get its size. Without one "
                        "they are shown alone."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="heat maps",
                    tooltip="One labelled picture per word: all of the first word come first.",
                ),
                io.Mask.Output(
                    display_name="maps",
                    tooltip="The same maps as masks without labels, the highest value being 1.",
                ),
                io.Image.Output(
                    display_name="regions",
                    tooltip=(
                        "The picture divided among the words, one picture per latent: whose part "
                        "is where, by the same rule as regions: automatic of SeFi Apply Identity."
                    ),
                ),
                io.Mask.Output(
                    display_name="region masks",
                    tooltip=(
                        "These parts as masks, for the region of SeFi Apply Identity: all of the "
                        "first word come first. At each place they come to 1."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        latent: io.Latent.Type,
        prompt: str,
        words: str,
        timestep: int,
        seed: int,
        image: io.Image.Type | None = None,
    ) -> io.NodeOutput:
        with raised_by("SeFi Attention Map"):
            for name, value, socket in (
                ("model", model, MODEL),
                ("clip", clip, CLIP),
                ("latent", latent, LATENT),
                ("prompt", prompt, TEXT),
                ("words", words, TEXT),
            ):
                check_input(name, value, socket)
            asked = (" ".join(word.split()) for word in words.split(","))
            chosen = list(dict.fromkeys(word for word in asked if word))
            if not chosen:
                raise SeFiError("words is empty: name at least one word of the prompt")
            if image is not None and not len(check_input("image", image, IMAGE)):
                raise SeFiError("image is empty: connect the decoded picture, or disconnect it")
            found = attention_maps(model, clip, latent, prompt, chosen, timestep, seed)
        size = None if image is None else (image.shape[1], image.shape[2])
        maps = found.together(size)
        latents = len(maps) // len(chosen)
        heat = torch.stack(
            [
                heat_picture(
                    one,
                    None if image is None else image[number % latents % len(image)][..., :3],
                    chosen[number // latents],
                )
                for number, one in enumerate(maps)
            ]
        )
        parts = divided_pictures(found.layers, len(chosen), size or found.size)
        regions = torch.stack(
            [
                region_picture(
                    parts[number::latents],
                    None if image is None else image[number % len(image)][..., :3],
                    chosen,
                )
                for number in range(latents)
            ]
        )
        return io.NodeOutput(heat, maps, regions, parts, ui=ui.PreviewImage(heat, cls=cls))
