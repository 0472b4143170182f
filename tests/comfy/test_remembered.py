"""Going back to earlier settings, and going on after an interruption, as the node does it."""

from __future__ import annotations

import logging
import os
import time
import uuid

import comfy.model_management
import pytest
import torch
from sefi_ide.sefi_core.comfyui.learning import live, remembered, snapshots
from sefi_ide.sefi_core.comfyui.learning import train as learning
from sefi_ide.sefi_core.comfyui.learning.snapshots import Snapshots
from sefi_ide.sefi_core.learning.loop import optimise

from .training_runs import HIDDEN, load, photo_and_mask, run, same, with_lora


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


@pytest.fixture
def trainings(monkeypatch):
    """How many steps each training took, in their order; nothing of before is remembered."""
    taken = []

    def counted(parameters, denoiser, settings, on_step=None, *args):
        taken.append(0)

        def counting(step):
            taken[-1] += 1
            on_step(step)

        return optimise(parameters, denoiser, settings, counting, *args)

    monkeypatch.setattr(learning, "optimise", counted)
    remembered.forget()
    for path in snapshots.folder().glob("*"):
        path.unlink()
    return taken


def again(models, *args, **changes):
    return run(models, *args, from_new=False, **changes)


def state():
    """What the panel of the node that :func:`run` executes would show."""
    return live.newest("", HIDDEN["hidden_inputs"][next(iter(HIDDEN["hidden_inputs"]))]).as_json()


def equal(one, other) -> bool:
    return (
        one[0].same_content(other[0]) and one[1] == other[1] and torch.equal(one[2], other[2])
    )  # fmt: skip


# --- remembered -------------------------------------------------------------------------------


def test_going_back_to_earlier_settings_trains_no_more(models, trainings, caplog):
    caplog.set_level(logging.INFO)
    first = again(models, seed=1)
    second = again(models, seed=2)
    assert trainings == [3, 3] and "learned before" not in caplog.text
    assert state()["message"] == ""
    back = again(models, seed=1)
    assert trainings == [3, 3]
    assert equal(back, first) and not same(back[0], second[0])
    assert "<anna> was learned before with the same settings" in caplog.text
    told = state()
    assert (told["state"], told["step"], told["steps"]) == ("finished", 3, 3)
    assert told["message"] == "learned before with the same settings"
    assert len(told["losses"]["noise"]) == 3


def test_what_is_remembered_is_what_a_new_training_gives(models, trainings):
    again(models, steps=5)
    kept = again(models, steps=5)
    assert trainings == [5]
    new = run(models, steps=5)
    assert trainings == [5, 5] and equal(kept, new)


def test_the_same_checkpoint_loaded_again_and_an_error_in_between(
    models, mini_checkpoint, trainings
):
    first = again(models)
    with pytest.raises(Exception, match="captions has 3 lines"):
        image = photo_and_mask()[0]
        again(models, [image, image], captions="a\nb\nc")
    assert equal(again(load(mini_checkpoint)), first)
    assert trainings == [3]


def test_another_lora_trains_again(models, trainings):
    first = again(models)
    changed = (*with_lora(*models[:2]), models[2])
    with_it = again(changed)
    assert trainings == [3, 3] and not same(with_it[0], first[0])
    weaker = changed[0].clone()
    weaker.patches = {
        key: [(0.5, *one[1:]) for one in ones] for key, ones in weaker.patches.items()
    }
    weaker.patches_uuid = uuid.uuid4()  # as a loader that loads it anew
    changed = (weaker, *changed[1:])
    assert not same(again(changed)[0], with_it[0])
    assert trainings == [3, 3, 3]
    assert equal(again(models), first) and trainings == [3, 3, 3]


def test_what_a_node_does_with_its_picture_does_not_reach_what_is_remembered(models, trainings):
    first = again(models)
    report = first[2].clone()
    for _ in range(2):
        given = again(models)
        assert torch.equal(given[2], report) and len(given[1]["loss"]) == 3
        given[1]["loss"].clear()
        with torch.inference_mode():
            given[2].zero_()
            first[2].zero_()
    assert trainings == [3]


