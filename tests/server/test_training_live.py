"""A training is watched and stopped over HTTP, as the panel on its node does."""

import io
import time
import urllib.error
import urllib.parse

import pytest
from PIL import Image
from sefi_ide.tools.templates import QUICK_START
from sefi_ide.tools.workflow import nodes_of

WORKFLOW = "3f1c0d5e-0000-4000-8000-000000000000"


@pytest.fixture
def prompt(shipped_prompt, picture):
    """The quick start, with more steps than anybody waits for, and a seed that nobody had."""
    prompt = shipped_prompt(QUICK_START, picture)
    for node in nodes_of(prompt, "SeFiTrainIdentity"):
        node["inputs"] |= {"steps": 20000, "seed": 4711, "resolution": 128, "captions": ""}
    for node in nodes_of(prompt, "KSampler"):
        node["inputs"]["steps"] = 2
    return prompt


def status_of(call, *arguments) -> int:
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(*arguments)
    return refused.value.code


def test_a_running_training_is_watched_and_stopped_and_its_result_kept(server, prompt):
    trainer = next(key for key, n in prompt.items() if n["class_type"] == "SeFiTrainIdentity")
    key = {"workflow": WORKFLOW, "node": trainer}
    address = "/sefi/training?" + urllib.parse.urlencode(key)
    assert status_of(server.get, address) == 404
    assert status_of(server.post, "/sefi/training/stop", {**key, "prompt_id": "other"}) == 409
    assert status_of(server.post, "/sefi/training/stop", ["no", "fields"]) == 400

    extra = {"extra_pnginfo": {"workflow": {"id": WORKFLOW}}}
    queued = server.post("/prompt", {"prompt": prompt, "extra_data": extra})["prompt_id"]
    for _ in range(600):
        time.sleep(0.2)
        try:
            state = server.get(address)
        except urllib.error.HTTPError:
            continue
        if state["step"] >= 4:
            break
    assert state["state"] == "running" and state["phase"] == "learning", state
    assert (state["prompt_id"], state["placeholder"], state["steps"]) == (queued, "<anna>", 20000)
    assert [len(losses) for losses in state["losses"].values()] == 3 * [state["step"]]
    assert state["seconds_left"] > 0

    assert status_of(server.post, "/sefi/training/stop", {**key, "prompt_id": "other"}) == 409
    assert server.get(address)["state"] == "running"
    asked = {**key, "prompt_id": queued}
    assert server.post("/sefi/training/stop", asked) == {"stopping": True}
    run = server.wait(queued, 120)
    ended = server.get(address)
    assert ended["state"] == "stopped" and state["step"] <= ended["step"] < 20000
    assert f"step {ended['step']} of 20000" in ended["message"]
    assert status_of(server.post, "/sefi/training/stop", asked) == 409
    assert run.pictures("SaveImage")  # drawn with what was kept
    for name in ("photo", "preview", "attention"):
        shown = server.get_bytes(
            f"/sefi/training/picture?{urllib.parse.urlencode(key)}&name={name}"
        )
        assert min(Image.open(io.BytesIO(shown)).size) >= 128, name
        assert ended["pictures"][name] > 0
    assert (
        status_of(server.get, f"/sefi/training/picture?{urllib.parse.urlencode(key)}&name=x") == 404
    )
