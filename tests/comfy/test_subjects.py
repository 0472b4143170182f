"""Who is learned in the benchmarks, and what is asked for."""

from dataclasses import replace

import pytest
from sefi_ide.benchmarks import subjects
from sefi_ide.tests.mini_sd import render, wishes, world


def test_30_prompts_ask_for_every_attribute_alone_and_12_mixtures():
    asked = subjects.prompts(seed=4, count=30)
    alone = [tuple(wish.items())[0] for wish in asked if len(wish) == 1]
    assert len(asked) == 30 and len(set(alone)) == 18
    assert [len(wish) for wish in asked[18:]] == [3] * 12
    other = subjects.prompts(seed=5, count=30)
    assert other[:18] == asked[:18] and other[18:] != asked[18:]


def test_subjects_differ_from_seed_to_seed_and_from_photo_to_photo():
    looks = {subjects.Subject(seed, number).look for seed in (1, 500) for number in range(16)}
    assert len(looks) == 32
    first, second = subjects.Subject(1, 0).photos(2)
    assert not (first.picture == second.picture).all()
    assert 0.02 < first.mask.mean() < 0.5


@pytest.mark.parametrize("kind", ["person", "robot"])
def test_neighbouring_seeds_have_other_named_individuals(kind):
    names = {subjects.named(seed, number, kind) for seed in (1, 2) for number in range(16)}
    assert len(names) == 32


@pytest.mark.parametrize("antenna", ["one", "two", "ears"])
def test_a_robots_mask_holds_what_it_wears_on_its_head(antenna):
    """What the mask leaves out cannot be learned."""
    robot = world.unseen_look(3, "robot")
    place = list(world.ROBOT_CHOICES).index("antenna")

    def drawn(choice):
        choices = list(robot.choices)
        choices[place] = world.ANTENNAS.index(choice)
        look = replace(robot, choices=tuple(choices))
        return render.render(wishes.shot_of(look, "robot", {}, 3))

    with_it, without = drawn(antenna), drawn("none")
    worn = (with_it.picture != without.picture).any(axis=-1)
    assert worn.sum() > 20
    assert with_it.regions[0]["head"][worn].astype(bool).mean() > 0.95
