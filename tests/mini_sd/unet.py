"""Train ComfyUI's U-Net on the miniature world's latents and text states.

Beside the noise loss there is one on where words look: how far a word's cross-attention is from
an even map of its own region of the picture. Stable Diffusion's words cover their own region by
themselves; a U-Net of this size, trained for an hour, does not. (Only asking that little falls
outside is not enough: each word then looks at one single cell, whatever its key.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
from torch import nn

from .architecture import SIZE_FEATURES
from .dataset import ROLES, Dataset

LOCALITY_WEIGHT = 0.02
SNR_CAP = 5.0  # min-SNR weighting
CAPTION_DROPOUT = 0.1
# Of SDXL: the share of captions that an encoder or the pooled output does not tell, and of those
# that the pooled output tells alone. All of them say the same, and it would only heed the easiest.
PART_DROPOUT = 0.1
POOLED_ALONE = 0.12
# A head is a sixth of the picture, and shows what a name, an expression and closed eyes say.
HEAD_WEIGHT = 4.0
HEAD, BODY, OBJECT = range(3)


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion 1.x's scaled-linear schedule, (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


class AttentionRecorder:
    """An ``attn2_replace`` for every block, which keeps the maps averaged over heads."""

    def __init__(self, unet: nn.Module):
        blocks = [("input", i) for i in range(len(unet.input_blocks))]
        blocks += [("middle", 0)] + [("output", i) for i in range(len(unet.output_blocks))]
        self.options = {"patches_replace": {"attn2": {block: self for block in blocks}}}
        self.maps: list[torch.Tensor] = []

    def __call__(self, q, k, v, extra):
        heads = extra["n_heads"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        self.maps.append(probabilities.mean(dim=1))
        return (probabilities @ v).transpose(1, 2).flatten(2)

    def take(self) -> list[torch.Tensor]:
        maps, self.maps = self.maps, []
        return maps


ROLE_REGIONS = {"subject": HEAD, "expression": HEAD, "eyes": HEAD, "object": OBJECT, "scene": None}


def word_regions(
    data: Dataset, rows: torch.Tensor, roles_wanted: tuple[str, ...] = tuple(ROLE_REGIONS)
) -> torch.Tensor:
    """The region of every token's own meaning, (B, 77, 16, 16) in [0, 1]; NaN where it has none.

    A scene's region is what no actor covers.
    """
    regions = data.regions[rows].float() / 255  # (B, 2, 3, 16, 16)
    anything = regions.amax(dim=(1, 2))
    roles, actors = data.roles[rows], data.actors[rows].long()
    out = torch.full((*roles.shape, 16, 16), float("nan"))
    b = torch.arange(len(rows))[:, None].expand_as(roles)
    for role in roles_wanted:
        chosen = roles == ROLES.index(role)
        if ROLE_REGIONS[role] is None:
            out[chosen] = 1 - anything[b[chosen]]
        else:
            out[chosen] = regions[b[chosen], actors[chosen], ROLE_REGIONS[role]]
    return out


def distance_from_regions(
    maps: list[torch.Tensor], regions: torch.Tensor, finest: int
) -> torch.Tensor:
    """Kullback-Leibler divergence of each word's map from its region's, over layers and words."""
    has_region = ~regions[..., 0, 0].isnan() & (regions.nan_to_num().sum(dim=(-1, -2)) > 0)
    total, count = regions.new_zeros(()), 0
    for attention in maps:
        side = int(attention.shape[1] ** 0.5)
        if side > finest or side < 4:
            continue
        region = F.adaptive_avg_pool2d(regions.nan_to_num(), side).flatten(2).transpose(1, 2)
        region = region / region.sum(dim=1, keepdim=True).clamp(min=1e-6)
        attention = attention / attention.sum(dim=1, keepdim=True).clamp(min=1e-9)
        logs = attention.clamp(min=1e-6).log()
        distance = F.kl_div(logs, region, reduction="none").sum(dim=1)
        total, count = total + distance[has_region].mean(), count + 1
    return total / max(count, 1)


def size_conditioning(pooled: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """What SDXL's U-Net is told beside the text, (B, D), as ComfyUI's ``SDXL.encode_adm`` says it.

    ``pooled`` (B, P) is the pooled output, ``sizes`` (B, 6) are in pixels.
    """
    features = Timestep(SIZE_FEATURES)(sizes.flatten()).unflatten(0, sizes.shape).flatten(1)
    return torch.cat([pooled, features], dim=1)


class UNetTask:
    """Everything a step needs: latents, text states, schedule, and sizes where they count."""

    def __init__(
        self, unet, words, data: Dataset, latents: torch.Tensor, sizes: torch.Tensor | None,
        device, seed: int,
    ):  # fmt: skip
        self.unet, self.words, self.data, self.latents = unet, words, data, latents
        self.sizes, self.device = sizes, device
        self.alphas = alphas_cumprod()
        self.recorder = AttentionRecorder(unet)
        self.generator = torch.Generator().manual_seed(seed)
        self.empty = torch.full((1, data.ids.shape[1]), 49407, dtype=torch.int32)
        self.empty[0, 0] = 49406

    def step(self, batch: int) -> torch.Tensor:
        """Noise loss and locality loss of one random batch."""
        g, device = self.generator, self.device
        rows = torch.randint(len(self.data), (batch,), generator=g).sort().values
        ids, regions = self.data.ids[rows].clone(), word_regions(self.data, rows)
        dropped = torch.rand(batch, generator=g) < CAPTION_DROPOUT
        ids[dropped] = self.empty
        regions[dropped] = float("nan")
        with torch.no_grad():
            context, pooled = self.words(
                ids.to(device),
                self.data.looks[rows].to(device),
                self.data.kinds[rows].to(device),
                self.data.marks[rows].to(device),
            )
            conditioning = {}
            if pooled is not None:
                context, pooled, silent = self._leave_out(context, pooled)
                regions[silent] = float("nan")
                sizes = self.sizes[rows].to(device)
                conditioning["y"] = size_conditioning(pooled, sizes)
        latents = self.latents[rows].float()
        t = torch.randint(1000, (batch,), generator=g)
        noise = torch.randn(latents.shape, generator=g)
        alpha = self.alphas[t][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = self.unet(
            noisy.to(device),
            t.to(device),
            context=context,
            transformer_options=dict(self.recorder.options),
            **conditioning,
        )
        snr = self.alphas[t] / (1 - self.alphas[t])
        weight = (snr.clamp(max=SNR_CAP) / snr).to(device)
        heads = self.data.regions[rows, :, HEAD].amax(dim=1, keepdim=True).float() / 255
        area = 1 + HEAD_WEIGHT * heads
        area = (area / area.mean(dim=(2, 3), keepdim=True)).to(device)
        errors = (area * (predicted - noise.to(device)).square()).mean(dim=(1, 2, 3))
        maps = self.recorder.take()
        finest = latents.shape[-1] // 2
        return (weight * errors).mean() + LOCALITY_WEIGHT * distance_from_regions(
            maps, regions.to(device), finest
        )

    def _leave_out(
        self, context: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Context and pooled output, parts of which are the empty caption's.

        And in which rows all of the context is that, (B,).
        """
        batch, widths = len(context), [trained.encoder.width for trained in self.words.values()]
        left_out = torch.rand(batch, len(widths) + 1, generator=self.generator) < PART_DROPOUT
        alone = torch.rand(batch, generator=self.generator) < POOLED_ALONE
        left_out[alone, :-1] = True
        nobody = self.data.looks[:1].to(context), self.data.kinds[:1].to(self.device)
        empty_context, empty_pooled = self.words(self.empty.to(self.device), *nobody)
        columns = left_out[:, :-1].repeat_interleave(torch.tensor(widths), dim=1)[:, None]
        context = torch.where(columns.to(self.device), empty_context, context)
        pooled = torch.where(left_out[:, -1:].to(self.device), empty_pooled, pooled)
        return context, pooled, left_out[:, :-1].all(dim=1)
