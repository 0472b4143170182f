"""What ``check.py`` asks of a miniature of the second world: several people, styles, marks."""

from __future__ import annotations

import logging

import numpy as np
import torch

from ...sefi_core import evaluation
from . import world
from .editions import SECOND
from .judges import Judges
from .runtime import MiniSDRuntime
from .wishes import caption_of, pictures_of, shot_of

log = logging.getLogger("mini_sd")

BARS = {"pairs_both": (0.70, "min"), "style_found": (0.90, "min")}
GALLERY = 50
REFERENCES = 6


def crowd_of(
    looks: list[tuple[str, world.Look]], rng: np.random.Generator, said: bool = True
) -> world.Shot:
    """A picture of named people from left to right, somewhere, each in some mood."""
    actors = tuple(
        world.Actor(look, name, expression=str(rng.choice(world.EXPRESSIONS)), place=place)
        for (name, look), place in zip(looks, world.CROWDS[len(looks)], strict=True)
    )
    scene = str(rng.choice(world.SCENES))
    return world.Shot(actors, scene, int(rng.integers(2**31)), places_said=said)


def prototypes(
    judges: Judges,
    people: list[tuple[str, world.Look]],
    count: int,
    others: list[tuple[str, world.Look]],
    rng: np.random.Generator,
) -> torch.Tensor:
    """What the judge sees of each of ``people`` in drawn pictures with ``count`` actors, (M, D).

    Those beside them are some of ``others``.
    """
    parts = []
    for n in range(REFERENCES):
        at, shots = n % count, []
        for person in people:
            beside = [others[i] for i in rng.integers(len(others), size=count - 1)]
            shots.append(crowd_of([*beside[:at], person, *beside[at:]], rng))
        place = world.CROWDS[count][at]
        parts.append(judges.part_embeddings(pictures_of(shots), count, place))
    return torch.stack([evaluation.prototype(seen) for seen in torch.stack(parts, dim=1)])


def seen_at_places(judges: Judges, pictures: torch.Tensor, count: int) -> torch.Tensor:
    """The identity embeddings (N, count, D) of who is where in N pictures, from left to right."""
    return torch.stack(
        [judges.part_embeddings(pictures, count, place) for place in world.CROWDS[count]], dim=1
    )


def recognised(
    judges: Judges, pictures: torch.Tensor, gallery: torch.Tensor, people: torch.Tensor
) -> torch.Tensor:
    """Who of ``people`` (N, count), from left to right, is taken for themselves, (N, count)."""
    seen = seen_at_places(judges, pictures, people.shape[1])
    return (seen @ gallery.T).argmax(dim=-1) == people


def check_crowds(
    mini: MiniSDRuntime, judges: Judges, seed: int, pairs: int = 40, triples: int = 20
) -> dict[str, float]:
    """Named people together, each against a gallery of 50 names, by the identity judge.

    ``pairs_both`` and ``triples_all`` are the shares of pictures in which all are recognised where
    the prompt puts them; ``..._unplaced`` of prompts that name no places, by the order of the
    names; ``..._drawn`` of pictures that the world itself draws, the most that can be reached.
    """
    rng = np.random.default_rng(seed)
    looks = list(world.named_looks("person", SECOND).items())
    known = [looks[i] for i in rng.permutation(len(looks))[:GALLERY]]
    figures = {}
    for name, count, number in (("pairs_both", 2, pairs), ("triples_all", 3, triples)):
        gallery = prototypes(judges, known, count, known, rng)
        people = torch.from_numpy(
            np.stack([rng.permutation(GALLERY)[:count] for _ in range(number)])
        )
        for kind, said in (("", True), ("_unplaced", False)):
            shots = [crowd_of([known[i] for i in row], rng, said) for row in people.tolist()]
            drawn = mini.sample([shot.caption() for shot in shots], seed=seed + count)
            hits = recognised(judges, drawn, gallery, people).float()
            log.info("%s%s: by place %s", name, kind, [round(h, 3) for h in hits.mean(0).tolist()])
            figures[name + kind] = hits.all(dim=1).float().mean().item()
            if said:
                hits = recognised(judges, pictures_of(shots), gallery, people)
                figures[name + "_drawn"] = hits.all(dim=1).float().mean().item()
    return figures


def check_styles(
    mini: MiniSDRuntime, judges: Judges, seed: int, each: int = 12
) -> dict[str, float]:
    """Share of prompted styles found, half of them with a scene; and of drawn ones."""
    rng = np.random.default_rng(seed)
    wishes = [
        {"style": style, **({"scene": str(rng.choice(world.SCENES[1:]))} if n % 2 else {})}
        for style in SECOND.styles[1:]
        for n in range(each)
    ]
    asked = [{"style": wish["style"]} for wish in wishes]
    found = judges.found(mini.sample([caption_of(w, "person") for w in wishes], seed=seed), asked)
    for n, style in enumerate(SECOND.styles[1:]):
        share = float(np.mean([hits[0] for hits in found[n * each : (n + 1) * each]]))
        log.info("styles: %s %.3f", style, share)
    shots = [
        shot_of(world.unseen_look(seed + n, "person", SECOND), "person", wish, n)
        for n, wish in enumerate(wishes)
    ]
    drawn = judges.found(pictures_of(shots), asked)
    return {
        "style_found": evaluation.prompt_share(found),
        "style_drawn": evaluation.prompt_share(drawn),
    }


def check_marks(judges: Judges, seed: int, count: int = 100) -> dict[str, float]:
    """How often the judge tells someone from a double who differs by marks alone, in renders."""
    rng = np.random.default_rng(seed)
    sets: list[list[world.Shot]] = [[], [], []]
    for n in range(count):
        look = world.unseen_look(seed + 7000 + n, "person", SECOND)
        for shots, who in zip(sets, (look, look, world.double_look(look, rng)), strict=True):
            shots.append(shot_of(who, "person", {}, int(rng.integers(2**31))))
    a, same, other = (judges.identity_embeddings(pictures_of(shots)) for shots in sets)
    return {"marks_told": ((a * same).sum(-1) > (a * other).sum(-1)).float().mean().item()}
