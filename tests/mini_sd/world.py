"""The small world the miniature Stable Diffusion knows: who exists, and what a picture shows.

A *person* (or robot) is a ``Look``: the features that make an identity. A *picture* is a
``Shot``: who is in it and where, doing what. ``Shot.caption`` is the sentence for it.
Nothing here draws or trains; ``render.py`` draws a shot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .editions import EDITION, FIRST, SECOND, Edition

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
PLACES = EDITION.places
STYLES = EDITION.styles

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
STYLE_PHRASES = {
    "pencil": "as a pencil sketch",
    "oil": "as an oil painting",
    "mono": "in black and white",
    "pixel": "as pixel art",
}
# The words of a style's phrase that name it.
STYLE_WORDS = {"pencil", "sketch", "oil", "painting", "black", "white", "pixel", "art"}
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
# Small things by which one knows somebody, which no vector was taught to add up.
PERSON_MARKS = {
    "freckles": ("none", "nose", "cheeks", "left", "right"),
    "brows": ("even", "left", "right"),  # which one is raised; the other one hangs
    "scar": ("none", "left", "right", "nose"),
    "earrings": ("none", "rings", "studs", "drops"),
}
ROBOT_MARKS = {"badge": ("none", "cross", "stripe", "ring"), "bolts": ("none", "left", "right")}
MARK_DIM = sum(len(v) for marks in (PERSON_MARKS, ROBOT_MARKS) for v in marks.values())


@dataclass(frozen=True)
class Look:
    """What makes one individual: its class, measures in [-1, 1] and choices (indices).

    ``marks`` are indices too; in the first world nobody has any.
    """

    kind: str
    measures: tuple[float, ...]
    choices: tuple[int, ...]
    marks: tuple[int, ...] = ()

    def measure(self, name: str) -> float:
        names = PERSON_MEASURES if self.kind == "person" else ROBOT_MEASURES
        return self.measures[names.index(name)]

    def choice(self, name: str) -> str:
        options = PERSON_CHOICES if self.kind == "person" else ROBOT_CHOICES
        return options[name][self.choices[list(options).index(name)]]

    def mark(self, name: str) -> str:
        options = PERSON_MARKS if self.kind == "person" else ROBOT_MARKS
        return options[name][self.marks[list(options).index(name)] if self.marks else 0]

    @property
    def mark_code(self) -> np.ndarray:
        """The marks as centred one-hots, (MARK_DIM,); zeros for the other class's."""
        parts = []
        for kind, options in (("person", PERSON_MARKS), ("robot", ROBOT_MARKS)):
            for position, values in enumerate(options.values()):
                one_hot = np.zeros(len(values))
                if self.marks and kind == self.kind:
                    one_hot[self.marks[position]] = 1.0
                    one_hot -= 1.0 / len(values)
                parts.append(one_hot)
        return np.concatenate(parts).astype(np.float32)

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


def random_marks(rng: np.random.Generator, kind: str) -> tuple[int, ...]:
    """Draw someone's marks; half of all people lack any one of them."""
    options = PERSON_MARKS if kind == "person" else ROBOT_MARKS
    return tuple(
        0 if rng.random() < 0.5 else int(rng.integers(1, len(values)))
        for values in options.values()
    )


def random_look(rng: np.random.Generator, kind: str = "person", edition: Edition = EDITION) -> Look:
    """Draw an individual of a class (``"person"`` or ``"robot"``)."""
    _, measures, options = next(k for k in _KINDS if k[0] == kind)
    probabilities = {
        "beard": (0.6, 0.2, 0.2),
        "glasses": (0.56, 0.22, 0.22),
        "mole": (0.6, 0.2, 0.2),
    }
    look = Look(
        kind,
        tuple(float(x) for x in rng.uniform(-1, 1, len(measures))),
        tuple(
            int(rng.choice(len(values), p=probabilities.get(name)))
            for name, values in options.items()
        ),
    )
    return replace(look, marks=random_marks(rng, kind)) if edition.marked else look


def twin_look(look: Look, rng: np.random.Generator) -> Look:
    """Another individual with the same hair and skin (a robot: the same colour)."""
    _, names, options = next(k for k in _KINDS if k[0] == look.kind)
    other = random_look(rng, look.kind, SECOND if look.marks else FIRST)
    measures = zip(names, look.measures, other.measures, strict=True)
    choices = zip(options, look.choices, other.choices, strict=True)
    return Look(
        look.kind,
        tuple(mine if name in _TWINS_SHARE else its for name, mine, its in measures),
        tuple(mine if name in _TWINS_SHARE else its for name, mine, its in choices),
        other.marks,
    )


