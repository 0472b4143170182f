"""The miniature Stable Diffusions as ComfyUI sees them: two more supported models.

Everything but the sizes is Stable Diffusion 1.5 and SDXL themselves: ComfyUI's own U-Net, its
CLIP text encoders with the stock tokenizers, its TAESD autoencoder, its model classes with what
they make of text, pooled output and sizes. ``register()`` appends the models to
``comfy.supported_models.models``; the stock ``CheckpointLoaderSimple`` then recognises a
checkpoint by its shapes.

One file without relative imports: the test-only custom node loads it as a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import torch

MODEL_CHANNELS = 64
# A face is a few latent cells wide here, not dozens: four channels would blur it.
LATENT_CHANNELS = 12
SIZE_CONDITIONS = 6
"""Numbers of SDXL's size conditioning: height and width of the original, top and left of the cut,
height and width of the target."""
SIZE_FEATURES = 256
"""Sines and cosines that ComfyUI makes of each of them."""


def _text_config(width: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "projection_dim": width,
    }


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a family.

    ``padding`` is the token that fills a prompt up behind its end. The U-Net sees the states of
    layer ``layer``, with the final norm or without. Pooled output is that of ``projected`` ones.
    """

    width: int
    heads: int
    padding: int = 49407
    layer: int = -1
    final_norm: bool = True
    projected: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """What ComfyUI's text model is made from."""
        return _text_config(self.width, self.heads)


SD1_ENCODERS = {"l": Encoder(128, 4)}
SDXL_ENCODERS = {
    "l": Encoder(32, 4, layer=-2, final_norm=False),
    "g": Encoder(64, 4, padding=0, layer=-2, final_norm=False, projected=True),
}

# Three levels of 16, 8 and 4 latent cells a side for a 128 pixel picture. The two coarser ones
# and the middle block have cross-attention; the finest has none, which doubles the speed of
# training and leaves the levels that the identity loss reads.
_UNET_CONFIG = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": MODEL_CHANNELS,
    "num_res_blocks": [1, 1, 1],
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
SD1_UNET_CONFIG = {
    **_UNET_CONFIG,
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": SD1_ENCODERS["l"].width,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
# As SDXL's: the coarser level has two transformers in its first block, projections are linear.
# Narrower than the one above, because its checkpoint holds two vocabularies in 30 MB.
SDXL_UNET_CONFIG = {
    **_UNET_CONFIG,
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 2],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 16,
    "context_dim": sum(encoder.width for encoder in SDXL_ENCODERS.values()),
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": SDXL_ENCODERS["g"].width + SIZE_CONDITIONS * SIZE_FEATURES,
}


def text_options(encoders: dict[str, Encoder], model_options) -> dict[str, Any]:
    """The ``model_options`` that make ComfyUI's text models as small as these."""
    configs = {f"clip_{name}_model_config": encoder.config for name, encoder in encoders.items()}
    return {**(model_options or {}), **configs}


class MiniSDClipModel(comfy.sd1_clip.SD1ClipModel):
    """ComfyUI's SD1 text encoder at the miniature's width and depth."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options=text_options(SD1_ENCODERS, model_options))


class MiniSDXLClipModel(comfy.sdxl_clip.SDXLClipModel):
    """ComfyUI's two SDXL text encoders at the miniature's widths and depth."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options=text_options(SDXL_ENCODERS, model_options))


class MiniLatent(comfy.latent_formats.LatentFormat):
    """Stable Diffusion 1.5's latent scale with the miniature's channels."""

    scale_factor = 0.18215
    latent_channels = LATENT_CHANNELS


class MiniSDXLLatent(MiniLatent):
    """The same latents, by SDXL's scale."""

    scale_factor = 0.13025


class NoInpainting:
    """Mixed into models of more than four input channels, which ComfyUI takes to be inpainting."""

    def inpaint_model(self):
        return False


def picked(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some entries of a U-Net's configuration, as supported models are told apart by."""
    return {name: config[name] for name in names}


SDXL_SIZES = ("model_channels", "transformer_depth", "context_dim", "adm_in_channels")
HEADS = ("num_heads", "num_head_channels")


class MiniSD(NoInpainting, comfy.supported_models.SD15):
    """Stable Diffusion 1.5 with fewer channels and a narrower text encoder."""

    unet_config = {
        **comfy.supported_models.SD15.unet_config,
        **picked(SD1_UNET_CONFIG, "context_dim", "model_channels"),
    }
    latent_format = MiniLatent

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, MiniSDClipModel)


