"""The miniature Stable Diffusion as ComfyUI sees it: one more supported model.

Everything but the sizes is Stable Diffusion 1.5: ComfyUI's own U-Net, its CLIP text
encoder with the stock tokenizer, its TAESD autoencoder, epsilon prediction on the
scaled-linear schedule. ``register()`` appends the model to
``comfy.supported_models.models``; the stock ``CheckpointLoaderSimple`` then recognises
the checkpoint by its shapes.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import torch

MODEL_CHANNELS = 64
CONTEXT_DIM = 128
# A face is a few latent cells wide here, not dozens: four channels would blur it.
LATENT_CHANNELS = 12

TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": CONTEXT_DIM,
    "intermediate_size": 4 * CONTEXT_DIM,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "projection_dim": CONTEXT_DIM,
}

# Three levels of 16, 8 and 4 latent cells a side for a 128 pixel picture. The two
# coarser ones and the middle block have cross-attention; the finest has none, which
# doubles the speed of training and leaves the levels that the identity loss reads.
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": MODEL_CHANNELS,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "context_dim": CONTEXT_DIM,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}


class MiniSDClipModel(comfy.sd1_clip.SD1ClipModel):
    """ComfyUI's SD1 text encoder at the miniature's width and depth."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        options = {**(model_options or {}), "clip_l_model_config": TEXT_CONFIG}
        super().__init__(device=device, dtype=dtype, model_options=options)


class MiniLatent(comfy.latent_formats.LatentFormat):
    """Stable Diffusion 1.5's latent scale with the miniature's channels."""

    scale_factor = 0.18215
    latent_channels = LATENT_CHANNELS


class MiniSD(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 with fewer channels and a narrower text encoder."""

    unet_config = {
        **comfy.supported_models.SD15.unet_config,
        "context_dim": CONTEXT_DIM,
        "model_channels": MODEL_CHANNELS,
    }
    latent_format = MiniLatent

    def inpaint_model(self):
        return False  # ComfyUI takes more than four input channels for an inpainting model

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, MiniSDClipModel)


def register() -> None:
    """Append the miniature to ComfyUI's supported models, once per process."""
    models = comfy.supported_models.models
    if not any(model.__name__ == MiniSD.__name__ for model in models):
        models.append(MiniSD)


def build_modules() -> dict[str, torch.nn.Module]:
    """U-Net, text encoder and autoencoder in fp32, keyed by their checkpoint prefix.

    ComfyUI's layers skip initialisation; PyTorch's defaults are put back here, so the
    result is a random model that can be trained or saved as it is.
    """
    operations = comfy.ops.disable_weight_init
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **UNET_CONFIG, dtype=torch.float32, device="cpu", operations=operations
    )
    text_encoder = MiniSDClipModel(dtype=torch.float32).clip_l.transformer
    modules = {
        "model.diffusion_model.": unet,
        "cond_stage_model.transformer.": text_encoder,
        "first_stage_model.": comfy.taesd.taesd.TAESD(latent_channels=LATENT_CHANNELS),
    }
    for module in modules.values():
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.modules.conv.init.kaiming_uniform_(layer.weight, a=5**0.5)
                if layer.bias is not None:
                    torch.nn.init.zeros_(layer.bias)
            elif isinstance(layer, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                torch.nn.init.ones_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
            elif isinstance(layer, torch.nn.Embedding):
                torch.nn.init.normal_(layer.weight, std=0.05)
    return modules


def checkpoint_state_dict(
    modules: dict[str, torch.nn.Module], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """One flat state dict in the layout of a Stable Diffusion 1.x checkpoint."""
    return {
        prefix + key: value.detach().to(dtype).contiguous().clone()
        for prefix, module in modules.items()
        for key, value in module.state_dict().items()
    }