def double_look(look: Look, rng: np.random.Generator) -> Look:
    """Another individual whom only marks tell from this one."""
    other = look.marks
    while other == look.marks:
        other = random_marks(rng, look.kind)
    return replace(look, marks=other)


def named_looks(kind: str = "person", edition: Edition = EDITION) -> dict[str, Look]:
    """The individuals that the text encoder knows by name, in a fixed order.

    They look the same in both worlds, but for their marks.
    """
    seed = {"person": 20_001, "robot": 20_002}[kind]
    rng, marks_rng = np.random.default_rng(seed), np.random.default_rng(seed + 2)
    names = PERSON_NAMES if kind == "person" else ROBOT_NAMES
    looks = {name: random_look(rng, kind, FIRST) for name in names}
    if not edition.marked:
        return looks
    return {n: replace(look, marks=random_marks(marks_rng, kind)) for n, look in looks.items()}


def unseen_look(seed: int, kind: str = "person", edition: Edition = EDITION) -> Look:
    """An individual that training never draws: seeds of training are below 10**6, these above."""
    return random_look(np.random.default_rng(10**6 + seed), kind, edition)


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
    """One picture: its actors (one to three), the scene, and the seed of everything unsaid.

    ``places_said`` is whether the caption tells where everyone is; else the actors are named from
    left to right.
    """

    actors: tuple[Actor, ...]
    scene: str = "plain"
    seed: int = 0
    style: str = "photo"
    places_said: bool = True

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The sentence for this picture; ``rng`` varies opening and order."""
        opening = (
            "a photo of" if rng is None else OPENINGS[rng.choice(5, p=(0.6, 0.1, 0.1, 0.1, 0.1))]
        )
        subjects = []
        for actor in self.actors:
            words = [actor.word if actor.word not in CLASS_WORDS else f"a {actor.word}"]
            if actor.place != "anywhere" and self.places_said:
                words.append(f"{'in' if actor.place == 'middle' else 'on'} the {actor.place}")
            subjects.append(" ".join([words[0], *actor.phrases(rng), *words[1:]]))
        words = [opening, " and ".join(subjects)]
        if self.scene != "plain":
            words.append(SCENE_PHRASES[self.scene])
        if self.style != "photo":
            words.append(STYLE_PHRASES[self.style])
        return " ".join(word for word in words if word)


CROWDS = {2: ("left", "right"), 3: ("left", "middle", "right")}
"""Where two and three actors are, from left to right."""


def random_shot(
    rng: np.random.Generator,
    cast,
    shares: tuple[float, ...] | None = None,
    edition: Edition = EDITION,
) -> Shot:
    """Draw a training picture. ``cast(rng, kind)`` gives ``(word, look)`` of one actor.

    ``shares`` of pictures with one, two and three actors may differ from the edition's.
    """
    kind = "robot" if rng.random() < 0.15 else "person"
    shares = shares or edition.shares
    if edition is FIRST:
        together = rng.random() < 1 - shares[0]
        solo_place = (0.6, 0.2, 0.2)
        places = ("left", "right") if together else (str(rng.choice(edition.places, p=solo_place)),)
        actors = [_random_actor(rng, cast, kind, place) for place in places]
        return Shot(tuple(actors), _random_scene(rng), int(rng.integers(2**31)))
    count = 1 + int(rng.choice(len(shares), p=shares))
    said = bool(count == 1 or rng.random() < 0.7)
    if count == 1:
        places = (str(rng.choice(edition.places, p=(0.55, 0.15, 0.15, 0.15))),)
    else:
        places = tuple(str(p) for p in rng.permutation(CROWDS[count])) if said else CROWDS[count]
    actors = []
    for place in places:
        own = "robot" if rng.random() < 0.15 else "person"  # a robot beside a person
        actors.append(_random_actor(rng, cast, kind if count == 1 else own, place))
    style = str(rng.choice(edition.styles, p=(0.6, 0.1, 0.1, 0.1, 0.1)))
    return Shot(tuple(actors), _random_scene(rng), int(rng.integers(2**31)), style, said)


def _random_actor(rng, cast, kind: str, place: str) -> Actor:
    word, look = cast(rng, kind)
    return Actor(
        look,
        word,
        expression=str(rng.choice(EXPRESSIONS, p=(0.34, 0.22, 0.22, 0.22))),
        eyes_closed=bool(rng.random() < 0.3),
        holds=str(rng.choice(OBJECTS, p=(0.4,) + (0.1,) * 6)),
        place=place,
    )


def _random_scene(rng) -> str:
    return str(rng.choice(SCENES, p=(0.2,) + (0.1,) * 8))


def solo(look: Look, word: str, seed: int = 0, scene: str = "plain", **doing) -> Shot:
    """A picture of one individual; ``doing`` are fields of ``Actor``."""
    return Shot((Actor(look, word, **doing),), scene, seed)
