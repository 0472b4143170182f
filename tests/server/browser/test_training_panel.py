"""The panel on SeFi Train Identity, with real trainings of the miniature checkpoint."""

import re

import pytest
import skimage.data
from PIL import Image
from playwright.sync_api import expect
from sefi_ide.tests.server.browser.frontend import SET_WIDGETS, press_run
from sefi_ide.tests.server.conftest import MINI_SD
from sefi_ide.tools.server import ComfyServer
from sefi_ide.tools.templates import QUICK_START, template

HINT = "Run, and watch the training here."
SHOW_TRAINER = """() => {
    const node = app.graph.nodes.find((node) => node.type === "SeFiTrainIdentity")
    app.canvas.ds.scale = 1
    app.canvas.centerOnNode(node)
    app.canvas.setDirty(true, true)
}"""
FROM_A_NODE = """(text) => {
    const from = LiteGraph.createNode("PrimitiveString")
    from.widgets[0].value = text
    app.graph.add(from)
    const trainer = app.graph.nodes.find((node) => node.type === "SeFiTrainIdentity")
    from.connect(0, trainer, trainer.inputs.findIndex((input) => input.name === "class_word"))
}"""
INTO_A_SUBGRAPH = """() => {
    const trainer = app.graph.nodes.find((node) => node.type === "SeFiTrainIdentity")
    trainer.disconnectInput(trainer.inputs.findIndex((input) => input.name === "class_word"))
    const { node, subgraph } = app.graph.convertToSubgraph(new Set([trainer]))
    app.canvas.openSubgraph(subgraph, node)
}"""
HOSTILE = '<img src=x onerror="window.hacked = true">'
STEPS = re.compile(r"^step (\d+) of \d+$")


@pytest.fixture
def quick_start(server):
    """The quick start as a workflow of its own: without its id, of which there is one only."""
    workflow = template(QUICK_START)
    workflow.pop("id", None)
    yield workflow
    server.post("/interrupt", {})  # a test that failed has left its training running


def open_workflow(page, workflow):
    # The frontend first opens what was open last.
    page.wait_for_function("() => window.app?.extensionManager?.workflow.activeWorkflow")
    page.evaluate("(workflow) => app.loadGraphData(workflow, true, true, 'training')", workflow)
    page.evaluate(SHOW_TRAINER)


def prepare(page, picture, **training):
    training = {"preview_every": 4, "resolution": 128, "captions": "", **training}
    values = {
        "LoadImage": {"image": picture},
        "CheckpointLoaderSimple": {"ckpt_name": "mini_sd.safetensors"},
        "SeFiTrainIdentity": training,
        "EmptyLatentImage": {"width": 128, "height": 128},
        "KSampler": {"steps": 2},
    }
    page.evaluate(SET_WIDGETS, values)


def step_shown(page):
    return int(STEPS.match(page.get_by_text(STEPS).inner_text())[1])


