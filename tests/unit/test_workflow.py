"""Saved workflows become the prompts that the frontend would queue."""

import pytest
from sefi_ide.tools.workflow import nodes_of, to_prompt

# As /object_info of ComfyUI 0.30 describes them, V1 (lists of values) and V3 (COMBO) alike.
OBJECT_INFO = {
    "LoadImage": {
        "input": {"required": {"image": [["a.png", "b.png"], {"image_upload": True}]}},
        "input_order": {"required": ["image"]},
    },
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "sampler_name": ["COMBO", {"options": ["euler", "ddim"]}],
                "latent": ["LATENT"],
                "cfg": ["FLOAT", {"default": 8.0}],
            },
            "optional": {"steps": ["INT", {}], "words": ["STRING", {"forceInput": True}]},
        },
        # The order of the dict above is not the order of the widgets.
        "input_order": {
            "required": ["model", "cfg", "seed", "sampler_name", "latent"],
            "optional": ["words", "steps"],
        },
    },
    "Trainer": {
        "input": {
            "required": {
                "seed": ["INT", {"control_after_generate": False}],
                "noise_seed": ["INT", {}],
                "layers": ["COMBO", {"options": ["a", "b"], "multiselect": True}],
            }
        },
        "input_order": {"required": ["seed", "noise_seed", "layers"]},
    },
    "Model": {"input": {"required": {}}, "input_order": {"required": []}},
    "Scale": {
        "input": {"required": {"image": ["IMAGE", {}], "model": ["MODEL", {}]}},
        "input_order": {"required": ["image", "model"]},
    },
    "Save": {"input": {"required": {"images": ["IMAGE", {}]}}, "input_order": {}},
}


def saved(*nodes, links=()):
    return {"nodes": list(nodes), "links": [list(link) for link in links]}


def node(node_id, kind, values=(), inputs=(), outputs=(), mode=0):
    return {
        "id": node_id,
        "type": kind,
        "mode": mode,
        "widgets_values": list(values),
        "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
        "outputs": [{"name": t, "type": t} for t in outputs],
    }


def test_values_go_to_widgets_in_the_order_the_frontend_makes_them():
    sampler = node(3, "Sampler", [7.5, 42, "randomize", "ddim", 20], [("model", "MODEL", 1)])
    model = node(1, "Model", outputs=["MODEL"])
    prompt = to_prompt(saved(sampler, model, links=[(1, 1, 0, 3, 0, "MODEL")]), OBJECT_INFO)
    assert prompt["3"] == {
        "class_type": "Sampler",
        "inputs": {
            "cfg": 7.5,
            "seed": 42,
            "sampler_name": "ddim",
            "steps": 20,
            "model": ["1", 0],
        },
    }


def test_only_a_seed_without_a_wish_of_its_own_gets_the_control_value():
    trainer = node(5, "Trainer", [1, 2, "fixed", ["a", "b"]])
    inputs = to_prompt(saved(trainer), OBJECT_INFO)["5"]["inputs"]
    assert inputs == {"seed": 1, "noise_seed": 2, "layers": {"__value__": ["a", "b"]}}


def test_the_upload_button_is_no_input():
    load = node(2, "LoadImage", ["a.png", "image"], outputs=["IMAGE", "MASK"])
    assert to_prompt(saved(load), OBJECT_INFO)["2"]["inputs"] == {"image": "a.png"}


def test_a_linked_widget_takes_the_link_and_keeps_the_others_in_place():
    source = node(1, "Model", outputs=["INT"])
    inputs = [("model", "MODEL", None), ("seed", "INT", 9)]
    sampler = node(3, "Sampler", [7.5, 42, "fixed", "ddim", 20], inputs)
    prompt = to_prompt(saved(source, sampler, links=[(9, 1, 0, 3, 1, "INT")]), OBJECT_INFO)
    assert prompt["3"]["inputs"]["seed"] == ["1", 0]
    assert prompt["3"]["inputs"]["sampler_name"] == "ddim"
    assert "model" not in prompt["3"]["inputs"]


def test_notes_reroutes_and_primitives_exist_in_the_browser_only():
    graph = saved(
        node(1, "LoadImage", ["a.png", "image"], outputs=["IMAGE"]),
        node(2, "Reroute", inputs=[("", "*", 1)], outputs=["IMAGE"]),
        node(3, "Save", inputs=[("images", "IMAGE", 2)]),
        node(4, "MarkdownNote", ["read me"]),
        node(5, "PrimitiveNode", [7, "fixed"], outputs=["INT"]),
        node(6, "Sampler", [7.5, 7, "fixed", "ddim", 20], [("seed", "INT", 3)]),
        links=[
            (1, 1, 0, 2, 0, "IMAGE"),
            (2, 2, 0, 3, 0, "IMAGE"),
            (3, 5, 0, 6, 0, "INT"),
        ],
    )
    prompt = to_prompt(graph, OBJECT_INFO)
    assert set(prompt) == {"1", "3", "6"}
    assert prompt["3"]["inputs"] == {"images": ["1", 0]}
    assert prompt["6"]["inputs"]["seed"] == 7
    assert nodes_of(prompt, "Save") == [prompt["3"]]


@pytest.mark.parametrize(("mode", "expected"), [(4, {"images": ["1", 0]}), (2, {})])
def test_a_bypassed_node_passes_its_input_on_and_a_muted_one_nothing(mode, expected):
    scale = node(2, "Scale", [], [("model", "MODEL", None), ("image", "IMAGE", 1)], ["IMAGE"], mode)
    graph = saved(
        node(1, "LoadImage", ["a.png", "image"], outputs=["IMAGE"]),
        scale,
        node(3, "Save", inputs=[("images", "IMAGE", 2)]),
        links=[(1, 1, 0, 2, 1, "IMAGE"), (2, 2, 0, 3, 0, "IMAGE")],
    )
    prompt = to_prompt(graph, OBJECT_INFO)
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"] == expected


def test_a_node_saved_without_values_has_its_defaults():
    nodes = [node(1, "LoadImage"), node(2, "Sampler"), node(3, "Save")]
    prompt = to_prompt(saved(*nodes), OBJECT_INFO)
    assert prompt["1"]["inputs"] == {"image": "a.png"}
    assert prompt["2"]["inputs"] == {"cfg": 8.0, "sampler_name": "euler"}
    assert prompt["3"]["inputs"] == {}


def test_widgets_that_a_node_has_gained_since_have_their_defaults():
    prompt = to_prompt(saved(node(3, "Sampler", [7.5, 42, "fixed"])), OBJECT_INFO)
    assert prompt["3"]["inputs"] == {"cfg": 7.5, "seed": 42, "sampler_name": "euler"}


def test_more_values_than_the_node_has_widgets_are_refused():
    values = [7.5, 42, "fixed", "ddim", 20, 1]
    with pytest.raises(ValueError, match=r"Sampler \(3\) is saved with 6 widget values"):
        to_prompt(saved(node(3, "Sampler", values)), OBJECT_INFO)


def test_a_node_that_the_server_lacks_is_named():
    with pytest.raises(ValueError, match="no node 'Nowhere'"):
        to_prompt(saved(node(1, "Nowhere")), OBJECT_INFO)
