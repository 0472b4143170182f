"""What SeFi Train Identity tells while it trains, and how it is stopped; the HTTP is in server/."""

import io as files
import json
import logging
import sys
import threading
import time
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext
from PIL import Image
from protocol import BinaryEventTypes
from sefi_ide.sefi_core.comfyui.learning import live, pace, showing
from sefi_ide.sefi_core.comfyui.learning.denoiser import ComfyDenoiser
from sefi_ide.sefi_core.comfyui.learning.live import LiveTraining, newest, workflow_id
from sefi_ide.sefi_core.comfyui.learning.progress import TrainingProgress
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.images import float_tensor
from sefi_ide.sefi_core.learning.loop import Step

from . import training_runs
from .training_runs import photo_and_mask, run, same


class Server:
    """As much of ComfyUI's server as a training talks to; keeps what it was told, as sent."""

    client_id = "somebody"
    prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: ([], []))

    def __init__(self):
        self.events, self.previews, self.sockets_metadata = [], [], {}
        self.on_event = lambda event: None

    def send_sync(self, name, data, sid=None):
        if name == live.EVENT:
            assert sid is None  # to all clients
            event = json.loads(json.dumps(data, allow_nan=False))
            self.events.append(event)
            self.on_event(event)
        elif name == BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA:
            assert sid == self.client_id
            self.previews.append((name, *data))


@pytest.fixture
def server(monkeypatch):
    server = Server()
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", module)
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_EVENTS", 0.0)
    hidden = {**training_runs.HIDDEN["hidden_inputs"]}
    hidden[io.Hidden.extra_pnginfo] = {"workflow": {"id": "w"}}
    monkeypatch.setitem(training_runs.HIDDEN, "hidden_inputs", hidden)
    with CurrentNodeContext("prompt-1", "7", 0):
        yield server


def losses_told(events) -> dict[str, list[float]]:
    """All losses, put together from the events as the panel does."""
    together = {name: [] for name in live.LOSSES}
    for event in events:
        for name, values in event["losses"].items():
            together[name][event["first"] :] = values
    return together


def in_order(values):
    return [value for place, value in enumerate(values) if place == 0 or values[place - 1] != value]


def test_a_training_tells_its_phases_its_steps_and_its_end(mini_sd, server):
    _, losses, _ = run(mini_sd, steps=6)
    first, last = server.events[0], server.events[-1]
    whose = {"workflow": "w", "node": "7", "prompt_id": "prompt-1", "placeholder": "<anna>"}
    assert {key: first[key] for key in whose} == whose and first["state"] == "running"
    loading, looking, learning, reporting = live.PHASES
    assert in_order([event["phase"] for event in server.events]) == [
        loading, looking, loading, looking, learning, reporting, ""
    ]  # fmt: skip
    assert (last["state"], last["step"], last["steps"], last["message"]) == ("finished", 6, 6, "")
    told = losses_told(server.events)
    assert {len(values) for values in told.values()} == {len(losses["loss"])}
    assert last | {"first": 0, "losses": told} == newest("w", "7").as_json()
    left = [event["seconds_left"] for event in server.events if event["phase"] == learning]
    assert left[0] is None and left[-1] == 0 and any(left)


def test_previews_reach_the_one_who_queued_as_those_of_samplers_do(mini_sd, server):
    """App Mode and the queue show them; the node, which has them in its panel, not twice."""
    from comfy_api import feature_flags

    run(mini_sd, steps=3)  # the last preview is the report's sample
    assert server.previews == []  # but by ComfyUI's bar, to who does not know which node is meant
    flags = {"feature_flags": {"supports_preview_metadata": True}}
    server.sockets_metadata = {server.client_id: flags}
    assert feature_flags.supports_feature(
        server.sockets_metadata, server.client_id, "supports_preview_metadata"
    )
    run(mini_sd, steps=3)
    ((_, (kind, picture, side), about),) = server.previews
    assert kind == "JPEG" and max(picture.size) <= side
    assert about["prompt_id"] == "prompt-1" and about["node_id"] != "7"


