"""The figures of the quality benchmark: pictures of a subject, what they are worth, and Leak."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from sefi_ide.sefi_core import evaluation
from sefi_ide.sefi_core.comfyui.attention_maps import attention_maps
from sefi_ide.sefi_core.learning import losses
from sefi_ide.tests.mini_sd import judges, render, runtime, wishes, world
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime

from .methods import Learned

LEAK_TIMESTEPS = (200, 400, 600)
LEAK_PICTURES = 4
LEAK_SEED = 60_000
BATCH = 16


def draw(
    mini: MiniSDRuntime,
    learned: Learned,
    wished: Sequence[wishes.Wish],
    seeds: Sequence[int],
    kind: str,
) -> torch.Tensor:
    """Pictures (N, 128, 128, 3) of N wishes, each from the noise of its own seed."""
    captions = [wishes.caption_of(wish, learned.word, kind) for wish in wished]
    return draw_captions(mini, learned.model, learned.clip, captions, seeds)


@torch.no_grad()
def draw_captions(
    mini: MiniSDRuntime,
    model: ModelPatcher,
    clip: CLIP,
    captions: Sequence[str],
    seeds: Sequence[int],
) -> torch.Tensor:
    """Pictures (N, 128, 128, 3) of N captions, each from the noise of its own seed.

    Drawn in batches with a prompt for each picture, half as fast again on a CPU as one by one.
    """
    negative = mini.encode("")
    channels = model.get_model_object("latent_format").latent_channels
    pictures = []
    todo = list(zip(captions, seeds, strict=True))
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        noise = torch.cat(
            [
                torch.randn((1, channels, 16, 16), generator=torch.Generator().manual_seed(seed))
                for _, seed in part
            ]
        )
        encoded = [  # kept until drawn: the identity is found by these contexts
            clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
            for caption, _ in part
        ]
        contexts, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        latents = comfy.sample.sample(
            model, noise, runtime.STEPS, runtime.CFG, runtime.SAMPLER, runtime.SCHEDULER,
            [[contexts, {"pooled_output": pooled}]], negative, torch.zeros_like(noise),
            disable_pbar=True,
        )  # fmt: skip
        pictures.append(mini.vae.decode(latents))
    return torch.cat(pictures)


def quality(
    judge: judges.Judges,
    pictures: torch.Tensor,
    wished: Sequence[wishes.Wish],
    references: torch.Tensor,
) -> dict[str, float]:
    """:func:`evaluation.quality` of pictures that were asked for ``wished``, one each.

    ``references`` are renders of the person.
    """
    similarity = judge.identity_similarity(pictures, references)
    return evaluation.quality(similarity, judge.found(pictures, wished))


@torch.no_grad()
def leak(mini: MiniSDRuntime, learned: Learned, look: world.Look, seed: int) -> float:
    """:func:`losses.leak` of the word, in renders of the person: what shows nothing of the head."""
    shots = [wishes.shot_of(look, look.kind, {}, seed + n) for n in range(LEAK_PICTURES)]
    heads = [render.render(shot).regions[0]["head"].copy() for shot in shots]
    heads = torch.stack([torch.from_numpy(head) > 0 for head in heads])[:, None].float()
    latent = {"samples": mini.vae.encode(wishes.pictures_of(shots))}
    prompt = wishes.caption_of({}, learned.word, look.kind)
    shares = []
    for timestep in LEAK_TIMESTEPS:
        maps = attention_maps(
            learned.model, learned.clip, latent, prompt, [learned.word], timestep, seed
        )
        shares.append(losses.leak(maps.layers, heads))
    return torch.stack(shares).mean().item()
