"""Typing ``<`` in a prompt, in every place of the frontend that has a text field for it."""

import re

import pytest
from playwright.sync_api import expect
from sefi_ide.tests.server.browser.identities import (
    QUEUED,
    load_and_draw,
    node,
    open_prompt,
    prompt_field,
    put_identity,
)

LIST = ".sefi-completion"
SETTING = "SeFi.Completion"


@pytest.fixture(scope="module", autouse=True)
def files(server):
    made = [
        put_identity(server, "anna.safetensors", "anna"),
        put_identity(server, "people/bob.safetensors", "bob", class_word="old man"),
    ]
    yield
    for file in made:
        file.unlink()
    server.post("/settings", {SETTING: True})


@pytest.fixture
def prompt(page):
    """A small graph; returns its prompt's text field, with the caret at the end."""
    graph = load_and_draw()
    graph["10"] = node("SeFiTrainIdentity", name="zoe", class_word="cat")
    open_prompt(page, graph)
    field = prompt_field(page, "a photo of ")
    field.click()
    page.keyboard.press("End")
    return field


def test_the_list_is_used_by_keys_and_by_mouse(page, prompt, screenshot):
    offered, keys = page.locator(f"{LIST} [role=option]"), page.keyboard
    chosen = page.locator(f"{LIST} [aria-selected=true]")
    keys.type("<")
    expect(offered).to_have_text(
        ["<anna>personin this graph", "<zoe>catin this graph", "<bob>old manpeople/bob"]
    )
    expect(chosen).to_contain_text("<anna>")
    caret, box = prompt.bounding_box(), page.locator(LIST).bounding_box()
    assert caret["x"] < box["x"] < caret["x"] + 250
    assert caret["y"] < box["y"] < caret["y"] + 60
    screenshot("completion")

    keys.press("ArrowDown")
    keys.press("ArrowDown")
    expect(chosen).to_contain_text("<bob>")
    keys.press("ArrowDown")
    keys.press("ArrowUp")
    keys.press("Enter")
    expect(prompt).to_have_value("a photo of <bob>")
    keys.type(" <Z")
    expect(offered).to_have_count(1)
    keys.press("Tab")
    keys.type(", <")
    offered.filter(has_text="<anna>").click()
    expect(prompt).to_have_value("a photo of <bob> <zoe>, <anna>")
    assert page.evaluate(QUEUED)["4"]["inputs"]["text"] == "a photo of <bob> <zoe>, <anna>"

    # In the middle of a placeholder the rest of it is replaced.
    for _ in range(3):
        keys.press("ArrowLeft")
    keys.press("Backspace")
    expect(page.locator(LIST)).to_be_visible()
    keys.press("Enter")
    expect(prompt).to_have_value("a photo of <bob> <zoe>, <anna>")


def test_the_list_keeps_out_of_the_way(page, prompt):
    keys, field = page.keyboard, page.locator(LIST)
    keys.type("<lora:")
    expect(field).to_be_hidden()
    keys.type("anna:1> 1 < 2 <nobody")
    expect(field).to_be_hidden()
    keys.type(" <an")
    expect(field).to_be_visible()
    keys.press("Escape")
    expect(field).to_be_hidden()
    keys.press("Enter")  # is the field's own again
    expect(prompt).to_have_value("a photo of <lora:anna:1> 1 < 2 <nobody <an\n")
    keys.type("<")
    expect(field).to_be_visible()
    keys.press("ArrowLeft")
    expect(field).to_be_hidden()
    keys.press("ArrowRight")
    keys.type("a")
    expect(field).to_be_visible()
    page.locator("#graph-canvas").click(position={"x": 300, "y": 900})
    expect(field).to_be_hidden()

    keys.press("Control+,")
    page.get_by_placeholder(re.compile("Search")).last.fill("placeholders")
    page.wait_for_timeout(1500)  # the dialog filters a moment after the typing
    setting = page.get_by_role("switch", name=re.compile("")).last
    with page.expect_response(f"**/settings/{SETTING}"):
        setting.click()
    keys.press("Escape")
    prompt.click()
    keys.press("End")
    keys.type(" <a")
    page.wait_for_timeout(300)  # longer than the list takes
    expect(field).to_be_hidden()
    page.evaluate("(id) => app.extensionManager.setting.set(id, true)", SETTING)


def test_subgraphs_and_app_mode_complete_too(page, prompt, screenshot):
    inside = "() => app.canvas.selectItems([2, 3, 4].map((id) => app.graph.getNodeById(id)))"
    page.evaluate(inside)
    page.locator("#graph-canvas").focus()
    page.keyboard.press("Control+Shift+E")
    page.wait_for_function("() => app.graph.nodes.some((node) => node.subgraph)")
    field = prompt_field(page, "a photo of ")
    field.click()
    page.keyboard.press("End")
    page.keyboard.type("<an")
    expect(page.locator(LIST)).to_contain_text("in this graph")
    page.keyboard.press("Enter")
    expect(field).to_have_value("a photo of <anna>")

    open_prompt(page, load_and_draw())
    app_mode = {"linearMode": True, "linearData": {"inputs": [["4", "text"]], "outputs": ["9"]}}
    page.evaluate(
        "(extra) => app.loadGraphData(Object.assign(app.graph.serialize(), { extra }))", app_mode
    )
    field = page.locator("textarea:visible")
    field.click()
    page.keyboard.press("End")
    page.keyboard.type("<")
    expect(page.locator(LIST)).to_contain_text("<bob>")
    screenshot("completion_in_app_mode")
    page.keyboard.press("Tab")
    expect(field).to_have_value("a photo of <anna>")
    assert page.evaluate(QUEUED)["4"]["inputs"]["text"] == "a photo of <anna>"
