"""Who is recognised in pictures of several people, and what is found of their prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from sefi_ide.sefi_core import evaluation
from sefi_ide.tests.mini_sd import check_crowds, judges, wishes, world
from sefi_ide.tests.mini_sd.parts import part_of

from .jobs import Figures, miniature

GALLERY = 50
"""People among whom somebody is looked for."""


def wish_of(actor: world.Actor, shot: world.Shot) -> wishes.Wish:
    """What a judge should find where somebody is."""
    wish = {"scene": shot.scene, "expression": actor.expression, "object": actor.holds}
    return {name: value for name, value in wish.items() if value not in ("neutral", "none")}


def together(
    judge: judges.Judges,
    pictures: torch.Tensor,
    shots: Sequence[world.Shot],
    looks: Sequence[world.Look],
) -> Figures:
    """Who is recognised in N pictures of several people, and what is found of N prompts.

    Everybody is looked for among 50. ``all`` is the share of pictures in which everybody is
    recognised (``all_said`` and ``all_unsaid`` of those whose prompt says where each is, and of the
    others; no figure where there are none), ``each`` the share of people, ``id`` their mean
    similarity, ``prompt`` the share of things found where the person is who was to have them.
    Where no places are said everybody may be at any: the order in which they are the most alike.
    """
    count, places = len(looks), world.CROWDS[len(looks)]
    gallery = _gallery(judge, looks)
    scores = check_crowds.seen_at_places(judge, pictures, count) @ gallery.T
    recognised, alike, found = [], [], []
    for picture, row, shot in zip(pictures, scores, shots, strict=True):
        actors = [next(a for a in shot.actors if a.look == look) for look in looks]
        where = tuple(places.index(actor.place) for actor in actors)
        if not shot.places_said:
            where = max(
                itertools.permutations(range(count)),
                key=lambda order: sum(row[at, n].item() for n, at in enumerate(order)),
            )
        recognised.append([int(row[at].argmax()) == n for n, at in enumerate(where)])
        alike += [row[at, n].item() for n, at in enumerate(where)]
        for at, actor in zip(where, actors, strict=True):
            part = part_of(picture[None], count, places[at])
            found += judge.found(part, [wish_of(actor, shot)])
    everybody = np.array([all(row) for row in recognised])
    said = np.array([shot.places_said for shot in shots])
    figures = {
        "all": everybody.mean(),
        "each": np.mean(recognised),
        "id": np.mean(alike),
        "prompt": evaluation.prompt_share(found),
    }
    for name, chosen in (("all_said", said), ("all_unsaid", ~said)):
        if chosen.any():
            figures[name] = everybody[chosen].mean()
    return {name: float(figure) for name, figure in figures.items()}


def _gallery(judge: judges.Judges, looks: Sequence[world.Look]) -> torch.Tensor:
    """What the judge sees of these people and then of others, :data:`GALLERY` in all, (50, D)."""
    named, seen = _known(len(looks))
    people = [(look.kind, look) for look in looks]
    rng = np.random.default_rng(0)
    own = check_crowds.prototypes(judge, people, len(looks), named, rng)
    others = [row for (_, look), row in zip(named, seen, strict=True) if look not in looks]
    return torch.stack([*own, *others])[:GALLERY]


@cache
def _known(count: int) -> tuple[list[tuple[str, world.Look]], torch.Tensor]:
    """People with names, and what the judge sees of each of them in pictures of ``count``."""
    rng = np.random.default_rng(count)
    known = list(world.named_looks("person").items())
    some = [known[i] for i in rng.permutation(len(known))[:GALLERY]]
    return some, check_crowds.prototypes(miniature("sd1")[1], some, count, some, rng)
