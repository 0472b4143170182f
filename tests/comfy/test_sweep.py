"""What is measured around the comparison: the sweep, the ablations, and what is published."""

import json

import pytest
from sefi_ide.benchmarks import ablations, methods, publish, quality, sweep


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


def test_the_defaults_of_an_ablation_are_measured_once():
    tables = ablations.TABLES
    same = [v for part in tables.values() for v in part.values() if v]
    same = [v for v in same if ablations.jobs_of(v) == ablations.jobs_of({})]
    assert {"attention_weight": 0.003} in same and {"levels": [2, 4]} in same
    assert {"attention_weight": 0.0} not in same and {"photos": 2} not in same
    done = {
        job.key: dict.fromkeys(ablations.FIGURES, 0.5) | {"id_p": base + shift}
        for variant, base in (({}, 0.5), ({"captions": ()}, 0.4))
        for job, shift in zip(ablations.jobs_of(variant, 16), range(16), strict=True)
    }
    lines = ablations.table("captions", done)
    assert lines[1].startswith("16 identities. Measured at ")
    assert lines[-2].endswith("| 0.100 [0.100, 0.100] |") and lines[-1].endswith("|  |")


def test_publishing_writes_pages_and_winners(tmp_path, monkeypatch):
    output, docs = tmp_path / "output", tmp_path / "docs"
    compared, swept = output / "bench-quality" / "robot", output / "bench-sweep" / "robot"
    docs.mkdir()
    for folder in (compared, swept):
        folder.mkdir(parents=True)
        (folder / "table.md").write_text(f"| {folder.parent.name} |\n")
    (compared / "id_prompt.png").write_bytes(b"png")
    (swept / "winners.json").write_text(json.dumps({"lora": {"steps": 3}}))
    (output / "bench-figures").mkdir()
    (output / "bench-figures" / "table.md").write_text("| bench-figures |\n")
    winners = tmp_path / "winners.json"
    winners.write_text(json.dumps({"person": {"lora": {"steps": 9}}}))
    (output / "bench-ablations").mkdir()
    (output / "bench-cost").mkdir()
    (output / "bench-cost" / "table.md").write_text("| bench-cost |\n")
    for name in ("steps", "lambda", "not a table"):
        (output / "bench-ablations" / f"{name}.md").write_text(f"### {name}\n")
    monkeypatch.setattr(publish, "OUTPUT", output)
    monkeypatch.setattr(publish, "DOCS", docs)
    monkeypatch.setattr(publish, "WINNERS", winners)
    assert publish.main() == 0
    page = (docs / "quality_robots.md").read_text()
    assert "KIND=robot make bench-quality" in page and "| bench-quality |" in page
    page = (docs / "sweep_robots.md").read_text()
    assert "KIND=robot make bench-sweep" in page and "| bench-sweep |" in page
    assert (docs / "id_prompt_robots.png").read_bytes() == b"png"
    assert json.loads(winners.read_text()) == {
        "person": {"lora": {"steps": 9}},
        "robot": {"lora": {"steps": 3}},
    }
    assert "| bench-cost |" in (docs / "cost.md").read_text()
    assert "| bench-figures |" in (docs / "figures.md").read_text()
    assert not (docs / "quality_people.md").exists()
    page = (docs / "ablations.md").read_text()
    assert page.index("### lambda") < page.index("### steps") and "not a table" not in page
