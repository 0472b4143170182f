"""The drawn world: the present one stays as the shipped checkpoints know it, the next one is told
apart by its marks, styles and places."""

import hashlib
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from sefi_ide.tests.mini_sd import render, wishes, world
from sefi_ide.tests.mini_sd.editions import FIRST, SECOND
from sefi_ide.tests.mini_sd.parts import part_of

LOOKS = [world.unseen_look(n, kind, SECOND) for n, kind in ((4, "person"), (1, "robot"))]


def digest(shots):
    """Of captions, pictures and masks."""
    sha = hashlib.sha256()
    for shot in shots:
        drawn = render.render(shot)
        sha.update(shot.caption().encode())
        sha.update(drawn.picture.tobytes())
        for masks in drawn.regions:
            for name in render.REGIONS:
                sha.update(masks[name].tobytes())
    return sha.hexdigest()[:16]


def cast_of(edition):
    def cast(rng, kind):
        names = list(world.named_looks(kind, edition).items())
        known = rng.random() < 0.5
        return (
            names[rng.integers(len(names))]
            if known
            else (kind, world.random_look(rng, kind, edition))
        )

    return cast


@pytest.mark.parametrize(
    ("seed", "drawn", "wished"),
    [
        (0, "b7feaca298f9708c", "7a55155db35b5680"),
        (1, "409e6e34454782a7", "f310b5c8eb65920e"),
        (2, "69e9d9c48c3ebc2b", "67303e6aa6169ccd"),
    ],
)
def test_the_first_world_is_drawn_as_before_there_was_a_second(seed, drawn, wished):
    """The hashes are of the code that the shipped checkpoints were trained with."""
    rng, cast = np.random.default_rng(seed), cast_of(FIRST)
    assert digest([world.random_shot(rng, cast, edition=FIRST) for _ in range(24)]) == drawn
    assert digest(
        [
            wishes.shot_of(
                world.unseen_look(24 * seed + n, "robot" if n % 4 == 3 else "person", FIRST),
                "x",
                wishes.random_wish(rng),
                seed + n,
            )
            for n in range(24)
        ]
    ) == wished  # fmt: skip


@pytest.mark.parametrize("kind", ["person", "robot"])
def test_named_and_unseen_people_keep_their_looks_in_the_second_world(kind):
    for first, second in (
        (world.named_looks(kind, FIRST), world.named_looks(kind, SECOND)),
        ({1: world.unseen_look(1, kind, FIRST)}, {1: world.unseen_look(1, kind, SECOND)}),
    ):
        assert not any(look.marks for look in first.values())
        assert first == {name: replace(look, marks=()) for name, look in second.items()}
        assert any(any(look.marks) for look in second.values())


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.kind)
def test_every_mark_is_seen_and_changes_nothing_beside_the_head(look):
    options = world.PERSON_MARKS if look.kind == "person" else world.ROBOT_MARKS
    bare = replace(look, marks=(0,) * len(options))
    plain = render.render(world.solo(bare, look.kind))
    near = np.zeros((128, 128), bool)
    near[8:100, 20:108] = True
    for position, values in enumerate(options.values()):
        pictures = [plain.picture]
        for index in range(1, len(values)):
            marks = list(bare.marks)
            marks[position] = index
            marked = render.render(world.solo(replace(bare, marks=tuple(marks)), look.kind))
            assert (marked.picture == plain.picture)[~near].all()
            pictures.append(marked.picture)
        for one, other in combinations(pictures, 2):
            assert (np.abs(one.astype(int) - other).max(axis=-1) > 25).sum() >= 6


def test_a_double_differs_by_marks_alone():
    other = world.double_look(LOOKS[0], np.random.default_rng(0))
    assert other.marks != LOOKS[0].marks and (other.code == LOOKS[0].code).all()


@pytest.mark.parametrize("style", SECOND.styles[1:])
def test_a_style_is_said_and_drawn_and_leaves_the_face_to_be_seen(style):
    """Someone in a style is still nearer to themselves than to someone else in it."""
    shot = world.solo(LOOKS[0], "person", seed=3, scene="beach")
    styled, drawn = replace(shot, style=style), render.render(shot)
    assert styled.caption() == f"{shot.caption()} {world.STYLE_PHRASES[style]}"
    again = render.render(styled)
    assert all((a["head"] == b["head"]).all() for a, b in zip(drawn.regions, again.regions))  # noqa: B905
    assert np.abs(drawn.picture.astype(int) - again.picture).mean() > 8

    def edges(picture):
        grey = picture.mean(axis=-1)
        rows, columns = np.nonzero(drawn.regions[0]["head"])
        face = grey[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        flat = np.hypot(*np.gradient(face)).ravel()
        return (flat - flat.mean()) / flat.std()

    other = replace(shot.actors[0], look=world.unseen_look(9, "person", SECOND))
    stranger = render.render(replace(shot, actors=(other,)))
    mine, theirs = edges(drawn.picture), edges(stranger.picture)
    assert (edges(again.picture) * mine).mean() > (edges(again.picture) * theirs).mean() + 0.1


@pytest.mark.parametrize("count", [2, 3])
def test_people_of_a_crowd_are_where_the_caption_says(count):
    rng, shares = np.random.default_rng(count), tuple(float(n == count) for n in (1, 2, 3))
    orders = set()
    for _ in range(24):
        shot = world.random_shot(rng, cast_of(SECOND), shares, SECOND)
        places = [actor.place for actor in shot.actors]
        assert sorted(places) == sorted(world.CROWDS[count])
        orders.add(tuple(places))
        middles = [np.nonzero(r["head"])[1].mean() for r in render.render(shot).regions]
        order = [places[n] for n in np.argsort(middles)]
        assert order == list(world.CROWDS[count])
        for place in places:
            said = f"in the {place}" if place == "middle" else f"on the {place}"
            assert (said in shot.caption()) == shot.places_said
        assert shot.places_said or places == order
    assert len(orders) > 1


@pytest.mark.parametrize(("count", "place"), [(2, "left"), (2, "right"), (3, "left"),
                                             (3, "middle"), (3, "right")])  # fmt: skip
def test_a_part_holds_one_head_whole_and_nearly_nothing_of_others(count, place):
    rng, shares = np.random.default_rng(9), tuple(float(n == count) for n in (1, 2, 3))
    shot = world.random_shot(rng, cast_of(SECOND), shares, SECOND)
    for actor, masks in zip(shot.actors, render.render(shot).regions, strict=True):
        head = torch.from_numpy(masks["head"].copy()).float()[None, ..., None] / 255
        # The part is shown larger, and is grey (0.5) at its sides.
        grown = (128 / {2: 128, 3: 100}[count]) ** 2
        empty = part_of(torch.zeros_like(head), count, place)
        share = (part_of(head, count, place) - empty).sum() / (grown * head.sum())
        assert share > 0.97 if actor.place == place else share < 0.1
    alone = torch.rand(1, 128, 128, 3)
    assert part_of(alone, 1, "anywhere") is alone
