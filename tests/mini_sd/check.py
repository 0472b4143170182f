"""``make mini-sd-check``: is a miniature Stable Diffusion good enough to measure with?

Prints one JSON object with the figures as its last line, and exits with 1 when a bar is
missed. Everything is measured on seeds that training never saw, with ComfyUI's stock loader
and sampler. ``SEED`` chooses others, ``FAMILY`` another miniature, ``WORLD=2`` the ones of the
second drawn world, which are also asked for people together, for styles and for marks.
"""

from __future__ import annotations

# ruff: noqa: E402
import json
import logging
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":  # as a file, whose package and ComfyUI are still to be found
    __package__ = "sefi_ide.tests.mini_sd"
    tools = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "comfyui.py"))
    tools["start"](cpu=True, prefix="sefi-mini-sd-")

import numpy as np
import torch
import torch.nn.functional as F

from ...sefi_core import evaluation
from . import check_crowds, world
from .checkpoints import chosen_family
from .dataset import Cast, make_dataset
from .editions import EDITION, FIRST
from .judges import Judges, load_judges
from .runtime import MiniSDRuntime
from .unet import AttentionRecorder, alphas_cumprod, word_regions
from .wishes import caption_of, pictures_of, random_wish, shot_of

log = logging.getLogger("mini_sd")

BARS = {
    "prompt_share": (0.90, "min"),
    "named_top1": (0.80, "min"),
    "judge_attributes": (0.97, "min"),
    "judge_identity": (0.99, "min"),
    "word_leak_ratio": (0.60, "max"),
}
LEAK_TIMESTEPS = (200, 400, 600)
GALLERY = 50
DECODED = 100
"""Pictures of each kind that the judges also see after the autoencoder, which takes longest."""


def random_shots(count: int, rng: np.random.Generator, seed: int) -> tuple[list, list]:
    """Shots of unseen people with everything prompted, and what they show."""
    shots, truth = [], []
    for i in range(count):
        wishes = {
            "scene": str(rng.choice(world.SCENES)),
            "object": str(rng.choice(world.OBJECTS)),
            "expression": str(rng.choice(world.EXPRESSIONS)),
            "eyes": str(rng.choice(("open", "closed"))),
        }
        shots.append(shot_of(world.unseen_look(seed + i), "person", wishes, seed + i))
        truth.append(wishes)
    return shots, truth


def check_judges(mini: MiniSDRuntime, judges: Judges, seed: int) -> dict[str, float]:
    """The judges on fresh renders and after the autoencoder; the lower figure counts."""
    rng = np.random.default_rng(seed)
    shots, truth = random_shots(300, rng, seed)
    fresh = pictures_of(shots)
    seen = {"fresh": fresh, "decoded": mini.round_trip(fresh[:DECODED])}
    attributes = {
        name: evaluation.prompt_share(judges.found(pictures, truth[: len(pictures)]))
        for name, pictures in seen.items()
    }
    pairs = _twin_pairs(200, rng, seed)
    decoded = [mini.round_trip(pictures[:DECODED]) for pictures in pairs]
    identity = {}
    for name, sets in (("fresh", pairs), ("decoded", decoded)):
        a, same, other = (judges.identity_embeddings(pictures) for pictures in sets)
        identity[name] = auc((a * same).sum(-1), (a * other).sum(-1))
    log.info("judges: attributes %s, identity %s", attributes, identity)
    return {
        "judge_attributes": min(attributes.values()),
        "judge_identity": min(identity.values()),
    }


