"""What a text node says of placeholders that its CLIP does not know."""

import html
import logging
import sys
from types import SimpleNamespace

import pytest
from comfy_execution.graph import DynamicPrompt
from comfy_execution.progress import reset_progress_state
from comfy_execution.utils import CurrentNodeContext
from sefi_ide.sefi_core.comfyui import notices
from sefi_ide.sefi_core.comfyui.clip import unknown
from sefi_ide.sefi_core.comfyui.clip.encoder import apply_to_clip
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity

from .made_identity import make_identity

BOB = "<bob> is no identity here and is read as plain text. Known: <anna>."
ANNA = "<Anna> is no identity here: did you mean <anna>?"


class Server:
    """Stands in for ComfyUI's, with a queue that runs one prompt of a workflow."""

    def __init__(self):
        self.client_id = "browser"
        self.workflow = {"id": "workflow"}
        self.sent = []
        self.prompt_queue = self

    def get_current_queue_volatile(self):
        extra = {"extra_pnginfo": {"workflow": self.workflow}}
        return [(0, prompt, {}, extra, [], {}) for prompt in ("one", "two")], []

    def send_progress_text(self, text, node_id, sid=None):
        assert sid == self.client_id
        self.sent.append((node_id, html.unescape(text)))
        assert not set("<>\"'") & set(text)

    def taken(self):
        sent, self.sent = self.sent, []
        return sent


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setitem(
        sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    )
    notices._told.clear()
    unknown._log_once.cache_clear()
    return server


@pytest.fixture
def clip(mini_sd):
    return apply_to_clip(mini_sd[1], AppliedIdentity(make_identity(width=128)))


def encode(clip, text, prompt="one", node="6"):
    with CurrentNodeContext(prompt, node):
        clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_the_node_that_encodes_says_it(server, clip):
    encode(clip, "a photo of <bob>")
    encode(clip, "a photo of <Anna>", node="7:3")
    encode(clip, "a photo of <anna> <lora:x:1>", node="8")
    assert server.taken() == [("6", BOB), ("7:3", ANNA)]


def test_several_texts_of_one_node_and_one_told_once(server, clip):
    encode(clip, "a photo of <bob>")
    encode(clip, "<Anna>")
    encode(clip, "a dog")
    encode(clip, "<bob>")
    assert server.taken() == [("6", BOB), ("6", f"{BOB}\n{ANNA}")]


def test_a_mended_text_takes_it_away(server, clip):
    encode(clip, "<bob>")
    encode(clip, "<Anna>", prompt="two")
    assert server.taken() == [("6", BOB), ("6", ANNA)]
    encode(clip, "")
    assert server.taken() == [("6", " ")]
    encode(clip, "", prompt="two")
    assert server.taken() == []


def test_a_node_of_another_workflow_is_left_alone(server, clip):
    encode(clip, "<bob>")
    server.taken()
    server.workflow = {"id": "another"}
    encode(clip, "<anna>", prompt="two")
    assert server.taken() == []
    server.workflow = {"id": "workflow"}
    encode(clip, "<anna>", prompt="two")
    assert server.taken() == [("6", " ")]


@pytest.mark.parametrize("workflow", [None, "text", {}, {"id": None}, ["list"]])
def test_a_prompt_without_a_proper_workflow(server, clip, workflow):
    server.workflow = workflow
    encode(clip, "<bob>")
    encode(clip, "<anna>", prompt="two")
    assert server.taken() == [("6", BOB), ("6", " ")]


def test_a_node_that_another_one_has_made_speaks_on_that(server, clip):
    graph = DynamicPrompt({"6": {"class_type": "Loop", "inputs": {}}})
    graph.add_ephemeral_node("6.0.1", {"class_type": "CLIPTextEncode"}, "6", "6")
    reset_progress_state("one", graph)
    try:
        encode(clip, "<bob>", node="6.0.1")
    finally:
        reset_progress_state("", DynamicPrompt({}))
    assert server.taken() == [("6", BOB)]


def test_a_clip_without_identities_says_nothing(server, mini_sd):
    encode(mini_sd[1], "<bob>")
    assert server.taken() == []


def test_outside_of_nodes_and_for_nobody(server, clip, monkeypatch):
    clip.tokenize("<bob>")
    server.client_id = None
    encode(clip, "<bob>")
    assert server.sent == []
    monkeypatch.delitem(sys.modules, "server")
    encode(clip, "<bob>")  # a program without a server


def test_the_log_has_it_once(server, clip, caplog):
    caplog.set_level(logging.WARNING)
    for prompt in ("one", "two"):
        encode(clip, "<bob> and <bob>", prompt=prompt)
    logged = [record.message for record in caplog.records if "<bob>" in record.message]
    assert logged == [f"In a prompt: {BOB}"]


def test_whatever_is_said_is_text(server):
    with CurrentNodeContext("one", "6"):
        notices.say("<img src=x onerror=\"alert('1')\">\n&amp;\ud800")
    assert server.taken() == [("6", "<img src=x onerror=\"alert('1')\">\n&amp;\ufffd")]


def test_what_is_remembered_of_nodes_is_bounded(server, clip):
    for number in range(notices.REMEMBERED_NODES + 9):
        with CurrentNodeContext("one", str(number)):
            notices.warn(["wrong"])
    assert len(notices._told) == notices.REMEMBERED_NODES
