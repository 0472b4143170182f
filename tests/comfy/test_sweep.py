"""The sweep, and that the comparison takes what won it."""

import json

import pytest
from sefi_ide.benchmarks import methods, quality, sweep


def test_the_sweep_finds_what_is_best_for_more_than_the_first_subjects():
    """The highest rate is best on the first four and runs away with the others."""
    calls = []

    def run(todo):
        calls.append(todo)
        done = {}
        for job in todo:
            rate, steps = job.overrides["learning_rate"], job.overrides["steps"]
            high = rate in (max(sweep.EMBEDDING_RATES), max(sweep.LORA_RATES))
            id_p = 1e-4 * steps + rate if job.number < 4 or not high else 0.0
            done[job.key] = {"id": 0.5, "prompt": 1.0, "id_p": id_p}
        return done

    table = sweep.sweep("robot", run)
    assert {(job.seed, job.kind) for part in calls for job in part} == {(500, "robot")}
    assert [len(part) for part in calls] == [8 * 9 * 4, 8 * 3 * 12]
    for rows in table.values():
        assert [row["subjects"] for row in rows] == [12] * 3 + [4] * 6
        assert len({(row["learning_rate"], row["steps"]) for row in rows}) == 9
    winners = sweep.winners_of(table)
    assert winners.keys() == set(methods.METHODS)
    assert winners["textual_inversion"] == {"learning_rate": 5e-3, "steps": 900}
    assert winners["lora"] == {"learning_rate": 2.5e-3, "steps": 900}
    assert len(sweep.markdown(table).splitlines()) == 2 + 9 * len(table)


def test_the_comparison_takes_what_won_the_sweep(tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(quality, "run_all", lambda todo, store: wanted.extend(todo) or {})
    with pytest.raises(KeyError):
        size = quality.Size(1, 1, 1)
        rows = quality.contenders(sweep.published_winners("robot"))
        quality.benchmark([1], "robot", size, rows, tmp_path / "rows")
    published = json.loads(sweep.WINNERS.read_text())["robot"]
    as_they_are = [(name, {}) for name in ("class_word", "sefi", "named")]
    expected = [*published.items(), *as_they_are]
    assert sorted((job.method, str(job.overrides)) for job in wanted) == sorted(
        (name, str(settings)) for name, settings in expected
    )