def test_photo_preview_and_attention_are_kept_for_the_panel(mini_sd, server, monkeypatch):
    monkeypatch.setattr(pace, "PREVIEW_SHARE", 1e9)
    run(mini_sd, steps=6, preview_every=2)
    versions = {
        name: [event["pictures"][name] for event in server.events] for name in live.PICTURES
    }
    for name, told in versions.items():
        assert told[0] == 0 and told == sorted(told), name
    new = {name: len(set(told) - {0}) for name, told in versions.items()}
    # Before the first step, after 2, 4 and 6, and with the report; no pace is known after 2 steps.
    assert new == {"photo": 1, "preview": 2, "attention": 5}
    for name, (version, data) in newest("w", "7").pictures.items():
        picture = Image.open(files.BytesIO(data))
        assert picture.format == "JPEG" and version == versions[name][-1]
        assert float_tensor(picture).std() > 0.005, name


def stop_at(server, step, prompt="prompt-1"):
    """As a click on the panel, which arrives in another thread; what was answered."""
    answers = []

    def ask():
        answers.append(newest("w", "7").stop(prompt))

    def on_event(event):
        if event["step"] == step and not answers:
            clicked = threading.Thread(target=ask)
            # The state is locked while an event is made; the click waits for it.
            clicked.start()
            server.clicked = clicked

    server.on_event = on_event
    return answers


def test_stop_ends_after_the_step_and_keeps_what_was_learned(mini_sd, server, caplog):
    whole = run(mini_sd, steps=40)[1]["loss"]
    caplog.set_level(logging.INFO)
    server.events.clear()
    answers = stop_at(server, 3)
    identity, losses, report = run(mini_sd, steps=40)
    server.clicked.join()
    done = len(losses["loss"])
    assert answers == [""] and 3 <= done < 40
    assert losses["loss"] == whole[:done]
    assert identity.training["steps_done"] == done
    assert torch.isfinite(report).all() and report.std() > 0.05
    said = f"stopped at step {done} of 40, and kept"
    last = server.events[-1]
    assert (last["state"], last["step"], last["message"]) == ("stopped", done, said)
    assert said in caplog.text
    vectors = [
        rows for part in (identity.key_vectors, identity.value_vectors) for rows in part.values()
    ]
    assert all(torch.isfinite(rows).all() for rows in vectors)


def test_a_stop_for_another_prompt_changes_nothing(mini_sd, server):
    expected = run(mini_sd, steps=6)[0]
    answers = stop_at(server, 2, "prompt-0")
    assert same(run(mini_sd, steps=6)[0], expected)
    assert answers and "does not run" in answers[0]
    assert server.events[-1]["state"] == "finished"
    assert "does not run" in newest("w", "7").stop("prompt-1")  # nor one that has ended


def test_a_stop_after_the_last_step_is_refused(server):
    training = LiveTraining(10, "<anna>", "w", "7", "prompt-1")
    training.enter(live.REPORTING)
    assert "learned already" in training.stop("prompt-1") and not training.stopping


def test_cancel_says_at_which_step(mini_sd, server, caplog):
    caplog.set_level(logging.INFO)

    def on_event(event):
        if event["step"] == 2 and event["state"] == "running":
            comfy.model_management.interrupt_current_processing()

    server.on_event = on_event
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(mini_sd, steps=40)
    said = "cancelled at step 2 of 40"
    assert server.events[-1]["state"] == "cancelled"
    assert server.events[-1]["message"].startswith(said)
    assert said in caplog.text
    assert not comfy.model_management.processing_interrupted()


def test_cancel_while_loading_ends_before_the_first_step(mini_sd, server):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(mini_sd)
    assert server.events[-1]["message"] == "cancelled before the first step"


def test_a_failure_is_told_with_its_sentence(mini_sd, server, monkeypatch):
    with pytest.raises(SeFiError, match="vae"):
        model, clip, vae = mini_sd
        encode = vae.encode
        monkeypatch.setattr(vae, "encode", lambda picture: encode(picture) * float("nan"))
        run((model, clip, vae))
    assert server.events[-1]["state"] == "failed" and "NaN" in server.events[-1]["message"]


