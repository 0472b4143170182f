"""The small world the miniature Stable Diffusion knows: who exists, and what a picture shows.

A *person* (or robot) is a ``Look``: the features that make an identity. A *picture* is a
``Shot``: who is in it and where, doing what. ``Shot.caption`` is the sentence for it.
Nothing here draws or trains; ``render.py`` draws a shot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

HAIR_STYLES = ("short", "long", "bob", "curly", "bun", "spiky", "bald")
HAIR_COLOURS = ("black", "brown", "blond", "red", "grey", "blue")
EYE_COLOURS = ("brown", "blue", "green")
BEARDS = ("none", "full", "moustache")
GLASSES = ("none", "round", "square")
MOLES = ("none", "left", "right")
HEADS = ("box", "dome", "barrel")
BODY_COLOURS = ("steel", "gold", "teal", "pink", "lime")
ANTENNAS = ("none", "one", "two", "ears")
EYE_SHAPES = ("dots", "visor", "squares")

EXPRESSIONS = ("neutral", "smiling", "sad", "surprised")
OBJECTS = ("none", "basketball", "book", "cup", "balloon", "flower", "guitar")
SCENES = ("plain", "eiffel", "beach", "forest", "snow", "city", "desert", "space", "garage")
PLACES = ("anywhere", "left", "right")

SCENE_PHRASES = {
    "eiffel": "at the eiffel tower",
    "beach": "on the beach",
    "forest": "in the forest",
    "snow": "in the snow",
    "city": "in the city at night",
    "desert": "in the desert",
    "space": "in space",
    "garage": "in front of a garage",
}
# The word of a scene phrase that names the scene.
SCENE_WORDS = {
    "eiffel": "eiffel", "beach": "beach", "forest": "forest", "snow": "snow",
    "city": "city", "desert": "desert", "space": "space", "garage": "garage",
}  # fmt: skip
OPENINGS = ("a photo of", "a picture of", "a portrait of", "a photo of the face of", "")

_NAMES = (Path(__file__).parent / "names.txt").read_text().split()
ROBOT_NAMES = tuple(_NAMES[-48:])
PERSON_NAMES = tuple(_NAMES[:-48])
CLASS_WORDS = {"person": "person", "robot": "robot"}

# Sizes, proportions and tones lie in [-1, 1].
PERSON_MEASURES = (
    "skin", "face_width", "jaw", "eye_size", "eye_gap", "brow_weight", "brow_tilt",
    "nose_length", "mouth_width", "lip_red",
)  # fmt: skip
ROBOT_MEASURES = ("shade", "head_width", "eye_size", "eye_gap", "mouth_width")
PERSON_CHOICES = {
    "hair": HAIR_STYLES, "hair_colour": HAIR_COLOURS, "eye_colour": EYE_COLOURS,
    "beard": BEARDS, "glasses": GLASSES, "mole": MOLES,
}  # fmt: skip
ROBOT_CHOICES = {
    "head": HEADS, "colour": BODY_COLOURS, "antenna": ANTENNAS, "eyes": EYE_SHAPES,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What makes one individual: its class, measures in [-1, 1] and choices (indices)."""

    kind: str
    measures: tuple[float, ...]
    choices: tuple[int, ...]

    def measure(self, name: str) -> float:
        names = PERSON_MEASURES if self.kind == "person" else ROBOT_MEASURES
        return self.measures[names.index(name)]

    def choice(self, name: str) -> str:
        options = PERSON_CHOICES if self.kind == "person" else ROBOT_CHOICES
        return options[name][self.choices[list(options).index(name)]]

    @property
    def code(self) -> np.ndarray:
        """The identity as one vector: measures and centred one-hot choices, (IDENTITY_DIM,).

        People and robots use separate ranges of it, so that one linear map reads both.
        """
        parts = []
        for kind, measures, options in _KINDS:
            mine = kind == self.kind
            parts.append(np.array(self.measures if mine else [0.0] * len(measures)))
            for position, values in enumerate(options.values()):
                one_hot = np.zeros(len(values))
                if mine:
                    one_hot[self.choices[position]] = 1.0
                    one_hot -= 1.0 / len(values)
                parts.append(one_hot)
        return np.concatenate(parts).astype(np.float32)


_KINDS = (
    ("person", PERSON_MEASURES, PERSON_CHOICES),
    ("robot", ROBOT_MEASURES, ROBOT_CHOICES),
)
_TWINS_SHARE = ("skin", "hair", "hair_colour", "shade", "colour")
IDENTITY_DIM = sum(len(m) + sum(len(v) for v in c.values()) for _, m, c in _KINDS)


