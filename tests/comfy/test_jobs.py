"""Jobs of the benchmarks: each is as asked, and what is finished is not done again."""

import json

import pytest
from sefi_ide.benchmarks import jobs, measures, methods


def test_finished_jobs_are_not_done_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jobs, "run_job", lambda job: calls.append(job) or {"id_p": 0.5})
    store = tmp_path / "rows.jsonl"
    one, two = (jobs.Job("class_word", 1, number, 2, 1) for number in range(2))
    assert jobs.run_all([one], store) == {one.key: {"id_p": 0.5}}
    with store.open("a") as file:
        file.write('{"version": "cut o')
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 1)
    assert set(jobs.run_all([one, two], store)) == {one.key, two.key}
    jobs.run_all([one, two], store)
    assert calls == [one, two]


def test_results_of_another_version_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "run_job", lambda job: {"id_p": 0.5})
    job = jobs.Job("class_word", 1, 0, 2, 1)
    store = tmp_path / "rows.jsonl"
    store.write_text(
        json.dumps({"version": "old", "job": job.key, "figures": {"id_p": 9.0}}) + "\n"
    )
    assert jobs.run_all([job], store) == {job.key: {"id_p": 0.5}}


def test_results_count_as_of_another_version_when_code_or_weights_change(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "REPOSITORY", tmp_path)
    matters = ["sefi_core/comfyui/train.py", "tests/mini_sd/world.py", "benchmarks/measures.py"]
    matters += ["tests/mini_sd/mini_sd.safetensors", "tests/mini_sd/names.txt"]
    files = [tmp_path / name for name in (*matters, "README.md", "benchmarks/plots.py")]
    for name in (*files, *(tmp_path / "benchmarks" / f"{name}.py" for name in jobs.MEASURING)):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text("before")
    versions = [jobs.code_version.__wrapped__()]
    for file in files:
        file.write_text("after")
        versions.append(jobs.code_version.__wrapped__())
    assert len({*versions}) == 1 + len(matters)


def test_a_job_learns_from_one_photo_and_with_the_settings_that_it_says(monkeypatch):
    class Learned(Exception):
        pass

    def learn(mini, method, photos, class_word, overrides):
        raise Learned(method, len(photos), class_word, overrides)

    monkeypatch.setattr(methods, "learn", learn)
    with pytest.raises(Learned) as learned:
        jobs.run_job(jobs.Job("lora", 1, 0, 1, 1, "robot", overrides={"steps": 5}))
    assert learned.value.args == ("lora", 1, "robot", {"steps": 5})


def test_a_job_draws_and_measures():
    figures = jobs.run_job(jobs.Job("class_word", seed=1, number=0, prompts=2, draws=1))
    assert 0 <= figures["leak"] <= 1 and 0 <= figures["prompt"] <= 1
    assert -1 <= figures["id_p"] <= figures["id"] <= 1
    assert figures["seconds"] == figures["bytes"] == 0


def test_every_picture_has_noise_of_its_own_and_methods_share_it(monkeypatch):
    """Noise that all subjects share suits one method or another, and no interval shows it."""
    seen = []

    class Drawn(Exception):
        pass

    def draw(mini, learned, wished, seeds, kind):
        seen.append((len(wished), seeds))
        raise Drawn

    monkeypatch.setattr(measures, "draw", draw)
    for method, number in (("class_word", 0), ("named", 0), ("class_word", 1)):
        with pytest.raises(Drawn):
            jobs.run_job(jobs.Job(method, seed=1, number=number, prompts=5, draws=2))
    first, same, other = (seeds for _, seeds in seen)
    assert [count for count, _ in seen] == [10, 10, 10]
    assert first == same and len({*first, *other}) == 20


def test_leak_is_measured_in_pictures_of_its_own_for_every_subject(monkeypatch):
    seen = []
    monkeypatch.setattr(measures, "draw", lambda *_: None)
    monkeypatch.setattr(measures, "quality", lambda *_: {"id_p": 0.5})
    monkeypatch.setattr(measures, "leak", lambda mini, learned, look, seed: seen.append(seed))
    for method, seed, number in (("class_word", 1, 0), ("named", 1, 0), ("class_word", 1, 1)):
        jobs.run_job(jobs.Job(method, seed, number, prompts=1, draws=1))
    assert seen[0] == seen[1] and abs(seen[2] - seen[0]) > measures.LEAK_PICTURES
