"""``make publish`` writes what was measured, and leaves the rest."""

import json

from sefi_ide.benchmarks import publish


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


def test_a_table_that_was_not_measured_again_stays(tmp_path, monkeypatch):
    output, docs = tmp_path / "output", tmp_path / "docs"
    (output / "bench-ablations").mkdir(parents=True)
    docs.mkdir()
    monkeypatch.setattr(publish, "OUTPUT", output)
    monkeypatch.setattr(publish, "DOCS", docs)
    lambdas, steps = (
        output / "bench-ablations" / "lambda.md",
        output / "bench-ablations" / "steps.md",
    )
    lambdas.write_text("### lambda\n\n| old |\n")
    steps.write_text("### steps\n\n| old |\n")
    publish.publish_ablations()
    lambdas.unlink()
    steps.write_text("### steps\n\n| new |\n")
    leak = output / "bench-ablations" / "leak.md"
    leak.write_text("### leak\n\n| first |\n")
    publish.publish_ablations()
    page = (docs / "ablations.md").read_text()
    assert page.endswith("### lambda\n\n| old |\n\n### leak\n\n| first |\n\n### steps\n\n| new |\n")
    assert page.count("### steps") == 1
