"""Who is learned and what is asked of them: the subjects and prompts of the quality benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sefi_ide.sefi_core.learning.photos import Photo
from sefi_ide.tests.mini_sd import render, wishes, world

VALIDATION_SEED = 500
"""Of the subjects on which learning rate and steps are chosen; no benchmark run uses it."""


@dataclass(frozen=True)
class Subject:
    """A person or robot whom the miniature never saw; ``seed`` and ``number`` choose who."""

    seed: int
    number: int
    kind: str = "person"

    @property
    def look(self) -> world.Look:
        """What they look like."""
        return world.unseen_look(1000 * self.seed + self.number, self.kind)

    def photos(self, count: int) -> list[Photo]:
        """Training pictures (128, 128, 3) with the head as their mask, all of them different.

        Like a user's own photos they were taken somewhere, of someone in some mood who may have
        something at hand: what they show beside the subject is in no training prompt, and must
        not stick to the identity.
        """
        photos = []
        for n in range(count):
            seed = 1000 * self.seed + self.number + 37 * n
            rng = np.random.default_rng(2 * 10**6 + seed)
            wish = {
                name: str(rng.choice(wishes.PROMPTABLE[name]))
                for name in ("scene", "expression", "object")
            }
            shot = wishes.shot_of(self.look, self.kind, wish, seed)
            rendering = render.render(shot)
            picture = torch.from_numpy(rendering.picture.copy()).float() / 255
            mask = torch.from_numpy(rendering.regions[0]["head"].copy()).float() / 255
            photos.append(Photo(picture, mask))
        return photos

    def renders(self, asked: list[wishes.Wish]) -> torch.Tensor:
        """What pictures of the wishes should look like, (B, 128, 128, 3)."""
        return _renders(self.look, asked, 50_000 + 1000 * self.seed)


@dataclass(frozen=True)
class Named:
    """One of those whom the miniature knows by name."""

    name: str
    kind: str = "person"

    @property
    def look(self) -> world.Look:
        """What they look like."""
        return world.named_looks(self.kind)[self.name]

    def renders(self, asked: list[wishes.Wish]) -> torch.Tensor:
        """As :meth:`Subject.renders`."""
        return _renders(self.look, asked, 90_000)


def _renders(look: world.Look, asked: list[wishes.Wish], seed: int) -> torch.Tensor:
    shots = [wishes.shot_of(look, look.kind, wish, seed + n) for n, wish in enumerate(asked)]
    return wishes.pictures_of(shots)


def prompts(seed: int, count: int) -> list[wishes.Wish]:
    """``count`` wishes: three in five ask for one thing, the others for three at once.

    With 30, every scene, object, expression and closed eyes is asked for alone, and twelve
    mixtures come from the seed.
    """
    rng = np.random.default_rng(10**6 + seed)
    single = list(wishes.single_wishes())
    alone = min(len(single), round(0.6 * count))
    chosen = np.linspace(0, len(single) - 1, alone).round().astype(int)
    mixtures = [wishes.random_wish(rng, count=3) for _ in range(count - alone)]
    return [single[i] for i in chosen] + mixtures


def named(seed: int, number: int, kind: str = "person") -> Named:
    """One of the names; seeds next to each other have others, if each asks for 16 at most."""
    names = np.random.default_rng(0).permutation(list(world.named_looks(kind)))
    return Named(str(names[(16 * seed + number) % len(names)]), kind)


def noise_seeds(seed: int, number: int, count: int) -> list[int]:
    """The seeds of the noise that ``count`` pictures of a subject are drawn from, all different.

    The noise decides much of a picture. Were it the same for all subjects, a figure would tell how
    it suits a method, and the interval over subjects would not show it.
    """
    rng = np.random.default_rng((seed, number))
    return [int(drawn) for drawn in rng.integers(2**31, size=count)]
