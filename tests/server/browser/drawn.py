"""Where on the screen nodes are drawn, in either renderer."""

import itertools

DRAWN = """() => {
    const { ds } = app.canvas
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return app.graph.nodes.map((node) => {
        // Nodes 2.0 are elements, whatever size the graph has for them.
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        if (element) {
            const { left, top, width, height } = element.getBoundingClientRect()
            return [node.title, left, top, width, height]
        }
        const [left, top, width, height] = node.boundingRect // with the title bar
        const x = canvas.left + (left + ds.offset[0]) * ds.scale
        const y = canvas.top + (top + ds.offset[1]) * ds.scale
        return [node.title, x, y, width * ds.scale, height * ds.scale]
    })
}"""
"""Title, left, top, width and height of each node in pixels of the screen."""

ADVANCED = """() => app.graph.nodes.flatMap((node) => {
    const button = node.widgets?.find((widget) => widget.label === "Show advanced inputs")
    if (!button) return []
    const [x, y] = node.pos
    return [app.canvasPosToClientPos([x + node.size[0] / 2, y + button.last_y + 10])]
})"""
"""Where classic nodes draw their buttons for advanced inputs."""


def drawn_boxes(page) -> list[list]:
    """Title, left, top, width and height of each node, once nothing moves any more."""
    before, boxes = None, page.evaluate(DRAWN)
    while boxes != before:
        page.wait_for_timeout(300)
        before, boxes = boxes, page.evaluate(DRAWN)
    return boxes


def overlapping(boxes: list[list]) -> list[tuple[str, str]]:
    """The titles of all pairs of nodes of which one is drawn over the other, by over a pixel."""
    return [
        (a[0], b[0])
        for a, b in itertools.combinations(boxes, 2)
        if min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) > 1
        and min(a[2] + a[4], b[2] + b[4]) - max(a[2], b[2]) > 1
    ]


def open_advanced_inputs(page) -> int:
    """Click on *Show advanced inputs* of every node; says how many there were."""
    shown = page.get_by_text("Show advanced inputs")
    count = shown.count()
    for left in range(count, 0, -1):
        shown.first.click()
        page.wait_for_function(
            "(left) => document.body.innerText.split('Show advanced inputs').length - 1 < left",
            arg=left,
        )
    places = page.evaluate(ADVANCED) if not count else []
    for place in places:
        page.mouse.click(*place)
    return count + len(places)
