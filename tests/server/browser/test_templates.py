"""The shipped workflows in the real frontend, as a user meets them."""

import pytest
import skimage.data
from PIL import Image
from playwright.sync_api import expect
from sefi_ide.tests.mini_sd.checkpoints import FACE_ENCODER
from sefi_ide.tests.server.browser.drawn import drawn_boxes, open_advanced_inputs, overlapping
from sefi_ide.tests.server.browser.frontend import (
    PICTURES,
    SELECT,
    SET_WIDGETS,
    open_template,
    press_run,
)
from sefi_ide.tests.server.browser.identities import put_identity
from sefi_ide.tests.server.conftest import MINI_SD
from sefi_ide.tools.demo import add_face_files
from sefi_ide.tools.templates import (
    ADAPTER,
    ALL,
    APP,
    DRAW,
    ENCODER,
    PAINTED_MASK,
    QUICK_START,
    TWO,
    template,
)
from sefi_ide.tools.workflow import nodes_of, to_prompt

WINDOW = {"width": 1600, "height": 1000}
QUICK = {
    "CheckpointLoaderSimple": {"ckpt_name": "mini_sd.safetensors"},
    "SeFiTrainIdentity": {"steps": 2, "preview_every": 1, "resolution": 128},
    "EmptyLatentImage": {"width": 128, "height": 128},
    "KSampler": {"steps": 2},
}
"""Settings with which the miniature learns and draws in a few seconds."""
ADVANCED = {DRAW: 2, PAINTED_MASK: 2, ENCODER: 5, ADAPTER: 2, **dict.fromkeys(TWO, 4)}
"""How many nodes of a template have advanced inputs, where it is not 3."""


@pytest.fixture(autouse=True, scope="module")
def nothing_is_missing(server):
    """What a user has: checkpoints that templates name, face files, a person in the library."""
    for name in ALL:
        for node in template(name)["nodes"]:
            for model in node["properties"].get("models", []):
                server.add_model("checkpoints", model["name"], MINI_SD)
    add_face_files(server)
    put_identity(server, "anna.safetensors", "anna")


@pytest.mark.parametrize("name", ALL)
def test_a_template_opens_as_its_file_says_and_can_be_read(page, server, screenshot, name):
    """The prompts that the other tests make of the files are those of the frontend, too."""
    page.set_viewport_size(WINDOW)
    open_template(page, name)
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in queued.values():
        del node["_meta"]
    assert queued == to_prompt(template(name), server.get("/object_info"))

    if name == APP:
        page.get_by_role("button", name="Enter node graph").click()
    boxes = drawn_boxes(page)
    assert page.evaluate("app.canvas.ds.scale") >= 0.6
    assert not page.evaluate("app.canvas.low_quality"), "classic nodes draw no text so small"
    for title, left, top, width, height in boxes:
        inside = left >= 0 and top >= 0
        inside &= left + width <= WINDOW["width"] and top + height <= WINDOW["height"]
        assert inside, title
    expect(page.get_by_test_id("error-overlay")).to_have_count(0)
    assert overlapping(boxes) == []
    screenshot(f"template {name}")

    assert open_advanced_inputs(page) == ADVANCED.get(name, 3)
    assert overlapping(drawn_boxes(page)) == []
    screenshot(f"template {name}, advanced")


def test_the_quick_start_from_photo_to_picture(page, server, picture, screenshot):
    page.set_viewport_size(WINDOW)
    open_template(page, QUICK_START)
    unused = len(server.get("/history"))  # a seed, so that the result is not at hand already
    values = {
        **QUICK,
        "LoadImage": {"image": picture},
        "SeFiTrainIdentity": {**QUICK["SeFiTrainIdentity"], "seed": unused},
        "SeFiSaveIdentity": {"file_name": "from_the_frontend"},
    }
    page.evaluate(SET_WIDGETS, values)
    first = server.wait(press_run(page))
    assert first.executed("SeFiTrainIdentity")
    for shown in ("SeFiFaceMask", "PreviewImage", "SaveImage"):
        page.wait_for_function(f"(type) => ({PICTURES})(type) === 1", arg=shown)
    # With the panel and all the pictures.
    assert overlapping(drawn_boxes(page)) == []
    screenshot("quick start, run")
    open_advanced_inputs(page)
    assert overlapping(drawn_boxes(page)) == []
    screenshot("quick start, run, advanced")

    # The sampler's seed changes by itself with every run; the person is not learned again.
    again = server.wait(press_run(page))
    assert again.executed("KSampler")
    assert not again.executed("SeFiTrainIdentity")


def test_a_prediction_is_kept_and_drawn_where_the_training_is_bypassed(page, server, picture):
    """As a note of the template says."""
    page.set_viewport_size(WINDOW)
    open_template(page, ENCODER)
    page.evaluate(
        SET_WIDGETS,
        {
            **QUICK,
            "LoadImage": {"image": picture},
            "SeFiLoadFaceEncoder": {"file": FACE_ENCODER.name},
            "SeFiSaveIdentity": {"file_name": "predicted"},
        },
    )
    page.evaluate(SELECT, "SeFiTrainIdentity")
    page.keyboard.press("Control+b")
    run = server.wait(press_run(page))
    assert not nodes_of(run.prompt, "SeFiTrainIdentity")
    (saving,) = nodes_of(run.prompt, "SeFiSaveIdentity")
    assert run.prompt[saving["inputs"]["identity"][0]]["class_type"] == "SeFiPredictIdentity"
    for shown in ("PreviewImage", "SaveImage"):
        assert len(run.pictures(shown)) == 1


def test_the_app_from_photo_to_picture(page, server, tmp_path, screenshot):
    page.set_viewport_size(WINDOW)
    open_template(page, APP)
    labels = page.get_by_test_id("builder-widget-label")
    expect(labels).to_have_text(["photo", "checkpoint", "name", "prompt", "steps"])
    screenshot("app, opened")

    # What a user of the app cannot and need not set, so that it takes seconds.
    unused = 1000 + len(server.get("/history"))
    trainer = {"preview_every": 1, "resolution": 128, "seed": unused}
    page.evaluate(SET_WIDGETS, {**QUICK, "SeFiTrainIdentity": trainer})
    photo = tmp_path / "eileen.png"
    Image.fromarray(skimage.data.astronaut()).save(photo)
    asked = page.get_by_test_id("app-mode-widget-item")
    with page.expect_file_chooser() as chosen:
        asked.nth(0).get_by_text("Click to browse").click()
    chosen.value.set_files(photo)
    expect(asked.nth(0).locator("img").first).to_be_visible()
    asked.nth(2).locator("input").fill("vera")
    asked.nth(3).locator("textarea").fill("a photo of <vera> in the forest")
    steps = asked.nth(4).locator("input")
    steps.fill("6")
    steps.press("Enter")
    screenshot("app, ready")

    with page.expect_response("**/api/prompt") as answer:
        page.get_by_test_id("linear-run-button").get_by_role("button", name="Run").click()
    shown = page.locator("img[src^='blob:']")
    expect(shown.first).to_be_visible(timeout=60_000)
    screenshot("app, learning")
    run = server.wait(answer.value.json()["prompt_id"])
    assert run.executed("SeFiTrainIdentity")
    (words,) = (
        node["inputs"]
        for node in run.prompt.values()
        if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]
    )
    assert words["text"] == "a photo of <vera> in the forest"
    (trained,) = (n for n in run.prompt.values() if n["class_type"] == "SeFiTrainIdentity")
    assert (trained["inputs"]["name"], trained["inputs"]["steps"]) == ("vera", 6)
    drawn = page.locator("img[src*='filename=anna']:visible")
    expect(drawn.first).to_be_visible()
    page.wait_for_function(
        "(image) => image.naturalWidth === 128", arg=drawn.first.element_handle()
    )
    screenshot("app, drawn")


def test_a_photo_without_a_face_is_told_in_one_sentence(page, server, tmp_path):
    black = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(black)
    open_template(page, QUICK_START)
    page.evaluate(SET_WIDGETS, {**QUICK, "LoadImage": {"image": server.upload(black)}})
    press_run(page)
    page.get_by_role("button", name="View details").click()
    sentence = "sefi_ide.SeFiError: SeFi Face Mask: no face was found"
    expect(page.get_by_text(sentence)).to_be_visible()


def test_the_help_page_of_a_node_opens(page):
    open_template(page, QUICK_START)
    page.evaluate(SELECT, "SeFiTrainIdentity")
    page.get_by_test_id("info-button").click()
    expect(page.get_by_role("heading", name="How to use it")).to_be_visible()
