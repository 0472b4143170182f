"""Training pictures of the miniature world, their captions and what each word of them means.

Captions are token ids of ComfyUI's stock CLIP tokenizer. A person can be called by a name,
by the class word, or by a *slot*: a token whose embedding is computed from the person's look,
for people that have no name in the vocabulary (see ``text_encoder.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import render, world
from .editions import EDITION, FIRST, SECOND, Edition
from .parts import part_of

CONTEXT_LENGTH = 77
START, END = 49406, 49407
SLOT_WORDS = ("slot0", "slot1", "slot2")
SLOT_IDS = (49404, 49405, 49403)  # late merges of the vocabulary: no caption uses them
ACTORS = 3

# What a token is about: its own region of the picture, and its own class.
ROLES = ("none", "subject", "expression", "eyes", "object", "scene", "place", "style")
_EXPRESSION_WORDS = set(world.EXPRESSIONS[1:])
_OBJECT_WORDS = set(world.OBJECTS[1:])
_PLACE_WORDS = {"left", "right", "middle"}
_SCENE_WORDS = set(world.SCENE_WORDS.values())


@cache
def word_ids(word: str) -> tuple[int, ...]:
    """Token ids of one word, as the stock tokenizer splits it."""
    if word in SLOT_WORDS:
        return (SLOT_IDS[SLOT_WORDS.index(word)],)
    return tuple(_tokenizer()(word)["input_ids"][1:-1])


@lru_cache(maxsize=1)
def _tokenizer():
    from comfy.sd1_clip import SDTokenizer

    return SDTokenizer().tokenizer


@dataclass
class Captions:
    """Token ids (N, 77), the role of every token and the actor it belongs to (0, 1 or 2)."""

    ids: torch.Tensor
    roles: torch.Tensor
    actors: torch.Tensor


def encode_captions(captions: list[str], subjects: list[list[str]]) -> Captions:
    """Tokenise captions; ``subjects`` are the words by which each caption calls its actors."""
    ids = torch.full((len(captions), CONTEXT_LENGTH), END, dtype=torch.int32)
    roles = torch.zeros(ids.shape, dtype=torch.int8)
    actors = torch.zeros(ids.shape, dtype=torch.int8)
    for row, (caption, names) in enumerate(zip(captions, subjects, strict=True)):
        ids[row, 0] = START
        column, actor, met = 1, 0, 0
        for word in caption.split():
            role = "none"
            if met < len(names) and word == names[met]:
                role, actor, met = "subject", met, met + 1
            elif word in _EXPRESSION_WORDS:
                role = "expression"
            elif word == "closed":
                role = "eyes"
            elif word in _OBJECT_WORDS:
                role = "object"
            elif word in _SCENE_WORDS:
                role = "scene"
            elif word in _PLACE_WORDS:
                role = "place"
            elif word in world.STYLE_WORDS:
                role = "style"
            for token in word_ids(word):
                ids[row, column] = token
                roles[row, column] = ROLES.index(role)
                actors[row, column] = actor
                column += 1
    return Captions(ids, roles, actors)


@dataclass
class Dataset:
    """Pictures (N, 3, 128, 128) uint8 with everything that is known about them.

    ``looks`` (N, 3, IDENTITY_DIM), ``marks`` (N, 3, MARK_DIM) and ``kinds`` (N, 3) describe up to
    three actors, with kind -1 where there is none; ``said`` (N, 3, 4) are expression, eyes, object
    and place; ``scenes`` and ``styles`` (N,); ``regions`` (N, 3, 3, 16, 16) the share of each
    latent cell that is head, body and object of an actor, in [0, 255].
    """

    pictures: torch.Tensor
    looks: torch.Tensor
    marks: torch.Tensor
    kinds: torch.Tensor
    named: torch.Tensor
    said: torch.Tensor
    scenes: torch.Tensor
    styles: torch.Tensor
    regions: torch.Tensor
    ids: torch.Tensor
    roles: torch.Tensor
    actors: torch.Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def save(self, path: Path) -> None:
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> Dataset:
        return cls(**torch.load(path, weights_only=True, mmap=True))


class Cast:
    """Chooses who plays: named people, people of the class word, people in a slot."""

    def __init__(self, named: float = 0.45, slot: float = 0.33, edition: Edition = EDITION):
        self.named, self.slot, self.edition = named, slot, edition
        self.known = {
            kind: list(world.named_looks(kind, edition).items()) for kind in ("person", "robot")
        }
        self.slots = 0

    def __call__(self, rng: np.random.Generator, kind: str):
        draw = rng.random()
        if draw < self.named:
            return self.known[kind][rng.integers(len(self.known[kind]))]
        look = world.random_look(rng, kind, self.edition)
        if draw < self.named + self.slot:
            self.slots += 1
            return SLOT_WORDS[(self.slots - 1) % ACTORS], look
        return world.CLASS_WORDS[kind], look


def make_dataset(count: int, seed: int, cast: Cast | None = None) -> Dataset:
    """Draw ``count`` random shots. Seeds of training stay below 10**6."""
    rng = np.random.default_rng(seed)
    cast = cast or Cast()

    def shots():
        for _ in range(count):
            cast.slots = 0
            yield world.random_shot(rng, cast, edition=cast.edition)

    return _dataset(shots(), rng)


TWINS, SHOTS_EACH = 4, 4


def make_families(
    count: int, seed: int, edition: Edition = EDITION
) -> tuple[Dataset, torch.Tensor]:
    """Pictures of ``count`` families of ``TWINS`` individuals that share hair and skin.

    In the second world the last one shares all but the marks with the first, and half of the
    pictures are cut out of ones with two or three actors. Returns the pictures, ``SHOTS_EACH`` of
    every individual one after the other, and who is in each, (N,).
    """
    rng = np.random.default_rng(seed)

    def shots():
        for _ in range(count):
            kind = "robot" if rng.random() < 0.15 else "person"
            first = world.random_look(rng, kind, edition)
            family = [first, *(world.twin_look(first, rng) for _ in range(TWINS - 1))]
            if edition is not FIRST:
                family[-1] = world.double_look(first, rng)
            for look in family:
                for _ in range(SHOTS_EACH):
                    yield _shot_with(look, rng, edition)

    people = torch.arange(count * TWINS).repeat_interleave(SHOTS_EACH)
    return _dataset(shots(), rng, parts=edition is not FIRST), people


def _shot_with(look: world.Look, rng: np.random.Generator, edition: Edition) -> world.Shot:
    """A picture whose first actor looks so; anyone may be beside them."""
    waiting = [look]

    def cast(rng, kind):
        who = waiting.pop() if waiting else world.random_look(rng, kind, edition)
        return who.kind, who

    return world.random_shot(rng, cast, _FAMILY_SHARES[edition.number], edition)


_FAMILY_SHARES = {1: (1.0, 0.0, 0.0), 2: (0.5, 0.3, 0.2)}


def _part(shot: world.Shot, picture: np.ndarray) -> np.ndarray:
    """The first actor's part of a picture (3, 128, 128) uint8."""
    tensor = torch.from_numpy(picture.copy()).movedim(0, -1)[None].float() / 255
    part = part_of(tensor, len(shot.actors), shot.actors[0].place)
    return (255 * part[0]).round().byte().movedim(-1, 0).numpy()


