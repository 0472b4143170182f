"""The figures of the quality benchmark: ID, Prompt, ID(P), Leak, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sample
import numpy as np
import torch
import torch.nn.functional as F
from sefi_ide.sefi_core.comfyui.attention_map import attention_maps
from sefi_ide.sefi_core.comfyui.base_model import LEVELS
from sefi_ide.sefi_core.heatmap import resized

from .methods import Learned
from .miniature import MiniSDRuntime, judges, render, runtime, wishes, world

LEAK_TIMESTEPS = (200, 400, 600)
LEAK_PICTURES = 4
LEAK_SEED = 60_000
BOOTSTRAPS = 10_000
LATENT_CELL = 8
"""Pixels of the side of a latent's cell."""
BATCH = 16


@torch.no_grad()
def draw(
    mini: MiniSDRuntime,
    learned: Learned,
    asked: Sequence[wishes.Wish],
    seeds: Sequence[int],
    kind: str,
) -> torch.Tensor:
    """Pictures (len(asked) * len(seeds), 128, 128, 3); all seeds of the first wish come first.

    Drawn in batches with a prompt for each picture, half as fast again on a CPU as one by one.
    """
    negative = mini.encode("")
    channels = learned.model.get_model_object("latent_format").latent_channels
    pictures = []
    todo = [(wish, seed) for wish in asked for seed in seeds]
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        noise = torch.cat(
            [
                torch.randn((1, channels, 16, 16), generator=torch.Generator().manual_seed(seed))
                for _, seed in part
            ]
        )
        encoded = [  # kept until drawn: the identity is found by these contexts
            learned.clip.encode_from_tokens(
                learned.clip.tokenize(wishes.caption_of(wish, learned.word, kind))
            )
            for wish, _ in part
        ]
        latents = comfy.sample.sample(
            learned.model, noise, runtime.STEPS, runtime.CFG, runtime.SAMPLER, runtime.SCHEDULER,
            [[torch.cat(encoded), {}]], negative, torch.zeros_like(noise), disable_pbar=True,
        )  # fmt: skip
        pictures.append(mini.vae.decode(latents))
    return torch.cat(pictures)


def quality(
    judge: judges.Judges,
    pictures: torch.Tensor,
    asked: Sequence[wishes.Wish],
    references: torch.Tensor,
) -> dict[str, float]:
    """``id``, ``prompt`` and ``id_p`` of pictures in the order of :func:`draw`.

    ID is the cosine of the identity embedding with the mean one of ``references``; Prompt the
    share of the prompted attributes that are seen; ID(P) the mean of ID with 0 for every picture
    that misses something.
    """
    wished = [wish for wish in asked for _ in range(len(pictures) // len(asked))]
    similarity = judge.identity_similarity(pictures, references)
    found = judge.found(pictures, wished)
    complete = torch.tensor([all(hits) for hits in found])
    hits = [hit for row in found for hit in row]
    return {
        "id": similarity.mean().item(),
        "prompt": sum(hits) / len(hits),
        "id_p": (similarity * complete).mean().item(),
    }


@torch.no_grad()
def leak(mini: MiniSDRuntime, learned: Learned, look: world.Look, seed: int) -> float:
    """Share of the word's attention that falls outside the head, in renders of the person."""
    shots, heads = _shots_with_heads(look, seed)
    shares = [
        _outside(maps, heads)
        for maps in word_maps(mini, learned, wishes.pictures_of(shots), {}, look.kind, seed)
    ]
    return torch.stack(shares).mean().item()


def leak_of_grid(look: world.Look, seed: int) -> dict[str, float]:
    """Leak of two drawn maps at the resolution of the attention, for comparison.

    "inner cells" is even over the cells that lie in the head entirely and nothing elsewhere;
    "head" is the head itself. As in :func:`leak`, both levels of the U-Net are added up.
    """
    _, heads = _shots_with_heads(look, seed)
    covered = [
        F.adaptive_avg_pool2d(heads[:, None], heads.shape[-1] // LATENT_CELL // level)[:, 0]
        for level in LEVELS
    ]
    drawn = {"inner cells": [(part > 0.99).float() for part in covered], "head": covered}
    return {
        name: _outside(sum(resized(part, heads.shape[1:]) for part in maps), heads).mean().item()
        for name, maps in drawn.items()
    }


def _shots_with_heads(look: world.Look, seed: int) -> tuple[list[world.Shot], torch.Tensor]:
    shots = [wishes.shot_of(look, look.kind, {}, seed + n) for n in range(LEAK_PICTURES)]
    heads = [render.render(shot).regions[0]["head"].copy() for shot in shots]
    return shots, torch.stack([torch.from_numpy(head).float() / 255 for head in heads])


def _outside(maps: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return 1 - (maps * heads).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))


@torch.no_grad()
def word_maps(
    mini: MiniSDRuntime,
    learned: Learned,
    pictures: torch.Tensor,
    wish: wishes.Wish,
    kind: str,
    seed: int,
) -> torch.Tensor:
    """Where the learned word looks in pictures (B, 128, 128, 3): (timesteps, B, 128, 128)."""
    latent = {"samples": mini.vae.encode(pictures)}
    prompt = wishes.caption_of(wish, learned.word, kind)
    return torch.stack(
        [
            attention_maps(learned.model, learned.clip, latent, prompt, [learned.word], t, seed)
            for t in LEAK_TIMESTEPS
        ]
    )


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """Mean and the ends of its 95 % bootstrap interval over identities: [mean, low, high]."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return [float(values.mean()), float(low), float(high)]
