"""The shipped workflow files are sound and tidy, whatever the server makes of them."""

import itertools
import json

import pytest
from sefi_ide.tools.comfyui import REPOSITORY

FILES = sorted((REPOSITORY / "workflows").glob("*.json"))
TITLE_BAR = 30  # pixels above a node's position


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_links_and_slots_name_each_other(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    from_slots = set()
    for node in nodes.values():
        for index, slot in enumerate(node["inputs"]):
            if slot["link"] is not None:
                from_slots.add((slot["link"], "input", node["id"], index, slot["type"]))
        for index, slot in enumerate(node["outputs"]):
            for link in slot["links"] or []:
                from_slots.add((link, "output", node["id"], index, slot["type"]))
    from_links = set()
    for link, origin, output, target, index, kind in workflow["links"]:
        from_links |= {(link, "output", origin, output, kind), (link, "input", target, index, kind)}
    assert from_slots == from_links
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])


def test_no_node_lies_on_another(workflow):
    boxes = [(node["pos"], node["size"], node["type"]) for node in workflow["nodes"]]
    for (a, a_size, a_type), (b, b_size, b_type) in itertools.combinations(boxes, 2):
        apart_x = a[0] + a_size[0] <= b[0] or b[0] + b_size[0] <= a[0]
        apart_y = a[1] + a_size[1] + TITLE_BAR <= b[1] or b[1] + b_size[1] + TITLE_BAR <= a[1]
        assert apart_x or apart_y, f"{a_type} and {b_type} overlap"


def test_it_has_a_note_and_names_the_checkpoint_to_get(workflow):
    kinds = [node["type"] for node in workflow["nodes"]]
    assert "MarkdownNote" in kinds
    loader = workflow["nodes"][kinds.index("CheckpointLoaderSimple")]
    assert loader["properties"]["models"][0]["name"] == loader["widgets_values"][0]