def _twin_pairs(count: int, rng, seed: int):
    """Pictures of someone, of the same one again, and of another with the same hair and skin."""
    sets = [[], [], []]
    for i in range(count):
        look = world.unseen_look(seed + 5000 + i)
        other = world.twin_look(look, rng)
        for group, who in zip(sets, (look, look, other), strict=True):
            group.append(shot_of(who, "person", random_wish(rng), int(rng.integers(2**31))))
    return [pictures_of(shots) for shots in sets]


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Area under the ROC curve of two sets of scores."""
    wins = (positive[:, None] > negative[None]).double() + 0.5 * (
        positive[:, None] == negative[None]
    )
    return wins.mean().item()


def check_prompts(mini: MiniSDRuntime, judges: Judges, seed: int, count: int = 96) -> dict:
    """Share of the prompted attributes found in pictures of the class word."""
    rng = np.random.default_rng(seed)
    wishes = [random_wish(rng) for _ in range(count)]
    captions = [caption_of(wish, "person") for wish in wishes]
    pictures = mini.sample(captions, seed=seed)
    found = judges.found(pictures, wishes)
    by_name: dict[str, list[bool]] = {}
    for wanted, hits in zip(wishes, found, strict=True):
        for name, hit in zip(wanted, hits, strict=True):
            by_name.setdefault(name, []).append(hit)
    log.info("prompts: %s", {k: round(float(np.mean(v)), 3) for k, v in by_name.items()})
    return {"prompt_share": evaluation.prompt_share(found)}


def check_names(mini: MiniSDRuntime, judges: Judges, seed: int, per_name: int = 2) -> dict:
    """Named people against a gallery of 50 names, by the identity judge."""
    rng = np.random.default_rng(seed)
    looks = world.named_looks("person")
    names = [str(n) for n in rng.choice(list(looks), size=GALLERY, replace=False)]
    gallery = []
    for name in names:
        shots = [
            shot_of(looks[name], name, random_wish(rng), int(rng.integers(2**31))) for _ in range(6)
        ]
        gallery.append(evaluation.prototype(judges.identity_embeddings(pictures_of(shots))))
    gallery = torch.stack(gallery)
    captions = [caption_of(random_wish(rng), name) for name in names for _ in range(per_name)]
    scores = judges.identity_embeddings(mini.sample(captions, seed=seed)) @ gallery.T
    own = torch.arange(GALLERY).repeat_interleave(per_name)
    log.info("names: own cosine %.3f", scores[torch.arange(len(own)), own].mean())
    return {"named_top1": (scores.argmax(dim=-1) == own).float().mean().item()}


def check_locality(mini: MiniSDRuntime, seed: int, count: int = 64) -> dict:
    """Attention of class words, names and objects outside their region, over a uniform map's."""
    data = make_dataset(count, seed=10**6 + seed, cast=Cast(named=0.5, slot=0.0))
    conditions = mini.conditions_of_ids(data.ids)
    latents = mini.latents(data.pictures.movedim(1, -1).float() / 255)
    regions = word_regions(data, torch.arange(count), ("subject", "object"))
    words = ~regions[..., 0, 0].isnan()
    recorder = AttentionRecorder(mini.unet)
    alphas, generator = alphas_cumprod(), torch.Generator().manual_seed(seed)
    outside, uniform = [], []
    for timestep in LEAK_TIMESTEPS:
        noise = torch.randn(latents.shape, generator=generator)
        alpha = alphas[timestep]
        with torch.no_grad():
            mini.unet(
                alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
                torch.full((count,), timestep),
                **conditions,
                transformer_options=dict(recorder.options),
            )
        for attention in recorder.take():
            side = int(attention.shape[1] ** 0.5)
            if side not in (latents.shape[-1] // 2, latents.shape[-1] // 4):
                continue
            attention = attention / (1 - attention[..., :1])  # the start token left out
            region = F.adaptive_avg_pool2d(regions.nan_to_num(), side).flatten(2).transpose(1, 2)
            inside = (attention * region).sum(1) / attention.sum(1)
            outside.append((1 - inside)[words].mean())
            uniform.append((1 - region.mean(1))[words].mean())
    return {"word_leak_ratio": (torch.stack(outside).mean() / torch.stack(uniform).mean()).item()}


def nearest_training_identity(seed: int, count: int = 24) -> dict[str, float]:
    """Cosine of each benchmark identity's code with the nearest named one's: mean and maximum."""
    names = torch.stack([torch.from_numpy(x.code) for x in world.named_looks("person").values()])
    unseen = torch.stack([torch.from_numpy(world.unseen_look(seed + i).code) for i in range(count)])
    nearest = (F.normalize(unseen, dim=-1) @ F.normalize(names, dim=-1).T).amax(dim=-1)
    log.info("nearest named person: %s", [round(cosine, 3) for cosine in nearest.tolist()])
    return {"nearest_mean": nearest.mean().item(), "nearest_max": nearest.max().item()}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    seed = int(os.environ.get("SEED", "1"))
    mini, judges = MiniSDRuntime(chosen_family()), load_judges()
    figures = check_judges(mini, judges, seed)
    figures |= check_locality(mini, seed)
    figures |= check_prompts(mini, judges, seed)
    figures |= check_names(mini, judges, seed)
    figures |= nearest_training_identity(seed)
    bars = dict(BARS)
    if EDITION is not FIRST:
        figures |= check_crowds.check_crowds(mini, judges, seed)
        figures |= check_crowds.check_styles(mini, judges, seed)
        figures |= check_crowds.check_marks(judges, seed)
        bars |= check_crowds.BARS
    missed = [
        name
        for name, (bar, side) in bars.items()
        if (figures[name] < bar if side == "min" else figures[name] > bar)
    ]
    for name in missed:
        log.error("missed: %s is %.3f, the bar is %s", name, figures[name], bars[name][0])
    sys.stdout.write(json.dumps({k: round(v, 4) for k, v in figures.items()}) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
