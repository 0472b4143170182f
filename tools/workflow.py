"""Workflows as the frontend saves them, turned into prompts as the server runs them.

The frontend does this in the browser (``graphToPrompt`` in its ``executionUtil.ts``); the
server takes only the result. A saved node lists its widget values without their names, in the
order in which the frontend creates the widgets from ``/object_info``. Subgraphs and dynamic
combos are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Prompt = dict[str, dict[str, Any]]
"""Node id -> ``{"class_type": ..., "inputs": {name: value or [node id, output index]}}``."""

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}
MEDIA_UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload")
VIRTUAL_NODES = {"Note", "MarkdownNote", "PrimitiveNode", "Reroute"}
MUTED, BYPASSED = 2, 4


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """The prompt that the frontend would queue for ``workflow``.

    ``object_info`` is the server's answer to ``/object_info``. Raises ValueError when a node is
    unknown to the server or saved with more values than it has widgets.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    sources = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt: Prompt = {}
    for node in nodes.values():
        if node["type"] in VIRTUAL_NODES or node.get("mode") in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"The server has no node {node['type']!r}.")
        inputs = widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs", []):
            source = _source(slot.get("link"), nodes, sources)
            if source is not None:
                inputs[slot["name"]] = [str(source[0]), source[1]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The values of a saved node's widgets by input name; raises ValueError if there are too many.

    ``info`` is the node's entry of ``/object_info``. Widgets beyond the last saved value, such as
    those that a node has gained since, have their defaults: of a list that says none, the first.
    """
    names = list(_widget_names(info))
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {name: values[name] for name in names if name in values}
    if len(values) > len(names):
        raise ValueError(
            f"The node {node['type']} ({node['id']}) is saved with {len(values)} widget values, "
            f"but has the {len(names)} widgets {names}."
        )
    saved = {
        # A plain list would be read as a link.
        name: {"__value__": value} if isinstance(value, list) else value
        for name, value in zip(names, values, strict=False)
        if name is not None
    }
    return saved | _defaults(info, names[len(values) :])


def nodes_of(prompt: Prompt, class_type: str) -> list[dict[str, Any]]:
    """The nodes of one class, in the order of the workflow."""
    return [node for node in prompt.values() if node["class_type"] == class_type]


def _widget_names(info: dict[str, Any]) -> Iterator[str | None]:
    """Input names in widget order; None stands for a saved value that is no input."""
    upload = False
    for group in ("required", "optional"):
        specs = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, specs):
            kind, options = (list(specs[name]) + [{}])[:2]
            kind = "COMBO" if isinstance(kind, list) else options.get("widgetType", kind)
            upload |= any(options.get(key) for key in MEDIA_UPLOADS)
            if kind not in WIDGET_TYPES or options.get("forceInput"):
                continue
            yield name
            is_seed = kind == "INT" and name in ("seed", "noise_seed")
            control = options.get("control_after_generate")
            if is_seed if control is None else control:
                yield None  # fixed, increment, decrement or randomize
    if upload:
        yield None  # the button


def _defaults(info: dict[str, Any], names: list[str | None]) -> dict[str, Any]:
    """What the frontend puts into widgets without a saved value; nothing where it finds nothing."""
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    found = {}
    for name in filter(None, names):
        kind, options = (list(specs[name]) + [{}])[:2]
        choices = kind if isinstance(kind, list) else options.get("options", ())
        if "default" in options:
            found[name] = options["default"]
        elif choices:
            found[name] = choices[0]
    return found


def _source(
    link: int | None, nodes: dict[int, dict], sources: dict[int, tuple[int, int]]
) -> tuple[int, int] | None:
    """Node id and output index at the start of a link, past reroutes and bypassed nodes.

    None when nothing is left there, as behind a muted node; a widget linked to a primitive node
    keeps its own saved value.
    """
    while link is not None:
        origin, output = sources[link]
        node = nodes[origin]
        if node["type"] == "PrimitiveNode" or node.get("mode") == MUTED:
            return None
        if node["type"] == "Reroute":
            link = node["inputs"][0].get("link")
        elif node.get("mode") == BYPASSED:
            kind = node["outputs"][output]["type"]
            matching = (slot["link"] for slot in node["inputs"] if slot["type"] == kind)
            link = next(matching, None)
        else:
            return origin, output
    return None
