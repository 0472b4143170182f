"""``make bench-figures``: where each method's word looks, and what K, V and the stages decide.

Two pictures, in ``output/bench-figures``. ``attention.png`` has one column per method: a picture of
one prompt, and below it where the subject's word looked in it. ``keys_values.png`` draws one prompt
with parts of a learned identity, the class word's embedding in the place of the others: only K,
only V, only one stage; K and V also as learned without the attention loss. What those parts do is
measured over several people: the quality of the pictures, where the word looks (``leak``), and how
much they differ from the class word's, in layout (what is left of the difference after blurring)
and in detail (the rest). That is ``table.md``, and the last line as one JSON object. Learning rates
and steps are the published winners of the sweep, but for SeFi, which has the pack's defaults.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from . import miniature  # noqa: F401  (ComfyUI on the path)
from .comfyui import REPOSITORY
from .commit import measured_at
from .measures import LEAK_SEED, LEAK_TIMESTEPS, draw, leak, quality
from .methods import (
    IDENTITY_METHODS,
    METHODS,
    TITLES,
    Learned,
    learn,
    learn_identity,
    with_identity,
)
from .miniature import MiniSDRuntime, judges, wishes
from .plots import save_panels
from .quality import contenders
from .subjects import Subject, noise_seeds, prompts
from .sweep import published_winners

# isort: split
from sefi_ide.sefi_core.attention.heat_maps import heat_picture
from sefi_ide.sefi_core.comfyui.attention_maps import attention_maps
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.identity.identity import Identity

logger = logging.getLogger(__name__)

OUTPUT = REPOSITORY / "output" / "bench-figures"
KIND, SEED = "person", 1
WISH = {"scene": "eiffel", "object": "basketball", "eyes": "closed"}
PEOPLE, PROMPTS = 4, 10
BLUR = 16
"""Side in pixels of the squares that layout is compared in."""
STAGES = 5
NEITHER = "class word"
"""Title of an identity of which nothing is left; the others are compared with it."""
ROLES = ("K and V", "only K", "only V")
"""Parts that are also shown of an identity that was learned without the attention loss."""
FIGURES = ("id", "prompt", "id_p", "leak", "layout", "detail")


def attention_figure(mini: MiniSDRuntime) -> None:
    """``attention.png``: photo, then each method's picture above its word's attention."""
    photos = Subject(SEED, 0, KIND).photos(1)
    rows = contenders(published_winners(KIND))
    columns = {"training picture": [photos[0].picture]}
    ways = {"class word": Learned(mini.model, mini.clip, KIND)} | {
        TITLES[row]: learn(mini, row, photos, KIND, rows[row][1]) for row in METHODS
    }
    for title, learned in ways.items():
        picture = draw(mini, learned, [WISH], [SEED], KIND)
        prompt = wishes.caption_of(WISH, learned.word, KIND)
        with torch.no_grad():
            latent = {"samples": mini.vae.encode(picture)}
            asked = (learned.model, learned.clip, latent, prompt, [learned.word])
            heat = sum(attention_maps(*asked, t, SEED).together() for t in LEAK_TIMESTEPS)[0]
        columns[title] = [picture[0], heat_picture(heat / heat.max(), picture[0], "")[:128]]
    save_panels(columns, OUTPUT / "attention.png")


def parts_of(identity: Identity, class_word: Mapping[str, torch.Tensor]) -> Iterator:
    """(title, identity) with only a part of what was learned: nothing, then all, then parts.

    Stages come noisiest first. Nothing learned is not the prompt with the class word written out,
    which has an article more.
    """
    ((encoder, rows),) = class_word.items()
    plain = {encoder: rows.expand_as(identity.key_vectors[encoder])}
    yield NEITHER, replace(identity, key_vectors=plain, value_vectors=plain)
    yield "K and V", identity
    yield "only K", replace(identity, value_vectors=plain)
    yield "only V", replace(identity, key_vectors=plain)
    for stage in reversed(range(identity.stages)):
        kept = {}
        for role in ("key_vectors", "value_vectors"):
            vectors = plain[encoder].clone()
            vectors[stage] = getattr(identity, role)[encoder][stage]
            kept[role] = {encoder: vectors}
        number = identity.stages - stage
        yield f"stage {number} of {identity.stages}", replace(identity, **kept)


def keys_values_figure(mini: MiniSDRuntime) -> dict[str, dict[str, float]]:
    """``keys_values.png`` and its figures."""
    judge, asked = judges.load_judges(), prompts(SEED, PROMPTS)
    drawn = [*asked, WISH]
    word = class_word_embedding(mini.clip, KIND)
    rows: dict[str, list[dict[str, float]]] = {}
    columns: dict[str, list[torch.Tensor]] = {}
    for number in range(PEOPLE):
        subject = Subject(SEED, number, KIND)
        noise = [*noise_seeds(SEED, number, len(asked)), SEED]
        (leak_seed,) = noise_seeds(LEAK_SEED + SEED, number, 1)
        references = subject.renders(asked)
        parts = dict(parts_of(_learned(mini, subject, {}), word))
        without = IDENTITY_METHODS["sefi_no_attention_loss"]
        free = dict(parts_of(_learned(mini, subject, without), word))
        parts |= {f"{title} (no attention loss)": free[title] for title in ROLES}
        plain = None  # the first part's pictures, those of NEITHER
        for title, part in parts.items():
            learned = with_identity(mini, part)
            pictures = draw(mini, learned, drawn, noise, KIND)
            columns.setdefault(title, []).append(pictures[-1])
            plain = pictures[:-1] if plain is None else plain
            found = quality(judge, pictures[:-1], asked, references)
            found |= change(pictures[:-1], plain)
            found["leak"] = leak(mini, learned, subject.look, leak_seed)
            rows.setdefault(title, []).append(found)
        logger.info("%d of %d people", number + 1, PEOPLE)
    save_panels(columns, OUTPUT / "keys_values.png")
    return {
        title: {name: sum(row[name] for row in part) / len(part) for name in part[0]}
        for title, part in rows.items()
    }


def _learned(mini: MiniSDRuntime, subject: Subject, overrides: dict[str, float]) -> Identity:
    return learn_identity(mini, "sefi", subject.photos(1), KIND, {"stages": STAGES, **overrides})


def change(pictures: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """Root mean square difference of pictures (B, H, W, 3): of their blurred form, and the rest."""
    difference = (pictures - others).movedim(-1, 1)
    coarse = F.avg_pool2d(difference, BLUR)
    rest = difference - F.interpolate(coarse, scale_factor=BLUR)
    return {
        "layout": coarse.square().mean().sqrt().item(),
        "detail": rest.square().mean().sqrt().item(),
    }


def markdown(figures: Mapping[str, Mapping[str, float]]) -> str:
    """What the parts do as a table."""
    lines = ["| learned part | " + " | ".join(FIGURES) + " |", "|---" * (1 + len(FIGURES)) + "|"]
    lines += [
        f"| {title} | " + " | ".join(f"{row[name]:.3f}" for name in FIGURES) + " |"
        for title, row in figures.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Draw both."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    commit = measured_at()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    mini = MiniSDRuntime()
    attention_figure(mini)
    figures = keys_values_figure(mini)
    page = f"Means over {PEOPLE} people and {PROMPTS} prompts. {commit}\n\n{markdown(figures)}"
    (OUTPUT / "table.md").write_text(page, encoding="utf-8")
    sys.stdout.write(
        json.dumps({k: {n: round(v, 4) for n, v in row.items()} for k, row in figures.items()})
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