def test_only_the_last_few_are_remembered(models, trainings, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 2)
    for seed in (1, 2, 1, 3):  # 2 is the one that was not used for longest
        again(models, seed=seed, steps=1)
    assert trainings == [1, 1, 1] and len(remembered._finished) == 2
    again(models, seed=1, steps=1)
    again(models, seed=3, steps=1)
    assert trainings == [1, 1, 1]
    again(models, seed=2, steps=1)
    assert trainings == [1, 1, 1, 1]


def test_nothing_of_the_models_is_kept_alive_by_what_is_remembered(mini_checkpoint, trainings):
    models = load(mini_checkpoint)
    again(models)
    seen, stack = set(), [remembered._finished]
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, (str, int, float, torch.Tensor)):
            continue
        seen.add(id(one))
        assert not isinstance(one, (torch.nn.Module, comfy.model_patcher.ModelPatcher))
        parts = vars(one).values() if hasattr(one, "__dict__") else ()
        stack += [*parts, *(one.values() if isinstance(one, dict) else ())]
        stack += list(one) if isinstance(one, (list, tuple)) else []
    assert len(seen) > 3


def test_a_report_that_could_not_be_drawn_is_tried_again(models, trainings, monkeypatch):
    def short(*args, **options):
        raise MemoryError("no memory for a sample")

    with monkeypatch.context() as patched:
        patched.setattr(learning, "training_report", short)
        first = again(models)
    second = again(models)
    assert trainings == [3, 3] and same(first[0], second[0])
    assert first[2].shape != second[2].shape
    assert equal(again(models), second) and trainings == [3, 3]


# --- snapshots --------------------------------------------------------------------------------


def break_off(monkeypatch, at: int, error: BaseException):
    """Have trainings end with an error after a step, once it has been taken."""
    step = live.LiveTraining.step

    def broken(self, done, *args):
        step(self, done, *args)
        if done.number == at:
            raise error

    monkeypatch.setattr(live.LiveTraining, "step", broken)


ENDS = [comfy.model_management.InterruptProcessingException(), RuntimeError("out of memory")]


@pytest.mark.parametrize("end", ENDS, ids=["cancelled", "failed"])
@pytest.mark.parametrize("changes", [{}, {"parametrisation": "self-attention", "batch_size": 2}])
def test_it_goes_on_where_it_was_broken_off(models, trainings, monkeypatch, caplog, end, changes):
    caplog.set_level(logging.INFO)
    arguments = {"steps": 9, "seed": 4, "preview_every": 3, **changes}
    image, mask = photo_and_mask()
    whole = run(models, [image], [mask], **arguments)
    remembered.forget()
    with monkeypatch.context() as patched:
        break_off(patched, 4, end)
        with pytest.raises(type(end)):
            again(models, [image], [mask], **arguments)
    told = state()
    assert told["resumable"] == told["step"] == 4
    if told["state"] == "cancelled":
        assert told["message"] == ("cancelled at step 4 of 9; queue it again to go on from there")
    assert len(list(snapshots.folder().glob("*.safetensors"))) == 1
    result = again(models, [image], [mask], **arguments)
    assert trainings == [9, 4, 5]
    assert equal(result, whole)
    assert "going on from step 4 of 9" in caplog.text
    told = state()
    assert (told["state"], told["step"], told["resumable"]) == ("finished", 9, 0)
    assert len(told["losses"]["noise"]) == 9
    assert list(snapshots.folder().glob("*.safetensors")) == []
    assert equal(again(models, [image], [mask], **arguments), whole) and len(trainings) == 3


