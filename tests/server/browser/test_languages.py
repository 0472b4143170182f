"""Nodes and help pages in English and in Chinese, in the real frontend."""

import json

import pytest
from playwright.sync_api import expect
from sefi_ide.tests.server.browser.frontend import SELECT
from sefi_ide.tests.server.browser.identities import OPENED
from sefi_ide.tools.locales import LOCALES

NODE = "SeFiTrainIdentity"
ONE_NODE = {
    "version": 0.4,
    "last_node_id": 1,
    "last_link_id": 0,
    "nodes": [{"id": 1, "type": NODE, "pos": [300, 100], "size": [360, 600]}],
    "links": [],
}
"""A workflow of a node as it is when added: without a title of its own."""
DRAWN = """() => {
    const [node] = app.graph.nodes
    const labels = [...node.inputs, ...node.widgets].map((one) => [one.name, one.label])
    const sockets = node.inputs.map((input) => [input.name, input.localized_name])
    const shown = [...labels, ...sockets].filter(([, label]) => label)
    return [node.getTitle(), Object.fromEntries(shown)]
}"""
"""Title and labels that the canvas writes, which are no elements of the page."""
LOADED = "(picture) => picture.decode().then(() => picture.naturalWidth)"


@pytest.fixture
def speak(page, server):
    """``speak(language)`` opens the frontend anew in a language; English again in the end."""

    def open_in(language):
        server.post("/settings", {"Comfy.Locale": language})
        page.reload()
        page.wait_for_function(OPENED)
        page.evaluate("(workflow) => app.loadGraphData(workflow)", ONE_NODE)

    yield open_in
    server.post("/settings", {"Comfy.Locale": "en"})


@pytest.mark.parametrize(
    ("language", "heading"), [("en", "How to use it"), ("zh", "使用方法")], ids=["en", "zh"]
)
def test_a_node_and_its_help_page_speak(page, request, speak, screenshot, language, heading):
    texts = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))[NODE]
    missing = []
    page.on(
        "response",
        lambda answer: answer.status == 404 and "/docs/" in answer.url and missing.append(answer),
    )
    speak(language)
    hints = {"en": "Run, and watch the training here.", "zh": "运行后可在此处观看训练过程。"}
    expect(page.locator(".sefi-hint")).to_have_text(hints[language])
    label = texts["inputs"]["class_word"]["name"]
    if request.node.callspec.params["page"] == "vue":
        drawn = page.locator(".lg-node")
        expect(drawn).to_contain_text(texts["display_name"])
        expect(drawn).to_contain_text(label)
        expect(drawn).to_contain_text(texts["inputs"]["photos"]["name"])
        expect(drawn).to_contain_text(texts["outputs"]["2"]["name"])
    else:
        title, labels = page.evaluate(DRAWN)
        assert title == texts["display_name"]
        assert labels["class_word"] == label
        assert labels["photos"] == texts["inputs"]["photos"]["name"]

    page.evaluate(SELECT, NODE)
    page.get_by_test_id("info-button").click()
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    picture = page.locator(f"img[src*='/docs/{NODE}/']")
    assert picture.evaluate(LOADED) >= 200
    picture.scroll_into_view_if_needed()
    screenshot(f"help-{language}")
    assert not [answer.url for answer in missing]
