"""The miniature in this process, loaded as its users load it; ComfyUI must have been started."""

from __future__ import annotations

from pathlib import Path

import comfy.sample
import comfy.sd
import torch

from . import architecture
from .checkpoints import CHECKPOINTS
from .text_encoder import behind_end

STEPS, CFG, SAMPLER, SCHEDULER = 20, 4.0, "euler", "normal"
BATCH = 16
"""Pictures that are drawn together, which takes two thirds of the time on a CPU."""


class MiniSDRuntime:
    """MODEL, CLIP and VAE of a miniature from ComfyUI's loader, and pictures from them.

    ``family`` is one of ``architecture.FAMILIES``, whose shipped checkpoint is loaded unless
    another one of the family is given.
    """

    def __init__(self, family: str = "sd1", checkpoint: Path | None = None):
        architecture.register()
        self.family = architecture.FAMILIES[family]
        checkpoint = checkpoint or CHECKPOINTS[family]
        self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))

    @property
    def unet(self):
        """The loaded U-Net, with its weights in place."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.model])
        return self.model.model.diffusion_model

    def encode(self, caption: str):
        """A caption's CONDITIONING."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))

    def conditions_of_ids(self, ids: torch.Tensor, side: int = 128) -> dict[str, torch.Tensor]:
        """What the U-Net takes beside latents and timesteps, for rows of token ids padded by END.

        ``context`` (B, 77, D), and for SDXL ``y`` of pictures that are ``side`` pixels a side.
        """
        padding = behind_end(ids)
        tokens = {
            name: torch.where(padding, encoder.padding, ids).tolist()
            for name, encoder in self.family.encoders.items()
        }
        contexts, pooled = [], []
        for row in range(len(ids)):
            chunk = {k: [[(token, 1.0) for token in rows[row]]] for k, rows in tokens.items()}
            context, output = self.clip.encode_from_tokens(chunk, return_pooled=True)
            contexts.append(context)
            pooled.append(output)
        conditions = {"context": torch.cat(contexts)}
        y = self.model.model.encode_adm(
            pooled_output=torch.cat(pooled), width=side, height=side, device=ids.device
        )
        return conditions if y is None else {**conditions, "y": y}

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of pictures (B, H, W, 3), scaled as the U-Net sees them."""
        with torch.no_grad():
            return self.model.model.process_latent_in(self.vae.encode(pictures))

    def round_trip(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures through the autoencoder and back."""
        with torch.no_grad():
            return torch.cat([self.vae.decode(self.vae.encode(p)) for p in pictures.split(32)])

    def sample(self, captions: list[str], seed: int, size: int = 128) -> torch.Tensor:
        """One picture (size, size, 3) for each caption, stacked; each from noise of its own."""
        shape = (1, architecture.LATENT_CHANNELS, size // 8, size // 8)
        pictures = []
        with torch.no_grad():
            negative = self.encode("")
            for start in range(0, len(captions), BATCH):
                part = captions[start : start + BATCH]
                seeds = [10_000 * seed + start + number for number in range(len(part))]
                noise = torch.cat(
                    [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
                )
                encoded = [
                    self.clip.encode_from_tokens(self.clip.tokenize(caption), return_pooled=True)
                    for caption in part
                ]
                contexts, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
                latents = comfy.sample.sample(
                    self.model, noise, STEPS, CFG, SAMPLER, SCHEDULER,
                    [[contexts, {"pooled_output": pooled}]], negative, torch.zeros_like(noise),
                    disable_pbar=True,
                )  # fmt: skip
                pictures += [self.vae.decode(latent[None]) for latent in latents]
        return torch.cat(pictures)