def test_a_crash_loses_what_was_learned_since_the_last_snapshot(models, trainings, monkeypatch):
    """The process ends without a word: all that there is was written while it ran."""
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)
    monkeypatch.setattr(snapshots, "SHARE", 1e9)
    whole = run(models, steps=7)
    remembered.forget()
    written = {}
    real = Snapshots.keep_now

    def noted(self, state):
        real(self, state)
        written[self.step] = self.path.read_bytes()

    monkeypatch.setattr(Snapshots, "keep_now", noted)
    again(models, steps=7)
    assert list(written) == [1, 2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(Snapshots, "keep_now", real)
    remembered.forget()
    (snapshots.folder() / f"{key_of(models)}.safetensors").write_bytes(written[5])
    assert equal(again(models, steps=7), whole)
    assert trainings == [7, 7, 2]


def key_of(models) -> str:
    """The key of the last training."""
    (key,) = KEYS[-1:]
    return key


KEYS: list[str] = []


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    real = remembered.training_key

    def noted(*args):
        KEYS.append(real(*args))
        return KEYS[-1]

    monkeypatch.setattr(remembered, "training_key", noted)


def test_expressions_are_not_looked_for_again(models, trainings, monkeypatch):
    looked = []
    monkeypatch.setattr(learning, "expressions_in", lambda *a: looked.append(1) or ["smiling"])
    with monkeypatch.context() as patched:
        break_off(patched, 2, ENDS[0])
        with pytest.raises(type(ENDS[0])):
            again(models, captions="auto")
    identity = again(models, captions="auto")[0]
    assert looked == [1] and identity.training["captions"] == ["smiling"]


def test_other_settings_begin_anew(models, trainings, monkeypatch):
    with monkeypatch.context() as patched:
        break_off(patched, 2, ENDS[0])
        with pytest.raises(type(ENDS[0])):
            again(models, seed=1)
    again(models, seed=2)
    assert trainings == [2, 3]
    again(models, seed=1)
    assert trainings == [2, 3, 1]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_snapshot_begins_anew(models, trainings, monkeypatch, caplog, damage):
    whole = run(models)
    remembered.forget()
    with monkeypatch.context() as patched:
        break_off(patched, 2, ENDS[0])
        with pytest.raises(type(ENDS[0])):
            again(models)
    (path,) = snapshots.folder().glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    assert equal(again(models), whole)
    assert trainings == [3, 2, 3] and "cannot be used" in caplog.text


def test_a_disk_that_takes_no_snapshots_hinders_no_training(
    models, trainings, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setattr(snapshots, "folder", lambda: in_the_way / "snapshots")
    again(models)
    assert trainings == [3]
    assert caplog.text.count("keeps no snapshots") == 1


def test_stopped_trainings_are_not_taken_for_finished_ones(models, trainings, monkeypatch):
    whole = run(models, steps=6)
    remembered.forget()
    with monkeypatch.context() as patched:
        patched.setattr(learning.Watcher, "stopping", lambda self: False)
        patched.setattr(remembered.TrainingProgress, "stopping", lambda self: self.number == 2)
        stopped = again(models, steps=6)
    assert trainings == [6, 2] and stopped[0].training["steps_done"] == 2
    assert state()["state"] == "stopped"
    assert equal(again(models, steps=6), whole)
    assert trainings == [6, 2, 4]


def test_only_the_newest_snapshots_are_kept_and_none_for_long(trainings):
    folder = snapshots.folder()
    folder.mkdir(parents=True, exist_ok=True)
    day = 24 * 3600
    for number in range(snapshots.MOST + 3):
        path = folder / f"{number:064}.safetensors"
        path.write_bytes(b"")
        os.utime(path, (time.time() - number * 60,) * 2)
    old = folder / f"{99:064}.safetensors"
    old.write_bytes(b"")
    os.utime(old, (time.time() - (snapshots.DAYS + 1) * day,) * 2)
    Snapshots("f" * 64)
    left = sorted(path.stem for path in folder.glob("*.safetensors"))
    assert left == [f"{number:064}" for number in range(snapshots.MOST)]


def test_snapshots_outlive_a_restart_and_are_not_served():
    """ComfyUI empties its temporary folder whenever it starts; ``__`` keeps users' routes out."""
    import folder_paths

    user, temporary = (
        os.path.realpath(path)
        for path in (folder_paths.get_user_directory(), folder_paths.get_temp_directory())
    )
    place = os.path.realpath(snapshots.folder())
    assert place.startswith(os.path.join(user, "__")) and not place.startswith(temporary)
    assert folder_paths.get_public_user_directory("__sefi") is None


def test_snapshots_take_no_time(monkeypatch):
    """Where writing one takes long, they are fewer."""
    now = [0.0]
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now[0])
    written = []

    class Slow(Snapshots):
        def keep_now(self, state):
            now[0] += 5.0
            written.append(now[0])

    one = Slow("a" * 64)
    keep = one.of([])
    while now[0] < 3600:
        now[0] += 1.0
        keep(lambda: None, False)
    assert 5.0 * len(written) <= 1.1 * snapshots.SHARE * 3600 + 5.0
    assert written[0] < snapshots.SECONDS + 10