def test_without_a_server_the_state_is_there_all_the_same(mini_sd, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    run(mini_sd, steps=3)
    assert newest("", "7").as_json()["state"] == "finished"


def test_only_the_newest_training_of_the_last_nodes_is_remembered():
    for number in range(3 * live.REMEMBERED):
        LiveTraining(10, "<a>", "many", str(number))
        latest = LiveTraining(10, "<b>", "many", str(number))
    assert newest("many", "0") is None and newest("many", str(number)) is latest
    kept = [newest("many", str(n)) for n in range(3 * live.REMEMBERED)]
    assert sum(training is not None for training in kept) == live.REMEMBERED


def test_events_are_whole_and_in_order_while_others_read(server, monkeypatch):
    training = LiveTraining(400, "<a>", "w", "7", "p")
    done, seen = threading.Event(), set()

    def read():
        while not done.is_set():
            state = training.as_json()
            assert {len(losses) for losses in state["losses"].values()} == {state["step"]}
            seen.add(state["step"])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 401):
        monkeypatch.setattr(live, "_SECONDS_BETWEEN_EVENTS", 0.0 if number % 7 else 1e9)
        training.step(Step(number, 1.0, number / 1000, 0.1, 0.2), None)
    training.end("finished")
    done.set()
    for reader in readers:
        reader.join()
    assert seen <= set(range(401)) and seen
    told = losses_told(server.events)
    assert told["noise"] == [number / 1000 for number in range(1, 401)]
    begins = [event["first"] for event in server.events]
    ends = [event["first"] + len(event["losses"]["noise"]) for event in server.events]
    assert begins[1:] == ends[:-1]  # nothing twice, nothing left out


def test_events_are_few_where_steps_are_quick(server, monkeypatch):
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_EVENTS", 0.25)
    training = LiveTraining(10_000, "<a>", "w", "7", "p")
    began = time.monotonic()
    for number in range(1, 2001):
        training.step(Step(number, 1.0, 1.0, 1.0, 1.0), None)
    assert len(server.events) <= 2 + (time.monotonic() - began) / 0.25
    training.end("finished")
    assert len(losses_told(server.events)["noise"]) == 2000


@pytest.mark.parametrize(
    ("hidden", "found"),
    [
        ({"workflow": {"id": "w"}}, "w"),
        ({"workflow": {"id": "w" * 10_000}}, "w" * 200),
        ({"workflow": {"id": 7}}, ""),
        ({"workflow": ["id"]}, ""),
        ({}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_prompts_without_a_workflow_have_no_workflow_id(hidden, found):
    assert workflow_id(hidden) == found


# --- what it costs ------------------------------------------------------------------------------


def counted(monkeypatch):
    """The batches that the model is asked for, as they come."""
    asked, whole = [], ComfyDenoiser.__call__

    def call(self, keys, values, batch):
        asked.append(batch.timesteps)
        return whole(self, keys, values, batch)

    monkeypatch.setattr(ComfyDenoiser, "__call__", call)
    return asked


@pytest.mark.parametrize(("weight", "for_maps"), [(0.003, 0), (0.0, 1)], ids=["loss", "no loss"])
def test_the_attention_is_seen_in_what_the_losses_need(
    mini_sd, server, monkeypatch, weight, for_maps
):
    expected = run(mini_sd, steps=8, attention_weight=weight, preview_every=0)[0]
    monkeypatch.setattr(pace, "PREVIEW_SHARE", 1e9)
    server.events.clear()
    asked = counted(monkeypatch)
    watched = run(mini_sd, steps=8, attention_weight=weight, preview_every=4)[0]
    # The looks before and after are of the report; a preview is drawn after step 4.
    assert len(asked) == 8 + 2 * 3 + for_maps
    assert len({event["pictures"]["attention"] for event in server.events} - {0}) >= 3
    assert same(watched, expected)


def test_telling_takes_less_than_two_percent_of_a_training(mini, server, monkeypatch):
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_EVENTS", 0.25)
    spent = 0.0

    def timed(owner, name):
        whole = getattr(owner, name)

        def call(*arguments, **keywords):
            nonlocal spent
            began = time.thread_time()
            try:
                return whole(*arguments, **keywords)
            finally:
                spent += time.thread_time() - began

        monkeypatch.setattr(owner, name, call)

    for name in ("step", "phase", "picture", "is_due", "preview_scale", "stopping"):
        timed(TrainingProgress, name)
    for name in ("maps_together", "attention_picture"):
        timed(showing, name)
    models = mini.model, mini.clip, mini.vae
    photo, mask = photo_and_mask(160, 160)
    began = time.thread_time()
    run(models, [photo], [mask], steps=50, resolution=128, preview_every=25)
    assert 0 < spent < 0.02 * (time.thread_time() - began)