def _dataset(shots: Iterable[world.Shot], rng: np.random.Generator, parts: bool = False) -> Dataset:
    """Everything about the shots; with ``parts`` only the first actor's part of each is shown."""
    columns: dict[str, list] = {f.name: [] for f in fields(Dataset)}
    captions, subjects = [], []
    for shot in shots:
        _describe(shot, rng, columns, captions, subjects)
        if parts:
            columns["pictures"][-1] = _part(shot, columns["pictures"][-1])
    encoded = encode_captions(captions, subjects)
    columns.update(ids=encoded.ids, roles=encoded.roles, actors=encoded.actors)
    return Dataset(
        **{
            k: torch.from_numpy(np.stack(v)) if isinstance(v, list) else v
            for k, v in columns.items()
        }
    )


def _describe(shot: world.Shot, rng, columns, captions, subjects) -> None:
    rendering = render.render(shot)
    looks = np.zeros((ACTORS, world.IDENTITY_DIM), np.float32)
    marks = np.zeros((ACTORS, world.MARK_DIM), np.float32)
    kinds, named = np.full(ACTORS, -1, np.int64), np.zeros(ACTORS, np.int64)
    said = np.zeros((ACTORS, 4), np.int64)
    regions = np.zeros((ACTORS, 3, 16, 16), np.uint8)
    for i, actor in enumerate(shot.actors):
        looks[i], marks[i] = actor.look.code, actor.look.mark_code
        kinds[i] = ("person", "robot").index(actor.look.kind)
        named[i] = actor.word not in world.CLASS_WORDS
        said[i] = (
            world.EXPRESSIONS.index(actor.expression),
            int(actor.eyes_closed),
            world.OBJECTS.index(actor.holds),
            SECOND.places.index(actor.place) if shot.places_said else 0,
        )
        for j, name in enumerate(render.REGIONS):
            mask = torch.from_numpy(rendering.regions[i][name].astype(np.float32))
            regions[i, j] = F.avg_pool2d(mask[None, None], 8)[0, 0].round().numpy()
    for name, value in (
        ("pictures", rendering.picture.transpose(2, 0, 1)), ("looks", looks), ("marks", marks),
        ("kinds", kinds),
        ("named", named), ("said", said), ("scenes", np.int64(world.SCENES.index(shot.scene))),
        ("styles", np.int64(SECOND.styles.index(shot.style))),
        ("regions", regions),
    ):  # fmt: skip
        columns[name].append(value)
    captions.append(shot.caption(rng))
    subjects.append([actor.word for actor in shot.actors])