def random_look(rng: np.random.Generator, kind: str = "person") -> Look:
    """Draw an individual of a class (``"person"`` or ``"robot"``)."""
    _, measures, options = next(k for k in _KINDS if k[0] == kind)
    probabilities = {
        "beard": (0.6, 0.2, 0.2),
        "glasses": (0.56, 0.22, 0.22),
        "mole": (0.6, 0.2, 0.2),
    }
    return Look(
        kind,
        tuple(float(x) for x in rng.uniform(-1, 1, len(measures))),
        tuple(
            int(rng.choice(len(values), p=probabilities.get(name)))
            for name, values in options.items()
        ),
    )


def twin_look(look: Look, rng: np.random.Generator) -> Look:
    """Another individual with the same hair and skin (a robot: the same colour)."""
    _, names, options = next(k for k in _KINDS if k[0] == look.kind)
    other = random_look(rng, look.kind)
    measures = zip(names, look.measures, other.measures, strict=True)
    choices = zip(options, look.choices, other.choices, strict=True)
    return Look(
        look.kind,
        tuple(mine if name in _TWINS_SHARE else its for name, mine, its in measures),
        tuple(mine if name in _TWINS_SHARE else its for name, mine, its in choices),
    )


def named_looks(kind: str = "person") -> dict[str, Look]:
    """The individuals that the text encoder knows by name, in a fixed order."""
    rng = np.random.default_rng({"person": 20_001, "robot": 20_002}[kind])
    names = PERSON_NAMES if kind == "person" else ROBOT_NAMES
    return {name: random_look(rng, kind) for name in names}


def unseen_look(seed: int, kind: str = "person") -> Look:
    """An individual that training never draws: seeds of training are below 10**6, these above."""
    return random_look(np.random.default_rng(10**6 + seed), kind)


@dataclass(frozen=True)
class Actor:
    """One individual in a picture. ``word`` is how the caption calls it."""

    look: Look
    word: str
    expression: str = "neutral"
    eyes_closed: bool = False
    holds: str = "none"
    place: str = "anywhere"

    def phrases(self, rng: np.random.Generator | None) -> list[str]:
        """What the caption says of this actor, in random order when ``rng`` is given."""
        said = []
        if self.expression != "neutral":
            said.append(self.expression)
        if self.eyes_closed:
            said.append("with eyes closed")
        if self.holds != "none":
            said.append(f"holding a {self.holds}")
        if rng is not None:
            rng.shuffle(said)
        return said


@dataclass(frozen=True)
class Shot:
    """One picture: its actors (one or two), the scene, and the seed of everything unsaid."""

    actors: tuple[Actor, ...]
    scene: str = "plain"
    seed: int = 0

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The sentence for this picture; ``rng`` varies opening and order."""
        opening = (
            "a photo of" if rng is None else OPENINGS[rng.choice(5, p=(0.6, 0.1, 0.1, 0.1, 0.1))]
        )
        subjects = []
        for actor in self.actors:
            words = [actor.word if actor.word not in CLASS_WORDS else f"a {actor.word}"]
            if actor.place != "anywhere":
                words.append(f"on the {actor.place}")
            subjects.append(" ".join([words[0], *actor.phrases(rng), *words[1:]]))
        words = [opening, " and ".join(subjects)]
        if self.scene != "plain":
            words.append(SCENE_PHRASES[self.scene])
        return " ".join(word for word in words if word)


def random_shot(rng: np.random.Generator, cast, pairs: float = 0.10) -> Shot:
    """Draw a training picture. ``cast(rng, kind)`` gives ``(word, look)`` of one actor.

    ``pairs`` is the share of pictures with two actors.
    """
    kind = "robot" if rng.random() < 0.15 else "person"
    together = rng.random() < pairs
    places = ("left", "right") if together else (str(rng.choice(PLACES, p=(0.6, 0.2, 0.2))),)
    actors = []
    for place in places:
        word, look = cast(rng, kind)
        actors.append(
            Actor(
                look,
                word,
                expression=str(rng.choice(EXPRESSIONS, p=(0.34, 0.22, 0.22, 0.22))),
                eyes_closed=bool(rng.random() < 0.3),
                holds=str(rng.choice(OBJECTS, p=(0.4,) + (0.1,) * 6)),
                place=place,
            )
        )
    scene = str(rng.choice(SCENES, p=(0.2,) + (0.1,) * 8))
    return Shot(tuple(actors), scene, int(rng.integers(2**31)))


def solo(look: Look, word: str, seed: int = 0, scene: str = "plain", **doing) -> Shot:
    """A picture of one individual; ``doing`` are fields of ``Actor``."""
    return Shot((Actor(look, word, **doing),), scene, seed)
