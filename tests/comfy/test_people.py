"""The benchmark of several people: its bars can be missed, and it measures what it says."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sefi_ide.benchmarks import crowds, jobs, people, recognition
from sefi_ide.tests.comfy.made_identity import make_identity
from sefi_ide.tests.mini_sd import check_crowds, world
from sefi_ide.tests.mini_sd.architecture import SD1
from sefi_ide.tests.mini_sd.editions import SECOND

PROMPT = {"prompt": 0.9}
GOOD = {
    "pairs": {
        "class_word": {"all": 0.0, **PROMPT},
        "plain": {"all": 0.2, **PROMPT},
        "given": {"all": 0.7, **PROMPT},
        "automatic": {"all": 0.6, **PROMPT},
        "named": {"all": 0.8, **PROMPT},
    },
    "triples": {
        "class_word": {"all": 0.0, **PROMPT},
        "plain": {"all": 0.1, **PROMPT},
        "given": {"all": 0.5, **PROMPT},
        "automatic": {"all": 0.4, **PROMPT},
        "named": {"all": 0.6, **PROMPT},
    },
    "alone": {row: {"id": 0.8, "id_p": 0.7, **PROMPT} for row in people.ALONE},
}


def rows_of(figures, spread=0.05):
    """Figures of three crowds around these."""
    return {
        group: {
            row: [
                {"id": 0.5, "each": 0.5, **cells, **shifted(cells, shift)}
                for shift in (-spread, 0.0, spread)
            ]
            for row, cells in rows.items()
        }
        for group, rows in figures.items()
    }


def shifted(cells, shift):
    return {name: value + shift for name, value in cells.items() if name in ("all", "id_p")}


def changed(*changes):
    """:data:`GOOD` with (group, row, figure, value) in their places."""
    figures = {group: {row: {**cells} for row, cells in rows.items()}
               for group, rows in GOOD.items()}  # fmt: skip
    for group, row, figure, value in changes:
        figures[group][row][figure] = value
    return figures


def test_good_figures_miss_no_bar():
    assert people.missed(rows_of(GOOD)) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ([("pairs", "given", "all", 0.63)], "0.630 with regions given.*0.640, 0.8 of"),
        ([("pairs", "automatic", "all", 0.51)], "0.510 with regions found.*0.520, 0.65 of"),
        ([("pairs", "plain", "all", 0.32)], "0.600 with regions found.*0.640, twice"),
        (
            [("pairs", "plain", "all", 0.5), ("pairs", "automatic", "all", 0.64)],
            "0.640 with regions found.*0.650, the middle",
        ),
        ([("pairs", "given", "prompt", 0.84)], "prompt of two with regions given is 0.840"),
        ([("triples", "automatic", "all", 0.1)], "all of three.*0.100 with regions found"),
        ([("pairs", "named", "all", 0.49)], "0.490 only"),
        ([("alone", "given", "id_p", 0.67)], "alone has an ID.P. of 0.670 with a region"),
    ],
)
def test_each_bar_can_be_missed(changes, complaint):
    (line,) = people.missed(rows_of(changed(*changes)))
    assert re.search(complaint, line), line


def test_where_plain_prompting_is_good_the_middle_is_the_bar_and_not_twice_as_much():
    good = changed(("pairs", "plain", "all", 0.5), ("pairs", "automatic", "all", 0.66))
    assert people.missed(rows_of(good)) == []


@pytest.mark.parametrize(
    ("figures", "code"), [(GOOD, 0), (changed(("pairs", "given", "all", 0.3)), 1)]
)
def test_the_exit_code_and_the_last_line_tell_the_result(
    figures, code, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(people, "EDITION", SECOND)
    monkeypatch.setattr(people, "OUTPUT", tmp_path)
    monkeypatch.setattr(people, "benchmark", lambda *a: asked.append(a) or rows_of(figures))
    monkeypatch.setattr(people, "sheet", lambda *_: Image.new("RGB", (2, 2)))
    for name, value in (("PAIRS", "3"), ("TRIPLES", "2"), ("PROMPTS", ""), ("SEED", "")):
        monkeypatch.setenv(name, value)
    assert people.main() == code
    assert asked == [(3, 2, 10, 1)]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["pairs"]["named"]["all"] == pytest.approx([0.8, 0.75, 0.85], abs=0.02)
    assert "id_p" in last["alone"]["given"] and "id_p" not in last["pairs"]["given"]
    assert json.loads((tmp_path / "results.json").read_text()).keys() == GOOD.keys()
    table = (tmp_path / "table.md").read_text()
    assert "3 pairs, 2 triples" in table and "| known by name (ceiling) | 0.800 [" in table
    assert (tmp_path / "pairs.png").exists()


def test_the_first_world_is_refused():
    with pytest.raises(SystemExit, match="WORLD=2"):
        people.main()


def test_rows_differ_in_who_is_drawn_and_how_and_in_nothing_else():
    shots = {row: crowds.asked(crowds.Crowd(row, 3, 4, 6)) for row in crowds.ROWS}
    told = {
        row: [
            (shot.scene, shot.seed, shot.places_said)
            + tuple((a.place, a.expression, a.holds) for a in shot.actors)
            for shot in shown
        ]
        for row, shown in shots.items()
    }
    assert all(one == told["plain"] for one in told.values())
    words = {row: {a.word for shot in shown for a in shot.actors} for row, shown in shots.items()}
    assert words["plain"] == words["given"] == {"<anna>", "<ben>", "<carla>"}
    assert words["class_word"] == {"person"}
    assert words["named"] <= set(world.PERSON_NAMES) and len(words["named"]) == 3


def test_everybody_in_every_crowd_is_another():
    wanted = {
        count: [n for k in range(size) for n in crowds.Crowd("plain", count, k, 1).people]
        for count, size in ((2, 24), (3, 8), (1, 24))
    }
    assert len({*wanted[2], *wanted[3]}) == 72 and set(wanted[1]) <= set(wanted[2])
    assert [len(rows) for rows in wanted.values()] == [48, 24, 24]
    names = [
        name
        for count, size in ((2, 24), (3, 8))
        for k in range(size)
        for name, _ in crowds.cast_of(crowds.Crowd("named", count, k, 1))
    ]
    assert len(set(names)) == 72
    assert crowds.Crowd("named", 2, 0, 1).people == []


def test_half_of_the_prompts_say_where_each_is_and_masks_are_there():
    shots = crowds.asked(crowds.Crowd("given", 2, 0, 10))
    assert [shot.places_said for shot in shots] == 5 * [True, False]
    orders = {tuple(actor.word for actor in shot.actors) for shot in shots if not shot.places_said}
    assert orders == {("<anna>", "<ben>"), ("<ben>", "<anna>")}
    for shot in shots:
        places = [actor.place for actor in shot.actors]
        assert ("on the left" in shot.caption()) == shot.places_said
        assert shot.places_said or places == ["left", "right"]
        left, right = (
            crowds.mask_of(shot, actor.word)
            for actor in sorted(shot.actors, key=lambda actor: actor.place)
        )
        assert left[..., :64].all() and not left[..., 64:].any()
        assert torch.equal(left + right, torch.ones(1, 128, 128))


@pytest.mark.parametrize(("count", "covered"), [(1, 85), (3, 43)])
def test_masks_of_one_and_of_three(count, covered):
    for shot in crowds.asked(crowds.Crowd("given", count, 0, 3)):
        masks = {actor.place: crowds.mask_of(shot, actor.word)[0] for actor in shot.actors}
        for place, mask in masks.items():
            columns = mask.all(dim=0).nonzero()
            assert len(columns) == pytest.approx(covered, abs=1)
            middle = columns.float().mean().item()
            edge = 64 - len(columns) / 2
            wanted = {"left": 64 - edge, "middle": 64, "right": 64 + edge}[place]
            assert middle == pytest.approx(wanted, abs=1)


class Seer:
    """A judge of pictures whose brightness, from 0 to 9 at a place, is who is there."""

    def part_embeddings(self, pictures, count, place):
        column = {"left": 5, "middle": 64, "right": 120}[place]
        who = (10 * pictures[:, 0, column, 0]).round().long()
        return torch.eye(12)[who]

    def found(self, pictures, prompted):
        return [[name == "scene" for name in wish] for wish in prompted]


def picture(*who):
    columns = [n / 10 for n in who for _ in range(128 // len(who))]
    return torch.tensor(columns)[None, :, None].expand(128, -1, 3)


@pytest.fixture
def two(monkeypatch):
    """Two people and their shots: places said, then not said."""
    monkeypatch.setattr(recognition, "_gallery", lambda judge, looks: torch.eye(12))
    people = crowds.cast_of(crowds.Crowd("plain", 2, 0, 1))
    actors = tuple(
        world.Actor(look, word, expression="sad", place=place)
        for (word, look), place in zip(people, ("left", "right"), strict=True)
    )
    return SimpleNamespace(
        shots=[world.Shot(actors, "city", places_said=said) for said in (True, False)],
        looks=[look for _, look in people],
    )


@pytest.mark.parametrize(
    ("drawn", "figures"),
    [
        ((0, 1), {"all_said": 1, "all_unsaid": 1, "each": 1, "id": 1}),
        ((1, 0), {"all_said": 0, "all_unsaid": 1, "each": 0.5, "id": 0.5}),
        ((0, 0), {"all_said": 0, "all_unsaid": 0, "each": 0.5, "id": 0.5}),
        ((1, 7), {"all_said": 0, "all_unsaid": 0, "each": 0.25, "id": 0.25}),
        ((8, 9), {"all_said": 0, "all_unsaid": 0, "each": 0, "id": 0}),
    ],
)
def test_people_are_recognised_where_the_prompt_puts_them(two, drawn, figures):
    """Two of the same one are not both; without places they may be the other way round."""
    found = recognition.together(Seer(), torch.stack(2 * [picture(*drawn)]), two.shots, two.looks)
    both = (figures["all_said"] + figures["all_unsaid"]) / 2
    assert found == {"all": both, "prompt": 0.5, **figures}


def test_a_figure_that_nothing_was_asked_for_is_not_there(two):
    found = recognition.together(Seer(), picture(0, 1)[None], two.shots[:1], two.looks)
    assert "all_unsaid" not in found and found["all_said"] == 1


def test_things_are_looked_for_where_their_owner_is(two, monkeypatch):
    seen = []
    monkeypatch.setattr(recognition, "part_of", lambda pictures, count, place: place)
    judge = Seer()
    judge.found = lambda place, wish: seen.append((place, wish[0])) or [[True]]
    two.shots[1] = world.Shot(
        (two.shots[1].actors[0], world.Actor(two.looks[1], "<ben>", holds="cup", place="right")),
        "snow", places_said=False,
    )  # fmt: skip
    recognition.together(judge, picture(1, 0)[None], two.shots[1:], two.looks)
    assert seen == [
        ("right", {"scene": "snow", "expression": "sad"}),
        ("left", {"scene": "snow", "object": "cup"}),
    ]


def test_the_gallery_has_these_people_first_and_no_one_twice(monkeypatch):
    known = [(str(n), world.unseen_look(n)) for n in range(50)]
    monkeypatch.setattr(recognition, "_known", lambda count: (known, torch.arange(50.0)[:, None]))
    monkeypatch.setattr(
        check_crowds, "prototypes", lambda judge, who, *_: -1 - torch.arange(len(who))[:, None]
    )
    looks = [known[3][1], world.unseen_look(900)]
    gallery = recognition._gallery(Seer(), looks)[:, 0].tolist()
    assert gallery[:2] == [-1, -2] and len(gallery) == 50
    assert gallery[2:] == [n for n in range(50) if n != 3][:48]


def test_a_person_is_learned_once_and_again_when_the_learning_changes(tmp_path, monkeypatch):
    learned = []
    monkeypatch.setattr(crowds, "OUTPUT", tmp_path)
    monkeypatch.setattr(crowds, "miniature", lambda family: (None, None))
    monkeypatch.setattr(
        crowds, "learn_identity", lambda *a: learned.append(a[2]) or make_identity("subject")
    )
    for _ in range(2):
        assert crowds.Learning(1, 7).run()["bytes"] > 1000
    assert len(learned) == 1
    monkeypatch.setattr(crowds, "_learned_by", lambda: "changed")
    assert crowds.identity_of(1, 7).name == "subject"
    assert len(learned) == 2


def test_all_rows_of_all_crowds_are_work_and_people_are_learned_first(tmp_path, monkeypatch):
    calls = []

    def run_all(work, store, modules):
        calls.append(list(work))
        return {one.key: {"all": len(calls)} for one in work}

    monkeypatch.setattr(people, "run_all", run_all)
    groups = people.benchmark(pairs=2, triples=0, prompts=3, seed=5)
    assert {group: tuple(rows) for group, rows in groups.items()} == {
        "pairs": crowds.ROWS, "alone": people.ALONE,
    }  # fmt: skip
    assert all(len(part) == 2 for rows in groups.values() for part in rows.values())
    assert calls[0] == [crowds.Learning(5, number) for number in range(4)]
    assert len({work.key for work in calls[1]}) == 14


@pytest.mark.parametrize(("count", "rows"), [(2, crowds.ROWS), (1, people.ALONE)])
def test_crowds_are_drawn_and_measured(count, rows, tmp_path, monkeypatch):
    """On the shipped miniature, with identities that are nobody's."""
    monkeypatch.setattr(crowds, "OUTPUT", tmp_path)
    width = SD1.encoders["l"].width
    monkeypatch.setattr(
        crowds, "identity_of", lambda seed, n: make_identity("subject", n - 0.5, width)
    )
    strips = {}
    for row in rows:
        crowd = crowds.Crowd(row, count, 0, 2)
        figures = crowd.run()
        assert 0 <= figures["prompt"] <= 1 and -1 <= figures["id"] <= 1
        assert set(figures) == ({"all", "all_said", "all_unsaid", "each", "id", "prompt"}
                                if count > 1 else {"id", "prompt", "id_p"})  # fmt: skip
        strips[row] = Image.open(crowd.strip).tobytes()
        assert Image.open(crowd.strip).size == (256, 128)
    assert len(set(strips.values())) == len(rows)


def test_both_worlds_have_versions_of_their_own(tmp_path, monkeypatch):
    before = jobs.code_version.__wrapped__()
    made = tmp_path / "made.safetensors"
    made.write_bytes(b"weights")
    monkeypatch.setattr(jobs, "MADE", (made, tmp_path / "none.safetensors"))
    after = jobs.code_version.__wrapped__()
    made.write_bytes(b"others")
    assert len({before, after, jobs.code_version.__wrapped__()}) == 3
