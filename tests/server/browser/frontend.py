"""What the tests in the real frontend share: opening a template, setting widgets, pressing Run."""

from sefi_ide.tools.server import PACK

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


def open_template(page, name):
    """Open one of the pack's templates as a user does, by its title."""
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text(PACK, exact=True).click()
    page.get_by_role("heading", name=name, exact=True).click()  # its description says it, too
    page.wait_for_function("(name) => document.title.includes(name)", arg=name)


def press_run(page):
    """Press Run; returns the prompt's id once it has been queued."""
    with page.expect_response("**/api/prompt") as answer:
        page.get_by_test_id("queue-button").click()
    return answer.value.json()["prompt_id"]
