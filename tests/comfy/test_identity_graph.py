"""Saving and loading identities as nodes of a graph that ComfyUI executes."""

import asyncio
import json
import os
from itertools import count
from types import SimpleNamespace

import execution
import pytest
import torch
from comfy_api.latest import io
from sefi_ide.nodes.identity_files import SeFiLoadIdentity, SeFiSaveIdentity
from sefi_ide.nodes.types import SEFI_IDENTITY
from sefi_ide.sefi_core.comfyui import library
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.thumbnail import thumbnail_of

from .made_identity import make_identity


class IdentitySource(io.ComfyNode):
    """Stands in for training."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestIdentitySource",
            inputs=[io.Float.Input("value", min=-100, max=100)],
            outputs=[SEFI_IDENTITY.Output()],
        )

    @classmethod
    def execute(cls, value):
        thumbnail = thumbnail_of(torch.full((8, 8, 3), 0.1))
        return io.NodeOutput(make_identity(value=value, thumbnail=thumbnail))


class IdentitySink(io.ComfyNode):
    """Reports what has arrived."""

    arrived: list = []

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestIdentitySink",
            inputs=[SEFI_IDENTITY.Input("identity")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, identity):
        IdentitySink.arrived.append((identity.name, identity.key_vectors["l"][0, 0, 0].item()))
        return io.NodeOutput()


class Text(io.ComfyNode):
    """A file name that comes through a link."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestText", inputs=[io.String.Input("text")], outputs=[io.String.Output()]
        )

    @classmethod
    def execute(cls, text):
        return io.NodeOutput(text)


