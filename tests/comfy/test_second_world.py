"""Training pictures of both drawn worlds, and what is trained in the second one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sefi_ide.tests.mini_sd import check_crowds, dataset, judges, world
from sefi_ide.tests.mini_sd.editions import EDITION, FIRST, SECOND
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime


def digest(data):
    """Of what the first world's pictures were described by, for two actors."""
    sha = hashlib.sha256()
    for name in ("pictures", "looks", "kinds", "named", "said", "scenes", "regions", "ids",
                 "roles", "actors"):  # fmt: skip
        column = getattr(data, name)
        if name in ("looks", "kinds", "named", "said", "regions"):
            assert (column[:, 2:] == (-1 if name == "kinds" else 0)).all()
            column = column[:, :2]
        sha.update(column.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def test_training_pictures_of_the_first_world_are_as_before_there_was_a_second():
    cast = dataset.Cast(edition=FIRST)
    assert digest(dataset.make_dataset(40, seed=7, cast=cast)) == "493915ad739a793d"
    assert digest(dataset.make_families(2, seed=7, edition=FIRST)[0]) == "41926691ebe14b7b"


def test_no_caption_has_the_tokens_of_slots():
    words = {*world.PERSON_NAMES, *world.ROBOT_NAMES, *world.CLASS_WORDS.values()}
    cast = dataset.Cast(slot=0.0, edition=SECOND)
    data = dataset.make_dataset(60, seed=8, cast=cast)
    used = set(data.ids.unique().tolist()) | {i for word in words for i in dataset.word_ids(word)}
    assert not used & set(dataset.SLOT_IDS)
    assert len(set(dataset.SLOT_IDS)) == dataset.ACTORS == len(dataset.SLOT_WORDS)


def test_words_of_places_and_styles_have_their_roles():
    captions = (
        "a photo of anna in the middle and ben on the left in the city at night as an oil painting",
        "a photo of anna in black and white",
    )
    encoded = dataset.encode_captions(list(captions), [["anna", "ben"], ["anna"]])
    for row, (place, style) in enumerate(
        [({"middle", "left"}, {"oil", "painting"}), (set(), {"black", "white"})]
    ):
        for role, words in (("place", place), ("style", style)):
            chosen = encoded.roles[row] == dataset.ROLES.index(role)
            ids = {i for word in words for i in dataset.word_ids(word)}
            assert set(encoded.ids[row][chosen].tolist()) == ids
    assert encoded.actors[0][encoded.roles[0] == dataset.ROLES.index("place")].tolist() == [0, 1]


def test_families_of_the_second_world_have_a_double_and_everybody_as_a_part():
    data, people = dataset.make_families(3, seed=9, edition=SECOND)
    looks, marks = data.looks[:, 0], data.marks[:, 0]
    for person in people.unique():
        mine = people == person
        assert (looks[mine] == looks[mine][0]).all() and (marks[mine] == marks[mine][0]).all()
    for family in range(3):
        first, last = dataset.TWINS * family, dataset.TWINS * family + dataset.TWINS - 1
        one, other = (int((people == person).nonzero()[0]) for person in (first, last))
        assert (looks[one] == looks[other]).all() and (marks[one] != marks[other]).any()
    alone = (data.kinds[:, 1] == -1).float().mean()
    assert 0.3 < alone < 0.7


in_the_second_world = pytest.mark.skipif(
    EDITION is FIRST, reason="runs in a process of the second world, see below"
)


@in_the_second_world
def test_a_step_of_the_judges_reaches_styles_and_marks():
    torch.manual_seed(0)
    data, people = dataset.make_families(2, seed=3)
    net = judges.grown_judges()
    loss = judges.judge_step(net, data, torch.arange(len(data)), people, lambda pictures: pictures)
    loss.backward()
    last = net[-1].weight.grad
    assert last is not None and (last.abs().amax(dim=1) > 0).all()
    assert len(last) == judges.EMBEDDING_DIM + world.IDENTITY_DIM + world.MARK_DIM + sum(
        len(values) for values in judges.ATTRIBUTES.values()
    )  # fmt: skip
    assert judges.ATTRIBUTES["style"] == SECOND.styles


@in_the_second_world
def test_the_miniature_knows_styles_and_people_together():
    mini, judge = MiniSDRuntime("sd1"), judges.load_judges()
    styles = check_crowds.check_styles(mini, judge, seed=5, each=3)
    assert styles["style_found"] >= 0.75 and styles["style_drawn"] >= 0.9
    pairs = check_crowds.check_crowds(mini, judge, seed=5, pairs=12, triples=1)
    assert pairs["pairs_both"] >= 0.25 and pairs["pairs_both_drawn"] >= 0.75  # by chance 0.0004


@pytest.mark.skipif(EDITION is not FIRST, reason="runs the second world's")
def test_all_of_the_second_world():
    """World and sizes are of a process: the same training steps there, and its miniature."""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--variants=all",
         "-k", "a_step_ or the_miniature_knows",
         here.with_name("test_miniatures.py"), here],
        env={**os.environ, "WORLD": "2"}, capture_output=True, text=True, cwd=here.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout
