"""The shipped workflows in the real frontend, in headless Chromium, as a user meets them.

Skipped where there is no Chromium or Chrome.
"""

import json
import shutil

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.server import PACK
from sefi_ide.tools.workflow import to_prompt

WORKFLOWS = sorted(file.stem for file in (REPOSITORY / "workflows").glob("*.json"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Chromium as root, without a graphics card, and quiet: it asks the network for nothing.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]

SET_WIDGETS = """(values) => {
    for (const node of app.graph.nodes)
        for (const [name, value] of Object.entries(values[node.type] ?? {})) {
            const widget = node.widgets.find((widget) => widget.name === name)
            widget.value = value
            widget.callback?.(value)
        }
}"""
SELECT = "(type) => app.canvas.selectNode(app.graph.nodes.find((node) => node.type === type))"
PICTURES = "(type) => app.graph.nodes.find((node) => node.type === type).imgs?.length ?? 0"


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(params=["classic", "vue"])
def page(request, browser, server):
    """The frontend, with nodes drawn in either way; no script of it may fail."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": request.param == "vue",
    }
    server.post("/settings", settings)
    with browser.new_context(viewport={"width": 1800, "height": 1100}) as context:
        page = context.new_page()
        failures = []
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(server.url)
        yield page
    assert not failures


def open_template(page, name):
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text(PACK, exact=True).click()
    page.get_by_text(name, exact=True).click()
    page.wait_for_function("(name) => document.title.includes(name)", arg=name)


def press_run(page):
    """Press Run; returns the prompt's id once it has been queued."""
    with page.expect_response("**/api/prompt") as answer:
        page.get_by_test_id("queue-button").click()
    return answer.value.json()["prompt_id"]


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
