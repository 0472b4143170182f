"""Several people in one picture: who they are, what is asked of them, and what comes of it.

A :class:`Crowd` is one, two or three people, drawn one way; :class:`Learning` is what has to be
done before, once for each person. Both are work for :func:`.jobs.run_all`. Pictures are kept as
strips, for the contact sheet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from PIL import Image
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.file import read_identity, to_bytes
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.mini_sd import wishes, world
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime
from sefi_ide.tools.comfyui import REPOSITORY

from .jobs import Figures, miniature
from .measures import BATCH, draw_captions, quality
from .methods import learn_identity
from .recognition import together, wish_of
from .subjects import Subject, noise_seeds

OUTPUT = REPOSITORY / "output" / "bench-people"
MODULES = ("crowds", "jobs", "measures", "methods", "recognition", "subjects")
"""Of this package, what figures depend on."""

CLASS_WORD = "person"
NAMES = ("anna", "ben", "carla")
ROWS = ("class_word", "plain", "given", "automatic", "named")
"""The class word for each; identities without regions, with half-picture masks, with regions that
the pack finds; people whom the miniature knows by name."""
FIRST_OF = {1: 0, 2: 0, 3: 500}
"""Number of the first person of those who are alone, in pairs and in triples: who is alone is also
the first of a pair."""
FIRST_NAME_OF = {2: 0, 3: 120}
NOISE = 33
SIDE = 128  # pixels
LEARNING = (
    "attention",
    "comfyui/clip",
    "comfyui/learning",
    "identity",
    "learning",
    "text",
    "families.py",
    "stages.py",
)
"""The parts of ``sefi_core`` that an identity depends on."""


@dataclass(frozen=True)
class Learning:
    """Learn the person ``number`` of ``seed`` from one photo, with the pack's defaults."""

    seed: int
    number: int

    @property
    def key(self) -> str:
        """A text that equal work shares."""
        return json.dumps({"learning": asdict(self)}, sort_keys=True)

    def run(self) -> Figures:
        """The size of the file; what is there already stays."""
        identity_of(self.seed, self.number)
        return {"bytes": float(identity_file(self.seed, self.number).stat().st_size)}


@dataclass(frozen=True)
class Crowd:
    """``count`` people, the ``number``th of so many, drawn as one of :data:`ROWS` says.

    Every row of a crowd has the same ``prompts`` and the same noise; "named" has other people.
    """

    row: str
    count: int
    number: int
    prompts: int
    seed: int = 1

    @property
    def key(self) -> str:
        """A text that equal work shares."""
        return json.dumps({"crowd": asdict(self)}, sort_keys=True)

    @property
    def strip(self) -> Path:
        """Its pictures side by side."""
        size = f"{self.seed}_{self.prompts}"
        return OUTPUT / "pictures" / f"{self.count}_{self.number}_{size}_{self.row}.png"

    @property
    def people(self) -> list[int]:
        """Their numbers, for :class:`Learning`; nobody's where nothing is learned."""
        if self.row in ("class_word", "named"):
            return []
        return _numbers(self.count, self.number)

    def run(self) -> Figures:
        """Draw and measure: :func:`.recognition.together`; alone :func:`.measures.quality`."""
        mini, judge = miniature("sd1")
        shots = asked(self)
        seeds = noise_seeds(NOISE + self.seed, 100 * self.count + self.number, len(shots))
        pictures = []
        for start in range(0, len(shots), BATCH):
            part = shots[start : start + BATCH]
            model, clip = self._applied(mini, part)
            captions = [shot.caption() for shot in part]
            pictures.append(
                draw_captions(mini, model, clip, captions, seeds[start : start + BATCH])
            )
        drawn = torch.cat(pictures)
        self.strip.parent.mkdir(parents=True, exist_ok=True)
        strip = (255 * torch.cat(list(drawn), dim=1)).round().byte()
        Image.fromarray(strip.numpy()).save(self.strip)
        if self.count == 1:
            asked_for = [wish_of(shot.actors[0], shot) for shot in shots]
            return quality(judge, drawn, asked_for, wishes.pictures_of(shots))
        return together(judge, drawn, shots, [look for _, look in cast_of(self)])

    def _applied(
        self, mini: MiniSDRuntime, shots: Sequence[world.Shot]
    ) -> tuple[ModelPatcher, CLIP]:
        """MODEL and CLIP that know everybody, for a batch of these pictures."""
        model, clip = mini.model, mini.clip
        for name, number in zip(NAMES, self.people, strict=False):
            identity = replace(identity_of(self.seed, number), name=name)
            applied = AppliedIdentity(identity)
            if self.row == "given":
                masks = torch.cat([mask_of(shot, f"<{name}>") for shot in shots])
                applied = replace(applied, region=masks)
            if self.row == "automatic":
                applied = replace(applied, regions="automatic")
            model, clip = apply_identity(model, clip, applied)
        return model, clip


