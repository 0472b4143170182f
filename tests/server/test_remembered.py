"""Trainings that need not be done again, over HTTP: settings changed and back, a killed server."""

from __future__ import annotations

import io
import time
import urllib.error

import pytest
import skimage.data
from PIL import Image
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.server import ComfyServer

MINI_SD = REPOSITORY / "tests" / "mini_sd" / "mini_sd.safetensors"
STATE = "/sefi/training?workflow=&node=3"


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "comfyui"
    (folder / "input").mkdir(parents=True)
    Image.fromarray(skimage.data.astronaut()).save(folder / "input" / "photo.png")
    return folder


def prompt(**changes) -> dict:
    """A training alone, and its report as the output."""
    inputs = {"name": "anna", "class_word": "person", "captions": "", "steps": 4, "seed": 1}
    inputs |= {"resolution": 64, "preview_every": 0, **changes}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "photos": ["2", 0]}
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": MINI_SD.name}),
        "2": ("LoadImage", {"image": "photo.png"}),
        "3": ("SeFiTrainIdentity", inputs | links),
        "4": ("PreviewImage", {"images": ["3", 2]}),
    }
    return {key: {"class_type": kind, "inputs": values} for key, (kind, values) in nodes.items()}


def reached(server, step: int, seconds: float = 200) -> dict:
    """The state of the training once it has reached a step that can be gone on from."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        try:
            state = server.get(STATE)
        except urllib.error.HTTPError:
            continue
        if state["step"] >= step and state["resumable"]:
            return state
    raise AssertionError(server.log.read_text()[-3000:])


def pixels(run) -> bytes:
    """Of the report; the file holds the prompt as well."""
    (file,) = run.pictures("PreviewImage")
    return Image.open(io.BytesIO(file)).tobytes()


def test_settings_and_back_and_a_server_that_is_killed(directory):
    with ComfyServer(directory, [MINI_SD]) as server:
        messages, pictures = [], []
        for seed in (1, 2, 1):
            run = server.run(prompt(seed=seed))
            pictures.append(pixels(run))
            state = server.get(STATE)
            assert (state["state"], state["step"]) == ("finished", 4)
            messages.append(state["message"])
        assert messages == ["", "", "learned before with the same settings"]
        assert pictures[0] == pictures[2] != pictures[1]
        assert server.log.read_text().count("was learned before") == 1

        server.queue(prompt(steps=20000))
        last = reached(server, 1)
        server._process.kill()
        server._process.wait()

    with ComfyServer(directory, [MINI_SD]) as server:
        queued = server.queue(prompt(steps=20000))
        state = reached(server, last["resumable"] + 1)
        begun = state["resumable"]
        assert begun >= last["resumable"]
        assert state["message"] == f"going on from step {begun} of 20000"
        assert len(state["losses"]["noise"]) == state["step"] > begun
        asked = {"workflow": "", "node": "3", "prompt_id": queued}
        assert server.post("/sefi/training/stop", asked) == {"stopping": True}
        server.wait(queued, 120)
        assert f"going on from step {begun} of 20000" in server.log.read_text()
