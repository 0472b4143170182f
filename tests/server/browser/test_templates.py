"""The shipped workflows in the real frontend, as a user meets them."""

import json

import pytest
from PIL import Image
from playwright.sync_api import expect
from sefi_ide.tests.server.browser.frontend import (
    PICTURES,
    SELECT,
    SET_WIDGETS,
    open_template,
    press_run,
)
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.workflow import to_prompt

WORKFLOWS = sorted(file.stem for file in (REPOSITORY / "workflows").glob("*.json"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_template_opens_with_what_its_file_says(page, object_info, name):
    """And so the prompts that the other tests make of the files are those of the frontend."""
    open_template(page, name)
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in queued.values():
        del node["_meta"]
    file = REPOSITORY / "workflows" / f"{name}.json"
    assert queued == to_prompt(json.loads(file.read_text(encoding="utf-8")), object_info)


def test_the_quick_start_from_photo_to_picture(page, server, picture):
    open_template(page, "quick_start")
    unused = len(server.get("/history"))  # a seed, so that the result is not at hand already
    values = {
        "LoadImage": {"image": picture},
        "CheckpointLoaderSimple": {"ckpt_name": "mini_sd.safetensors"},
        "SeFiTrainIdentity": {"steps": 2, "preview_every": 1, "resolution": 128, "seed": unused},
        "SeFiSaveIdentity": {"file_name": "from_the_frontend"},
        "EmptyLatentImage": {"width": 128, "height": 128},
        "KSampler": {"steps": 2},
    }
    page.evaluate(SET_WIDGETS, values)
    first = server.wait(press_run(page))
    assert first.executed("SeFiTrainIdentity")
    expect(page.get_by_text("step 2 of 2, loss")).to_be_visible()
    for shown in ("PreviewImage", "SaveImage"):
        page.wait_for_function(f"(type) => ({PICTURES})(type) === 1", arg=shown)

    # The sampler's seed changes by itself with every run; the person is not learned again.
    again = server.wait(press_run(page))
    assert again.executed("KSampler")
    assert not again.executed("SeFiTrainIdentity")


def test_a_photo_without_a_face_is_told_in_one_sentence(page, server, tmp_path):
    black = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(black)
    open_template(page, "quick_start")
    values = {
        "LoadImage": {"image": server.upload(black)},
        "CheckpointLoaderSimple": {"ckpt_name": "mini_sd.safetensors"},
    }
    page.evaluate(SET_WIDGETS, values)
    press_run(page)
    page.get_by_role("button", name="View details").click()
    sentence = "sefi_ide.SeFiError: SeFi Face Mask: no face was found"
    expect(page.get_by_text(sentence)).to_be_visible()


def test_the_help_page_of_a_node_opens(page):
    open_template(page, "quick_start")
    page.evaluate(SELECT, "SeFiTrainIdentity")
    page.get_by_test_id("info-button").click()
    expect(page.get_by_role("heading", name="How to use it")).to_be_visible()
