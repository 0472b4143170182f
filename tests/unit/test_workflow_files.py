"""The shipped workflow files are sound and tidy, whatever the server makes of them."""

import itertools
import re

import pytest
from PIL import Image
from sefi_ide.tools.templates import ALL, APP, ENCODER, FOLDER, template

TITLE_BAR = 30  # pixels above a node's position


@pytest.fixture(params=ALL)
def workflow(request):
    return template(request.param)


def texts(workflow):
    """Everything that is written in its notes."""
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    return "\n".join(text for note in notes for text in note["widgets_values"])


def test_every_file_has_a_name_in_the_code():
    assert sorted(ALL) == sorted(file.stem for file in FOLDER.glob("*.json"))


def test_every_template_has_a_square_thumbnail_and_no_other_is_there():
    thumbnails = list(FOLDER.glob("*.jpg"))
    assert sorted(ALL) == sorted(file.stem for file in thumbnails)
    for file in thumbnails:
        width, height = Image.open(file).size
        assert width == height


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


def test_no_node_lies_on_another_and_each_lies_in_a_group_or_is_a_note(workflow):
    boxes = [
        (node["pos"][0], node["pos"][1] - TITLE_BAR, node["size"][0], node["size"][1] + TITLE_BAR)
        for node in workflow["nodes"]
    ]
    for a, b in itertools.combinations(boxes, 2):
        apart_x = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0]
        apart_y = a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
        assert apart_x or apart_y, f"the nodes at {a} and {b} overlap"
    groups = [group["bounding"] for group in workflow["groups"]]
    for box in boxes:
        assert any(
            group[0] <= box[0]
            and group[1] <= box[1]
            and box[0] + box[2] <= group[0] + group[2]
            and box[1] + box[3] <= group[1] + group[3]
            for group in groups
        ), f"the node at {box} is in no group"


def test_it_says_where_to_start_in_a_few_words_and_names_the_checkpoint_to_get(workflow):
    kinds = [node["type"] for node in workflow["nodes"]]
    assert workflow["nodes"][0]["title"] == "Start here"
    loader = workflow["nodes"][kinds.index("CheckpointLoaderSimple")]
    assert loader["properties"]["models"][0]["name"] == loader["widgets_values"][0]
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            assert len(node["widgets_values"][0].split()) <= 100, node["title"]


def test_it_names_no_file_of_the_user_s_that_may_not_be_there(workflow):
    """Photos, identities, encoders and adapters; ComfyUI calls a name without a file missing."""
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":
            assert node["widgets_values"][0] == ""
        if node["type"] in ("SeFiLoadIdentity", "SeFiLoadFaceEncoder", "SeFiLoadFaceAdapter"):
            assert node["widgets_values"] == []


def test_templates_and_placeholders_that_are_named_in_notes_exist(workflow):
    learned = [
        n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "SeFiTrainIdentity"
    ]
    loaded = [node for node in workflow["nodes"] if node["type"] == "SeFiLoadIdentity"]
    known = learned or ["anna", "ben"][: len(loaded)]
    assert set(re.findall(r"`<(\w+)>`", texts(workflow))) <= {*known}
    prompts = [n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "CLIPTextEncode"]
    assert set(re.findall(r"<(\w+)>", " ".join(prompts))) == {*known}
    for name in re.findall(r"template \*([^*]+)\*", texts(workflow)):
        assert any(known.startswith(name) for known in ALL), name


def test_the_training_goes_on_from_what_the_encoder_says_of_the_same_photo():
    workflow = template(ENCODER)
    (encoder, predicting, training) = (
        next(node for node in workflow["nodes"] if node["type"] == kind)
        for kind in ("SeFiLoadFaceEncoder", "SeFiPredictIdentity", "SeFiTrainIdentity")
    )
    sources = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def source(node, name):
        (slot,) = (slot for slot in node["inputs"] if slot["name"] == name)
        return sources[slot["link"]]

    assert source(predicting, "face_encoder") == (encoder["id"], 0)
    assert source(training, "identity") == (predicting["id"], 0)
    for name in ("photos", "masks"):
        assert source(training, name) == source(predicting, name)
    # Name and class word: the training refuses to go on from another class word.
    assert training["widgets_values"][:2] == predicting["widgets_values"][:2]


def test_an_app_asks_for_widgets_that_exist_and_shows_the_picture(workflow):
    data = workflow["extra"]["linearData"]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node_id, name in data["inputs"]:
        assert name in {slot["name"] for slot in nodes[node_id]["inputs"] if "widget" in slot}
    pictures = [node["id"] for node in workflow["nodes"] if node["type"] == "SaveImage"]
    assert data["outputs"] == pictures
    assert workflow["extra"].get("linearMode", False) == (workflow == template(APP))


def test_it_has_no_id_of_its_own(workflow):
    """Each time that a template is opened it is another workflow, with trainings of its own."""
    assert "id" not in workflow
