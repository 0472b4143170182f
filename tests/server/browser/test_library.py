"""SeFi Load Identity's card, files that were just saved, and advanced inputs, in the frontend."""

import pytest
from playwright.sync_api import expect
from sefi_ide.tests.server.browser.frontend import press_run
from sefi_ide.tests.server.browser.identities import (
    PLACE,
    QUEUED,
    header_only,
    load_and_draw,
    node,
    open_prompt,
    put_file,
    put_identity,
)

ATTACK = "<img src=x onerror=window.attacked=1>"
SAVED = "just_saved.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(server):
    """An identity, one of SDXL, a file that means harm, and a checkpoint that says what it is."""
    hostile = {"format": "sefi-identity", "name": ATTACK, "class_word": ATTACK, "family": ATTACK}
    hostile |= {"training": "{", "modelspec.date": ATTACK}
    hostile |= {"modelspec.thumbnail": "data:image/svg+xml;base64,PHN2Zy8+"}
    sdxl = {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    made = [
        put_identity(server, "anna.safetensors", "anna", class_word="old man"),
        put_identity(server, "people/carla.safetensors", "carla", family="sdxl", steps=1),
        put_file(server, "sefi/hostile.safetensors", header_only(hostile)),
        put_file(server, "checkpoints/xl.safetensors", header_only(sdxl)),
    ]
    yield
    for file in [*made, server.directory / "models" / "sefi" / SAVED]:
        file.unlink(missing_ok=True)


def choose_file(page, file):
    """Choose a file in SeFi Load Identity as a person does, whichever way nodes are drawn."""
    lists = page.locator(".lg-node").filter(has_text="SeFiLoadIdentity").get_by_role("combobox")
    if lists.count():
        lists.first.click()
    else:
        page.mouse.click(*page.evaluate(PLACE, ["SeFiLoadIdentity", "file"]))
    page.get_by_text(file, exact=True).last.click()


def test_the_card_shows_whom_the_chosen_file_holds(page, screenshot):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_prompt(page, load_and_draw(checkpoint="xl.safetensors"))
    card = page.locator(".sefi-card")
    expect(card).to_contain_text("<anna>")
    expect(card).to_contain_text("old man · SD 1.x")
    expect(card).to_contain_text("Does not fit: the checkpoint is SDXL")
    assert (
        card.locator("img").evaluate("(face) => face.decode().then(() => face.naturalWidth)") > 64
    )
    card.get_by_role("button", name="Copy <anna>").click()
    expect(card).to_contain_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == "<anna>"
    screenshot("card_of_another_family")

    choose_file(page, "people/carla.safetensors")
    expect(card).to_contain_text("<carla>")
    expect(card).to_contain_text("1 step")
    expect(card).not_to_contain_text("Does not fit")
    screenshot("card")

    choose_file(page, "hostile.safetensors")
    expect(card).to_contain_text(f"<{ATTACK}>")
    expect(card).to_contain_text(f"{ATTACK} · {ATTACK}")
    expect(card.locator("img")).to_have_count(0)
    assert page.evaluate("() => window.attacked") is None
    screenshot("card_of_a_hostile_file")

    values = page.evaluate(QUEUED)["2"]["inputs"]
    assert values == {"file": "hostile.safetensors", "name": ""}


def test_an_identity_just_saved_is_not_missing(page, server):
    open_prompt(page, load_and_draw())
    page.evaluate("(file) => (app.graph.getNodeById('2').widgets[0].value = file)", SAVED)
    next_workflow = page.evaluate("() => app.graph.serialize()")
    missing = page.get_by_test_id("error-overlay").filter(has_text=SAVED)
    page.evaluate("(workflow) => app.loadGraphData(workflow)", next_workflow)
    expect(missing).to_be_visible()

    save = {
        "1": node("SeFiLoadIdentity", file="anna.safetensors", name=""),
        "2": node("SeFiSaveIdentity", identity=["1", 0], file_name=SAVED, if_exists="overwrite"),
    }
    open_prompt(page, save)
    with page.expect_response("**/object_info"):
        server.wait(press_run(page))
    choose_file(page, SAVED)
    expect(page.locator(".sefi-card")).to_contain_text("<anna>")

    page.evaluate("(workflow) => app.loadGraphData(workflow)", next_workflow)
    expect(page.locator(".sefi-card")).to_contain_text("<anna>")
    expect(missing).to_be_hidden()
    (server.directory / "models" / "sefi" / SAVED).unlink()


def test_advanced_inputs_fold_away_in_both_kinds_of_nodes(page, request, screenshot):
    train = node("SeFiTrainIdentity", stages=7, templates="a sketch of <name>")
    open_prompt(page, {"1": train})
    height = "() => app.graph.nodes[0].size[1]"
    templates = page.locator("textarea:visible").and_(page.locator(":not([disabled])"))
    expect(templates).to_have_count(1)  # the captions
    screenshot("advanced_inputs_folded")
    if request.node.callspec.params["page"] == "vue":
        expect(page.get_by_text("Show advanced inputs")).to_have_count(1)
        page.get_by_text("Show advanced inputs").click()
        expect(templates).to_have_count(2)
    else:
        folded = page.evaluate(height)
        page.mouse.click(*page.evaluate(PLACE, ["SeFiTrainIdentity", "advanced_inputs"]))
        expect(templates).to_have_count(2)
        screenshot("advanced_inputs_shown")
        assert page.evaluate(height) > folded + 100
        page.mouse.click(*page.evaluate(PLACE, ["SeFiTrainIdentity", "advanced_inputs"]))
        expect(templates).to_have_count(1)
        assert page.evaluate(height) < folded + 10

    # The values are the saved ones, seen or not, also after the workflow has been opened again.
    for again in (False, True):
        if again:
            page.evaluate("() => app.loadGraphData(app.graph.serialize())")
        queued = page.evaluate(QUEUED)["1"]["inputs"]
        assert (queued["stages"], queued["templates"]) == (7, "a sketch of <name>")
        assert queued["vectors"] == 1
        assert "advanced_inputs" not in queued
