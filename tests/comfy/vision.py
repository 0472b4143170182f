"""A small random model of ComfyUI's real CLIP vision class, and a text encoder that goes with it.

A random text encoder and a random vision model do not understand each other. The text encoder's
projection is therefore solved for: the colours' texts then lead to the colours' pictures, as in a
real CLIP.
"""

# Relative, since a server has the pack under another name.
from __future__ import annotations

import comfy.clip_vision
import torch
import torch.nn.functional as F

from ...sefi_core.comfyui import prompt_score
from ...sefi_core.comfyui.clip.tokens import encoder_models
from ...sefi_core.comfyui.prompt_score import COLOUR_PROMPT, COLOURS, text_embeddings

WIDTH = 128  # of the miniatures' text encoders


@torch.inference_mode()
def vision_model(width=WIDTH, seed=0, **changes):
    """A CLIP vision model of ComfyUI's own class, with random weights."""
    config = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "hidden_act": "gelu",
        "num_attention_heads": 4, "num_channels": 3, "patch_size": 8, "image_size": 32,
        "projection_dim": width, "model_type": "clip_vision_model",
    }  # fmt: skip
    model = comfy.clip_vision.ClipVisionModel({**config, **changes})
    torch.manual_seed(seed)
    for name, weight in model.model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float("norm" in name and name.endswith("weight")))
        else:
            weight.normal_(std=weight[0].numel() ** -0.5)
    return model


def plain(*names):
    """An IMAGE of these colours, one a picture."""
    colours = torch.tensor([COLOURS[name] for name in names])
    return colours[:, None, None].expand(-1, 48, 48, -1).contiguous()


def taught(clip, vision):
    """``clip``, whose colours' texts now lead to the colours' pictures."""
    projection = encoder_models(clip)["l"].transformer.text_projection
    texts = [COLOUR_PROMPT.format(name) for name in COLOURS]
    projection.weight = torch.nn.Parameter(torch.eye(WIDTH), requires_grad=False)
    read = text_embeddings(clip, "l", texts)
    seen = F.normalize(vision.encode_image(plain(*COLOURS))["image_embeds"].float(), dim=-1)
    solved = torch.linalg.lstsq(read.double(), seen.double(), driver="gelsd").solution.T.float()
    projection.weight = torch.nn.Parameter(solved, requires_grad=False)
    prompt_score._agreeing.clear()
    return clip