def cast_of(crowd: Crowd) -> list[tuple[str, world.Look]]:
    """Each one's word in the prompt, and look."""
    if crowd.row == "named":
        known = world.named_looks(CLASS_WORD)
        names = [str(name) for name in np.random.default_rng(0).permutation(list(known))]
        first = FIRST_NAME_OF[crowd.count] + crowd.count * crowd.number
        chosen = [names[(first + n) % len(names)] for n in range(crowd.count)]
        return [(name, known[name]) for name in chosen]
    looks = [Subject(crowd.seed, n).look for n in _numbers(crowd.count, crowd.number)]
    words = [f"<{name}>" for name in NAMES]
    if crowd.row == "class_word":
        words = len(looks) * [CLASS_WORD]
    return list(zip(words, looks, strict=False))


def asked(crowd: Crowd) -> list[world.Shot]:
    """A shot for each prompt: a scene, and for each one something in the face or in the hand.

    Every other prompt of several people says where each is; in the rest they are named from left
    to right, as everywhere in the drawn world. Who is where changes.
    """
    rng = np.random.default_rng((crowd.seed, crowd.count, crowd.number))
    people = cast_of(crowd)
    shots = []
    for n in range(crowd.prompts):
        if crowd.count == 1:
            places = [("left", "middle", "right")[n % 3]]
        else:
            places = [str(place) for place in rng.permutation(world.CROWDS[crowd.count])]
        actors = []
        for (word, look), place in zip(people, places, strict=True):
            expression = str(rng.choice(world.EXPRESSIONS[1:]))
            holds = str(rng.choice(world.OBJECTS[1:]))
            doing = {"expression": expression} if rng.random() < 0.5 else {"holds": holds}
            actors.append(world.Actor(look, word, place=place, **doing))
        said = crowd.count == 1 or n % 2 == 0
        if not said:
            actors.sort(key=lambda actor: world.CROWDS[crowd.count].index(actor.place))
        scene = str(rng.choice(world.SCENES[1:]))
        shots.append(world.Shot(tuple(actors), scene, int(rng.integers(2**31)), places_said=said))
    return shots


def mask_of(shot: world.Shot, word: str) -> torch.Tensor:
    """Where the one called ``word`` is to be, as a user would paint it: a MASK (1, 128, 128).

    An equal share of the width for each of several; two thirds for somebody alone, who is larger.
    """
    place = next(actor.place for actor in shot.actors if actor.word == word)
    count = len(shot.actors)
    width = round(SIDE * 2 / 3) if count == 1 else SIDE / count
    room = SIDE - width
    left = {"left": 0.0, "middle": room / 2, "right": room}[place]
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., round(left) : round(left + width)] = 1
    return mask


# --- what is learned ----------------------------------------------------------------------------


def identity_of(seed: int, number: int) -> Identity:
    """The identity of a person, learned where its file is not there."""
    file = identity_file(seed, number)
    if not file.exists():
        mini, _ = miniature("sd1")
        identity = learn_identity(mini, "sefi", Subject(seed, number).photos(1), CLASS_WORD, {})
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(to_bytes(identity))
        partial.replace(file)
    return read_identity(file)


def identity_file(seed: int, number: int) -> Path:
    """Where a person's identity is kept, for a checkpoint and a way of learning."""
    return OUTPUT / "identities" / f"{seed}_{number}_{_learned_by()}.safetensors"


@cache
def _learned_by() -> str:
    """A digest of the checkpoint and of :data:`LEARNING`."""
    digest = hashlib.sha256(CHECKPOINTS["sd1"].read_bytes())
    for name in LEARNING:
        path = REPOSITORY / "sefi_core" / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _numbers(count: int, number: int) -> list[int]:
    first = FIRST_OF[count] + max(count, 2) * number
    return list(range(first, first + count))