def test_a_training_is_watched_through_a_reload_and_in_two_tabs_and_stopped(
    page, server, picture, quick_start, screenshot
):
    open_workflow(page, quick_start)
    prepare(page, picture, steps=400, seed=len(server.get("/history")))
    expect(page.get_by_text(HINT)).to_be_visible()
    screenshot("training-idle")
    prompt = press_run(page)
    expect(page.get_by_text("learning", exact=True)).to_be_visible(timeout=60_000)
    expect(page.get_by_text(HINT)).to_be_hidden()
    for name in ("photo", "attention", "preview"):
        expect(page.get_by_role("img", name=name, exact=True)).to_be_visible(timeout=60_000)
    expect(page.get_by_text(re.compile("^(About|A few) .* left.$"))).to_be_visible()
    height = page.locator(".sefi-training").bounding_box()["height"]
    before = step_shown(page)
    screenshot("training-running")

    page.reload()
    expect(page.get_by_text(STEPS)).to_be_visible(timeout=30_000)
    page.evaluate(SHOW_TRAINER)
    page.wait_for_timeout(500)
    screenshot("training-reloaded")
    assert step_shown(page) >= before
    again = step_shown(page)
    still = page.get_by_text(f"step {again} of 400", exact=True)
    expect(still).to_be_hidden(timeout=30_000)  # it goes on
    assert page.locator(".sefi-training").bounding_box()["height"] == height

    with page.context.new_page() as other:
        other.goto(server.url)
        open_workflow(other, quick_start)
        expect(other.get_by_text(HINT)).to_be_visible()  # another workflow does not train
        open_workflow(other, page.evaluate("app.graph.serialize()"))
        expect(other.get_by_text(STEPS)).to_be_visible()

        def deliver_late(route):
            while server.get("/queue")["queue_running"]:
                other.wait_for_timeout(200)
            route.continue_()

        page.get_by_role("button", name="Stop and keep").click()
        other.route("**/sefi/training/stop", deliver_late)
        other.get_by_role("button", name="Stop and keep").click()
        expect(other.get_by_text("there is nothing to stop")).to_be_visible(timeout=60_000)
        other.screenshot(path=screenshot("training-other").with_stem("training-other-tab"))

    run = server.wait(prompt)
    expect(page.get_by_text("stopped and kept", exact=True)).to_be_visible()
    page.wait_for_timeout(500)
    screenshot("training-stopped")
    assert run.executed("SaveImage") and run.pictures("SaveImage")


def test_a_failed_and_a_cancelled_training_say_so_also_in_a_subgraph(
    page, server, picture, quick_start, screenshot
):
    open_workflow(page, quick_start)
    prepare(page, picture, steps=400, seed=len(server.get("/history")))
    page.evaluate(FROM_A_NODE, HOSTILE)
    panel = page.locator(".sefi-training")
    press_run(page)
    expect(panel.get_by_text("failed", exact=True)).to_be_visible(timeout=60_000)
    expect(panel.get_by_text(HOSTILE)).to_be_visible()
    screenshot("training-failed")
    assert page.evaluate("window.hacked") is None
    assert panel.locator("img:visible").count() == 0

    page.evaluate(INTO_A_SUBGRAPH)
    expect(panel.get_by_text(HINT)).to_be_visible()
    press_run(page)
    going = re.compile(r"^step [1-9]\d* of 400$")
    expect(panel.get_by_text(STEPS)).to_have_text(going, timeout=60_000)
    page.get_by_role("button", name="Cancel current run").first.click()
    expect(panel.get_by_text("cancelled", exact=True)).to_be_visible(timeout=60_000)
    screenshot("training-cancelled")
    expect(panel.get_by_text(re.compile(r"^Cancelled at step \d+ of 400"))).to_be_visible()


def test_a_training_that_the_server_did_not_survive_goes_on(browser, quick_start, tmp_path):
    eileen = tmp_path / "eileen.png"
    Image.fromarray(skimage.data.astronaut()).save(eileen)
    with (
        ComfyServer(tmp_path / "comfyui", [MINI_SD]) as server,
        browser.new_page(viewport={"width": 1800, "height": 1100}) as page,
    ):
        server.post("/settings", {"Comfy.TutorialCompleted": True})
        page.goto(server.url)
        open_workflow(page, quick_start)
        prepare(page, server.upload(eileen), steps=400)
        panel = page.locator(".sefi-training")
        press_run(page)
        expect(panel.get_by_text("learning", exact=True)).to_be_visible(timeout=60_000)
        workflow = page.evaluate("app.graph.id")
        while not server.get(f"/sefi/training?workflow={workflow}")[0]["resumable"]:
            page.wait_for_timeout(500)
        page.wait_for_timeout(1000)  # the page has heard of it, too
        server._process.kill()
        server._process.wait()
        with server:
            offer = panel.get_by_text(
                re.compile(
                    r"^ComfyUI was restarted during the training\. "
                    r"Queue it again to go on from step \d+\.$"
                )
            )
            expect(offer).to_be_visible(timeout=60_000)
            press_run(page)
            going_on = panel.get_by_text(re.compile(r"^Going on from step \d+ of 400\."))
            expect(going_on).to_be_visible(timeout=60_000)
