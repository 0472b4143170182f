"""What toasts say before and after a run."""

import pytest
from playwright.sync_api import expect
from sefi_ide.tests.server.browser.frontend import press_run
from sefi_ide.tests.server.browser.identities import (
    load_and_draw,
    open_prompt,
    prompt_field,
    put_identity,
)

TOASTS = ".p-toast-message"


@pytest.fixture(scope="module", autouse=True)
def files(server):
    made = [
        put_identity(server, "anna.safetensors", "anna"),
        put_identity(server, "carla.safetensors", "carla", family="sdxl"),
    ]
    yield
    for file in made:
        file.unlink()
    server.post("/settings", {"Comfy.RightSidePanel.IsOpen": False})


def test_a_wrong_placeholder_is_told_before_the_run(page, server, screenshot):
    text = "<Anna> and <bob>, <lora:cat:1>, <think>x</think>, 1 < 2 > 1"
    open_prompt(page, load_and_draw(text=text))
    prompt = prompt_field(page, text)
    run = press_run(page)
    warnings = page.locator(TOASTS).filter(has_text="is no identity here")
    expect(warnings).to_have_count(2)
    expect(warnings.filter(has_text="<Anna> is")).to_contain_text("Did you mean <anna>?")
    expect(warnings.filter(has_text="<bob> is")).to_contain_text(
        "read as plain text. Known: <anna>."
    )
    screenshot("wrong_placeholder")
    assert server.wait(run).executed("KSampler")  # it warns, and does not stand in the way

    for close in page.locator(f"{TOASTS} button").all():
        close.click(force=True)
    expect(warnings).to_have_count(0)
    prompt.fill("<anna>, <lora:cat:1>, <think>x</think>")
    server.wait(press_run(page))
    expect(warnings).to_have_count(0)

    # A subgraph's text is the text of the node that stands for it.
    page.evaluate("() => app.canvas.selectItems([3, 4].map((id) => app.graph.getNodeById(id)))")
    page.locator("#graph-canvas").focus()
    page.keyboard.press("Control+Shift+E")
    page.wait_for_function("() => app.graph.nodes.some((node) => node.subgraph)")
    prompt_field(page, "<anna>, <lora:cat:1>, <think>x</think>").fill("a photo of <vera>")
    press_run(page)
    expect(warnings).to_contain_text("<vera>")


def test_an_error_is_told_by_its_sentence_once(page, screenshot):
    open_prompt(page, load_and_draw(file="carla.safetensors"))
    press_run(page)
    told = page.locator(TOASTS).filter(has_text="SeFi Apply Identity")
    expect(told).to_contain_text("The identity <carla> was learned on SDXL")
    expect(told).to_have_count(1)
    screenshot("error")
    # The frontend's own button is free, and what it opens has the sentence as well.
    page.get_by_role("button", name="View details").click(timeout=2000)
    expect(told).to_have_count(0)