class MiniSDXL(NoInpainting, comfy.supported_models.SDXL):
    """SDXL with fewer channels, shallower transformers and narrower text encoders."""

    unet_config = {
        **comfy.supported_models.SDXL.unet_config,
        **picked(SDXL_UNET_CONFIG, *SDXL_SIZES),
    }
    unet_extra_config = picked(SDXL_UNET_CONFIG, *HEADS)
    latent_format = MiniSDXLLatent

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            comfy.sdxl_clip.SDXLTokenizer, MiniSDXLClipModel
        )


def saved_state(
    config: comfy.supported_models_base.BASE, modules: dict[str, torch.nn.Module]
) -> dict[str, torch.Tensor]:
    """What ComfyUI's model of ``config`` saves of ``"unet"``, ``"vae"`` and the text encoders."""
    text = {
        f"clip_{name}.transformer.{key}": value
        for name in modules
        if name not in ("unet", "vae")
        for key, value in modules[name].state_dict().items()
    }
    return {
        **config.process_unet_state_dict_for_saving(modules["unet"].state_dict()),
        **config.process_clip_state_dict_for_saving(text),
        **config.process_vae_state_dict_for_saving(modules["vae"].state_dict()),
    }


_UNUSED = ("text_projection.weight", "position_ids")


@dataclass(frozen=True)
class Family:
    """A miniature: ComfyUI's classes and the sizes of its parts."""

    name: str
    model: type[comfy.supported_models_base.BASE]
    text_model: type[torch.nn.Module]
    encoders: dict[str, Encoder]
    unet_config: dict[str, Any]

    @property
    def context_dim(self) -> int:
        """Width of the text states that the U-Net sees: of all encoders side by side."""
        return self.unet_config["context_dim"]

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled output, 0 where the U-Net sees none."""
        return sum(encoder.width for encoder in self.encoders.values() if encoder.projected)

    @property
    def latent_scale(self) -> float:
        """What ComfyUI multiplies the autoencoder's latents by."""
        return self.model.latent_format.scale_factor

    def build_modules(self) -> dict[str, torch.nn.Module]:
        """``"unet"``, ``"vae"`` and the text encoders by their names, in fp32.

        ComfyUI's layers skip initialisation; PyTorch's defaults are put back here, so the
        result is a random model that can be trained or saved as it is.
        """
        unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
            **self.unet_config,
            dtype=torch.float32,
            device="cpu",
            operations=comfy.ops.disable_weight_init,
        )
        text = self.text_model(dtype=torch.float32)
        modules = {
            "unet": unet,
            **{name: getattr(text, f"clip_{name}").transformer for name in self.encoders},
            "vae": comfy.taesd.taesd.TAESD(latent_channels=LATENT_CHANNELS),
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

    def checkpoint(
        self, modules: dict[str, torch.nn.Module], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """One flat state dict in the layout of the family's checkpoints, as ComfyUI saves them."""
        state = saved_state(self.model(self.unet_config), modules)
        return {
            key: (value.to(dtype) if value.is_floating_point() else value).contiguous().clone()
            for key, value in ((key, value.detach()) for key, value in state.items())
        }

    def load(self, modules: dict[str, torch.nn.Module], state: dict[str, torch.Tensor]) -> None:
        """Put a checkpoint of the family into its modules.

        The projection of an encoder whose pooled output nothing uses stays as it is. Raises
        ``ValueError`` when anything else is missing or left over.
        """
        text = self.model(self.unet_config).process_clip_state_dict(dict(state))
        parts = {name: (text, f"clip_{name}.transformer.") for name in self.encoders}
        parts |= {"unet": (state, "model.diffusion_model."), "vae": (state, "first_stage_model.")}
        for name, (source, prefix) in parts.items():
            own = {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
            missing, extra = modules[name].load_state_dict(own, strict=False)
            unused = _UNUSED if name in self.encoders and not self.encoders[name].projected else ()
            wrong = [key for key in (*missing, *extra) if not key.endswith(unused)]
            if wrong:
                raise ValueError(f"Not a checkpoint of {self.name}, for {wrong[0]} in {name}")


SD1 = Family("sd1", MiniSD, MiniSDClipModel, SD1_ENCODERS, SD1_UNET_CONFIG)
SDXL = Family("sdxl", MiniSDXL, MiniSDXLClipModel, SDXL_ENCODERS, SDXL_UNET_CONFIG)
FAMILIES = {family.name: family for family in (SD1, SDXL)}


def register() -> None:
    """Append the miniatures to ComfyUI's supported models, once per process."""
    models = comfy.supported_models.models
    for family in FAMILIES.values():
        if not any(model.__name__ == family.model.__name__ for model in models):
            models.append(family.model)
