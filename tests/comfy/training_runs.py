"""Running SeFi Train Identity in a test, on a photo, a random miniature and a LoRA."""

from __future__ import annotations

import shutil

import comfy.lora
import comfy.sd
import torch
from comfy_api.latest import io
from sefi_ide.nodes.train_identity import SeFiTrainIdentity
from sefi_ide.sefi_core.comfyui.learning import snapshots
from sefi_ide.sefi_core.comfyui.learning.remembered import forget
from sefi_ide.sefi_core.identity.identity import Identity

from . import random_checkpoint

WIDTH = random_checkpoint.widths("sd1")["l"]
CHANNELS = random_checkpoint.architecture.LATENT_CHANNELS

HIDDEN = {
    "hidden_inputs": {io.Hidden.unique_id: "7"},
    "dynamic_paths": {},
    "dynamic_paths_default_value": {},
    "create_dynamic_tuple": False,
}


def load(path):
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)[:3]


def photo_and_mask(height: int = 80, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE and MASK of a gradient with a bright square for a face; inference tensors."""
    with torch.inference_mode():
        image = torch.linspace(0, 1, width)[None, None, :, None].repeat(1, height, 1, 3)
        mask = torch.zeros(1, height, width)
        mask[:, 20:50, 16:46] = 1
        return torch.where(mask[..., None] > 0, torch.tensor([0.9, 0.6, 0.4]), image), mask


def run(models, photos=None, masks=None, from_new=True, **changes):
    """Execute the node as ComfyUI does: in inference mode, every input as a list.

    With ``from_new`` no training of before is remembered, and no snapshot gone on from.
    """
    if from_new:
        forget()
        shutil.rmtree(snapshots.folder(), ignore_errors=True)
    inputs = dict.fromkeys(("model", "clip", "vae"))
    inputs.update(zip(inputs, models, strict=True))
    schema = SeFiTrainIdentity.GET_SCHEMA()
    for widget in schema.inputs:
        if getattr(widget, "default", None) is not None:
            inputs[widget.id] = widget.default
    inputs |= {"steps": 3, "resolution": 64, "preview_every": 0, "templates": "a photo of <name>"}
    inputs |= {"stages": 5, "captions": ""}  # a random model sees no expressions
    inputs |= changes
    captions = inputs["captions"]
    inputs = {key: [value] for key, value in inputs.items()}
    if isinstance(captions, list):
        inputs["captions"] = captions
    inputs["photos"] = [photo_and_mask()[0]] if photos is None else photos
    if masks is not None:
        inputs["masks"] = masks
    node = SeFiTrainIdentity.PREPARE_CLASS_CLONE(HIDDEN)
    with torch.inference_mode():
        return node.EXECUTE_NORMALIZED(**inputs).result


def same(one: Identity, other: Identity) -> bool:
    return all(
        torch.equal(rows, getattr(other, role)[encoder])
        for role in ("key_vectors", "value_vectors")
        for encoder, rows in getattr(one, role).items()
    )


def random_vectors(family: str, stages: int, seed: int, vectors: int = 1, scale: float = 1.0):
    """Random token embeddings (stages, vectors, width) of every text encoder of a family."""
    generator = torch.Generator().manual_seed(seed)
    return {
        encoder: scale * torch.randn(stages, vectors, width, generator=generator)
        for encoder, width in random_checkpoint.widths(family).items()
    }


def with_lora(model, clip):
    """MODEL and CLIP with a LoRA on every cross-attention key and every text encoder query."""
    generator = torch.Generator().manual_seed(11)
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    lora = {}
    for name, key in names.items():
        wanted = isinstance(key, str) and key.endswith(("attn2.to_k.weight", "q_proj.weight"))
        if wanted and name.startswith(("lora_unet_", "lora_te1_", "lora_te2_")):
            rows, columns = weights[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
            lora[f"{name}.lora_down.weight"] = 0.1 * torch.randn(2, columns, generator=generator)
    assert {name.split("_")[1][:2] for name in lora} == {"un", "te"}
    return comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