class TestInTheGraph:
    """Through ComfyUI's own validation, execution and cache."""

    @pytest.fixture
    def queue(self, folder, monkeypatch):
        """Validates and runs a graph; returns validation errors or the UI output of each node."""
        for node in (SeFiSaveIdentity, SeFiLoadIdentity, IdentitySource, IdentitySink, Text):
            monkeypatch.setitem(
                execution.nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node
            )
        monkeypatch.setattr(IdentitySink, "arrived", [])
        server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
        executor = execution.PromptExecutor(
            server,
            cache_type=execution.CacheType.CLASSIC,
            cache_args={"ram": 1.0, "ram_inactive": 1.0},
        )
        numbers = count()

        def queue(graph):
            graph = {
                node: {"class_type": kind, "inputs": inputs}
                for node, (kind, inputs) in json.loads(json.dumps(graph)).items()
            }
            prompt_id = f"prompt {next(numbers)}"
            valid, error, outputs, node_errors = asyncio.run(
                execution.validate_prompt(prompt_id, graph, None)
            )
            if not valid:
                return [e["details"] for n in node_errors.values() for e in n["errors"]]
            executor.execute(graph, prompt_id, {}, outputs)
            assert executor.success, executor.status_messages
            return executor.history_result["outputs"]

        return queue

    def test_save_passes_on_and_tells_the_file_and_the_placeholder(self, folder, queue):
        graph = {
            "1": ("TestIdentitySource", {"value": 3}),
            "2": (
                "SeFiSaveIdentity",
                {"identity": ["1", 0], "file_name": "", "if_exists": "error"},
            ),
            "3": ("TestIdentitySink", {"identity": ["2", 0]}),
        }
        shown = queue(graph)
        assert IdentitySink.arrived == [("anna", 3.0)]
        assert list(shown["2"]["text"]) == ["Saved as anna.safetensors. Write <anna> in prompts."]

    @pytest.mark.parametrize(
        "file_name, if_exists, told",
        [
            (
                "",
                "new number",
                "Saved as anna_2.safetensors. Write <anna> in prompts; to write <anna_2>, set name "
                "in SeFi Load Identity to anna_2.",
            ),
            ("", "overwrite", "Saved as anna.safetensors. Write <anna> in prompts."),
            ("people\\anna", "error", "Saved as people/anna.safetensors. Write <anna> in prompts."),
            (
                "people/with a cap",
                "error",
                "Saved as people/with a cap.safetensors. Write <anna> in prompts; for another "
                "placeholder, set name in SeFi Load Identity.",
            ),
        ],
    )
    def test_a_file_of_another_name_says_what_its_placeholder_is(
        self, folder, queue, file_name, if_exists, told
    ):
        library.save_identity(make_identity(value=9))
        inputs = {"identity": ["1", 0], "file_name": file_name, "if_exists": if_exists}
        graph = {"1": ("TestIdentitySource", {"value": 3}), "2": ("SeFiSaveIdentity", inputs)}
        assert list(queue(graph)["2"]["text"]) == [told]

    @pytest.mark.parametrize("file_name", ["people/anna", ["4", 0]])
    def test_a_saved_file_that_is_gone_is_written_again_and_only_then(
        self, folder, queue, file_name
    ):
        settings = {"identity": ["1", 0], "file_name": file_name, "if_exists": "new number"}
        graph = {
            "1": ("TestIdentitySource", {"value": 3}),
            "2": ("SeFiSaveIdentity", settings),
            "3": ("TestIdentitySink", {"identity": ["2", 0]}),
            "4": ("TestText", {"text": "people/anna"}),
        }
        path = folder / "people" / "anna.safetensors"
        for times in (1, 2, 3):
            for _ in range(3):
                queue(graph)
                assert library.load_identity("people/anna.safetensors").name == "anna"
            assert len(IdentitySink.arrived) == times
            path.unlink()

    def test_a_changed_file_is_read_again_and_only_then(self, folder, queue):
        library.save_identity(make_identity(value=1))
        graph = {
            "1": ("SeFiLoadIdentity", {"file": "anna.safetensors", "name": ""}),
            "2": ("TestIdentitySink", {"identity": ["1", 0]}),
        }
        queue(graph)
        queue(graph)
        assert IdentitySink.arrived == [("anna", 1.0)]
        path = library.save_identity(make_identity(value=2), if_exists="overwrite")
        os.utime(path, (1, 1))
        queue(graph)
        assert IdentitySink.arrived == [("anna", 1.0), ("anna", 2.0)]

    def test_two_files_with_one_name_can_be_told_apart(self, folder, queue):
        for value in (1, 2):
            library.save_identity(make_identity(value=value))
        graph = {
            "1": ("SeFiLoadIdentity", {"file": "anna.safetensors", "name": "anna_one"}),
            "2": ("SeFiLoadIdentity", {"file": "anna_2.safetensors"}),
            "3": ("TestIdentitySink", {"identity": ["1", 0]}),
            "4": ("TestIdentitySink", {"identity": ["2", 0]}),
        }
        queue(graph)
        assert sorted(IdentitySink.arrived) == [("anna", 2.0), ("anna_one", 1.0)]

    @pytest.mark.parametrize(
        "inputs, remedy",
        [
            ({"file": "anna.safetensors"}, "press R to refresh"),
            ({"file": "../anna.safetensors"}, "choose a file of the list"),
        ],
    )
    def test_bad_inputs_are_refused_before_anything_runs(self, folder, queue, inputs, remedy):
        library.save_identity(make_identity("bob"))
        graph = {
            "1": ("SeFiLoadIdentity", inputs),
            "2": ("TestIdentitySink", {"identity": ["1", 0]}),
        }
        (detail,) = queue(graph)  # one mistake marks one input
        assert detail.startswith("file - ") and remedy in detail
        assert IdentitySink.arrived == []

    def test_a_bad_new_name_is_told_when_the_file_is_loaded(self, folder):
        library.save_identity(make_identity("bob"))
        with pytest.raises(SeFiError, match="^SeFi Load Identity: the name 'b ob' .* give a name"):
            SeFiLoadIdentity.execute("bob.safetensors", "b ob")

    def test_a_bad_file_name_is_refused_before_training(self, folder, queue):
        settings = {"identity": ["1", 0], "file_name": "../anna", "if_exists": "new number"}
        graph = {
            "1": ("TestIdentitySource", {"value": 3}),
            "2": ("SeFiSaveIdentity", settings),
        }
        (detail,) = queue(graph)
        assert "is refused" in detail

    def test_every_input_has_a_tooltip(self, folder):
        for node in (SeFiSaveIdentity, SeFiLoadIdentity):
            schema = node.GET_SCHEMA()
            assert schema.category == "SeFi-IDE" and schema.description
            assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
