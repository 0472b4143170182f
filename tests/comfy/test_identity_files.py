"""Saving and loading identities in ComfyUI's model folder, against the real file system."""

import asyncio
import json
import os
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import execution
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_api.latest import io
from sefi_ide.nodes.identity_files import SeFiLoadIdentity, SeFiSaveIdentity
from sefi_ide.nodes.types import SEFI_IDENTITY
from sefi_ide.sefi_core.comfyui import storage
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity import Identity, read_identity
from sefi_ide.tools.comfyui import comfyui_path


def make_identity(name="anna", value=1.0, width=768, thumbnail=None) -> Identity:
    embeddings = {"l": torch.full((5, 1, width), float(value))}
    return Identity(name, "person", "sd1", embeddings, embeddings, {"steps": 1}, thumbnail)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An identity folder of ComfyUI that does not exist yet."""
    folder = tmp_path / "models" / "sefi"
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "sefi", ([str(folder)], {".safetensors"})
    )
    return folder


def files_in(folder):
    """Everything below a folder, temporary leftovers included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class TestFolder:
    def test_registered_beside_the_folders_of_the_user(self, monkeypatch):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "sefi", (["/users/own"], set()))
        for _ in range(2):
            storage.register_model_folder()
        paths, extensions = folder_paths.folder_names_and_paths["sefi"]
        assert paths == ["/users/own", os.path.join(folder_paths.models_dir, "sefi")]
        assert extensions == {".safetensors"}

    def test_registered_where_there_is_none(self, monkeypatch):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "sefi", None)
        monkeypatch.delitem(folder_paths.folder_names_and_paths, "sefi")
        storage.register_model_folder()
        default = os.path.join(folder_paths.models_dir, "sefi")
        assert folder_paths.folder_names_and_paths["sefi"] == ([default], {".safetensors"})

    def test_only_identity_files_are_listed(self, folder):
        assert storage.identity_files() == []
        storage.save_identity(make_identity(), "people/anna")
        storage.save_identity(make_identity("bob"))
        (folder / "notes.txt").touch()
        (folder / ".leftover.tmp").touch()
        assert storage.identity_files() == [
            "bob.safetensors",
            os.path.join("people", "anna.safetensors"),
        ]


class TestSave:
    def test_under_its_own_name_and_whole(self, folder):
        identity = make_identity()
        path = storage.save_identity(identity)
        assert path == folder / "anna.safetensors"
        assert read_identity(path).same_content(identity)
        assert files_in(folder) == ["anna.safetensors"]

    @pytest.mark.parametrize("name", ["people/anna", "people\\anna", "people/anna.safetensors"])
    def test_into_a_subfolder(self, folder, name):
        storage.save_identity(make_identity(), name)
        assert files_in(folder) == ["people", "people/anna.safetensors"]

    def test_the_file_has_the_usual_permissions(self, folder):
        path = storage.save_identity(make_identity())
        (folder / "other").touch()
        assert path.stat().st_mode == (folder / "other").stat().st_mode

    def test_another_identity_gets_a_number_and_the_same_one_is_kept(self, folder):
        for value, expected in [(1, ""), (2, "_2"), (1, ""), (2, "_2"), (3, "_3"), (3, "_3")]:
            path = storage.save_identity(make_identity(value=value))
            assert path.name == f"anna{expected}.safetensors"
            assert read_identity(path).keys["l"][0, 0, 0] == value
        assert len(files_in(folder)) == 3

    def test_a_damaged_or_foreign_file_is_not_overwritten_either(self, folder):
        folder.mkdir(parents=True)
        (folder / "anna.safetensors").write_bytes(b"half an identi")
        (folder / "anna_2.safetensors").mkdir()
        assert storage.save_identity(make_identity()).name == "anna_3.safetensors"
        assert (folder / "anna.safetensors").read_bytes() == b"half an identi"

    def test_overwrite_when_asked(self, folder):
        for value in (1, 2):
            path = storage.save_identity(make_identity(value=value), if_exists="overwrite")
        assert read_identity(path).keys["l"][0, 0, 0] == 2
        assert files_in(folder) == ["anna.safetensors"]

    def test_the_same_content_is_not_written_again(self, folder):
        for if_exists in storage.IF_EXISTS:
            path = storage.save_identity(make_identity(), if_exists=if_exists)
            os.utime(path, (1, 1))
            assert storage.save_identity(make_identity(), if_exists=if_exists) == path
            assert path.stat().st_mtime == 1

    def test_error_when_asked(self, folder):
        path = storage.save_identity(make_identity(value=1))
        with pytest.raises(SeFiError, match="exists already .*: give another file name"):
            storage.save_identity(make_identity(value=2), if_exists="error")
        assert read_identity(path).keys["l"][0, 0, 0] == 1
        assert files_in(folder) == ["anna.safetensors"]

    def test_without_hard_links(self, folder, monkeypatch):
        def no_links(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)  # as on exFAT and many network drives
        for value in (1, 2):
            storage.save_identity(make_identity(value=value))
        assert files_in(folder) == ["anna.safetensors", "anna_2.safetensors"]
        assert read_identity(folder / "anna.safetensors").keys["l"][0, 0, 0] == 1

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(SeFiError, match="free some space"):
            storage.save_identity(make_identity(value=3))
        assert files_in(folder) == ["anna.safetensors", "anna_2.safetensors"]


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "../anna", "people/../../anna", "..", ".", "..\\anna", "/people/anna", "\\anna",
            "C:\\anna", "c:anna", "\\\\server\\share\\anna", "people//anna", "people/", "~/../anna",
            "CON", "nul", "people/COM1", "lpt9.anna", "AUX .x", "com¹", "anna\0", "anna\n", "a*",
            "a|b", "anna:stream", "anna.", "anna ", " anna", ".hidden", ".git/anna", ".safetensors",
            "x" * 200, "é" * 100, "a/" * 100 + "a", "\ud800",
        ],
    )  # fmt: skip
    def test_refused(self, folder, tmp_path, name):
        for if_exists in storage.IF_EXISTS:
            with pytest.raises(SeFiError, match="is refused.*: give a "):
                storage.save_identity(make_identity(), name, if_exists)
        assert files_in(tmp_path) == []

    def test_a_link_out_of_the_folder_is_refused(self, folder, tmp_path):
        folder.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        (folder / "link").symlink_to(tmp_path / "elsewhere")
        (folder / "loop").symlink_to("loop")
        with pytest.raises(SeFiError, match="link leads out"):
            storage.save_identity(make_identity(), "link/anna")
        with pytest.raises(SeFiError, match="link leads out"):
            storage.save_identity(make_identity(), "link/deeper/anna")
        with pytest.raises(SeFiError):
            storage.save_identity(make_identity(), "loop/anna")
        assert files_in(tmp_path / "elsewhere") == []

    def test_a_linked_file_is_replaced_and_its_target_left_alone(self, folder, tmp_path):
        folder.mkdir(parents=True)
        (tmp_path / "elsewhere").write_bytes(b"precious")
        (folder / "anna.safetensors").symlink_to(tmp_path / "elsewhere")
        assert storage.save_identity(make_identity()).name == "anna_2.safetensors"
        storage.save_identity(make_identity(), if_exists="overwrite")
        assert (tmp_path / "elsewhere").read_bytes() == b"precious"
        assert read_identity(folder / "anna.safetensors").name == "anna"

    def test_the_folder_itself_may_be_a_link(self, folder, tmp_path):
        (tmp_path / "big_disk").mkdir()
        folder.parent.mkdir()
        folder.symlink_to(tmp_path / "big_disk")
        storage.save_identity(make_identity(), "people/anna")
        assert files_in(tmp_path / "big_disk") == ["people", "people/anna.safetensors"]
        assert storage.load_identity("people/anna.safetensors").name == "anna"


# Runs in a process of its own: argv[1] is the identity folder, the rest is up to the script.
PREAMBLE = """
import sys, types
sys.path.insert(0, {comfyui!r})
package = sys.modules["sefi_ide"] = types.ModuleType("sefi_ide")
package.__path__ = [{repository!r}]
import folder_paths, torch
from sefi_ide.sefi_core.comfyui import storage
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity import Identity
folder_paths.folder_names_and_paths["sefi"] = ([sys.argv[1]], {{".safetensors"}})

def make_identity(value, width=768):
    embeddings = {{"l": torch.full((5, 1, width), float(value))}}
    return Identity("anna", "person", "sd1", embeddings, embeddings, {{"steps": 1}}, None)

def attempt(value, **settings):
    try:
        storage.save_identity(make_identity(value), **settings)
    except SeFiError as error:
        print(error)
"""

REPOSITORY = sys.modules["sefi_ide"].__path__[0]


def start(script, folder, *arguments, before=()):
    code = PREAMBLE.format(comfyui=str(comfyui_path()), repository=REPOSITORY) + script
    return subprocess.Popen(
        [*before, sys.executable, "-c", code, str(folder), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits and permissions")
class TestDiskTrouble:
    """In processes of their own, where the operating system really refuses."""

    def test_a_write_that_is_cut_short_harms_nothing(self, folder):
        path = storage.save_identity(make_identity(value=1))
        script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for if_exists in ("new number", "overwrite"):
    attempt(2, if_exists=if_exists)
"""
        lines = finish(start(script, folder)).splitlines()
        assert len(lines) == 2
        for line in lines:
            assert str(path) in line and "free some space on the disk; it is not lost" in line
        assert files_in(folder) == ["anna.safetensors"]
        assert read_identity(path).keys["l"][0, 0, 0] == 1

    def test_a_full_disk_harms_nothing(self, folder):
        script = """
import os
attempt(1)                         # 32 KB: fits once into the 60 KB of the disk
for if_exists in ("new number", "overwrite"):
    attempt(2, if_exists=if_exists)
print(sorted(os.listdir(sys.argv[1])))
print(storage.load_identity("anna.safetensors").keys["l"].unique().tolist())
"""
        folder.mkdir(parents=True)
        mount = f'mount -t tmpfs -o size=60k tmpfs "{folder}" && exec "$@"'
        namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
        try:
            possible = subprocess.run([*namespace, "true"], capture_output=True).returncode == 0
        except FileNotFoundError:
            possible = False
        if not possible:
            pytest.skip("this system does not let its users mount a small disk")
        *errors, names, values = finish(start(script, folder, before=namespace)).splitlines()
        assert len(errors) == 2
        for line in errors:
            assert "No space left on device): free some space on the disk; it is not" in line
        assert (names, values) == ("['anna.safetensors']", "[1.0]")

    def test_an_unwritable_folder(self, folder, tmp_path):
        path = storage.save_identity(make_identity(value=1))
        for place in (tmp_path, *tmp_path.parents[:2]):
            place.chmod(0o755)  # pytest's folders are private, and the user changes below
        folder.chmod(0o555)
        script = """
import os
if os.getuid() == 0:
    os.setuid(65534)               # root may write anywhere
for name in ("", "people/anna"):
    attempt(2, file_name=name)
attempt(2, if_exists="overwrite")
attempt(1)                         # is there already: nothing to write
"""
        lines = finish(start(script, folder)).splitlines()
        folder.chmod(0o755)
        assert [
            line for line in lines if "make the folder writable; it is not lost" in line
        ] == lines
        assert len(lines) == 3
        assert files_in(folder) == ["anna.safetensors"]
        assert read_identity(path).keys["l"][0, 0, 0] == 1

    def test_a_file_in_place_of_the_folder(self, folder):
        folder.parent.mkdir()
        folder.write_bytes(b"precious")
        for name in ("", "people/anna"):
            with pytest.raises(SeFiError, match="move away the file or folder"):
                storage.save_identity(make_identity(), name)
        assert folder.read_bytes() == b"precious"

    def test_a_folder_in_place_of_the_file(self, folder):
        (folder / "anna.safetensors").mkdir(parents=True)
        with pytest.raises(SeFiError, match="move away the file or folder"):
            storage.save_identity(make_identity(), if_exists="overwrite")
        assert files_in(folder) == ["anna.safetensors"]


def test_processes_that_save_at_once_lose_nothing(folder):
    script = """
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    attempt(100 * int(sys.argv[2]) + number)    # differs from everybody's
    attempt(number)                             # everybody's
"""
    processes = [start(script, folder, str(number)) for number in (1, 2, 3)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [finish(process) for process in processes] == ["", "", ""]
    values = [read_identity(path).keys["l"][0, 0, 0].item() for path in folder.iterdir()]
    expected = [*range(8), *(100 * who + number for who in (1, 2, 3) for number in range(8))]
    assert sorted(values) == sorted(expected)


class TestLoad:
    def test_foreign_names_do_not_leave_the_folder(self, folder, tmp_path):
        path = storage.save_identity(make_identity())
        outside = path.rename(tmp_path / "anna.safetensors")
        for name in ("../../anna.safetensors", str(outside), "C:\\anna.safetensors", "..\\x"):
            with pytest.raises(SeFiError, match="refused"):
                storage.load_identity(name)
        for name in ("anna.safetensors", "anna\0.safetensors", "people"):
            with pytest.raises(SeFiError, match="is not in .* press R"):
                storage.load_identity(name)
        with pytest.raises(SeFiError, match="no identity file to load: train"):
            storage.load_identity("")

    def test_workflows_from_windows(self, folder):
        storage.save_identity(make_identity(), "people/anna")
        assert storage.load_identity("people\\anna.safetensors").name == "anna"

    def test_files_from_elsewhere_with_unusual_names(self, folder):
        path = storage.save_identity(make_identity())
        path.rename(folder / "Anna from mum (2) .SAFETENSORS")
        (file,) = storage.identity_files()
        assert storage.load_identity(file).name == "anna"

    def test_errors_name_the_node_and_the_file(self, folder):
        folder.mkdir(parents=True)
        safetensors.torch.save_file({"lora_up": torch.ones(1)}, folder / "style.safetensors")
        with pytest.raises(SeFiError, match="^SeFi Load Identity: .*style.safetensors .*a LoRA"):
            SeFiLoadIdentity.execute("style.safetensors")
        with pytest.raises(SeFiError, match="^SeFi Save Identity: .*'../x' is refused"):
            SeFiSaveIdentity.execute(make_identity(), "../x", "error")


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
        thumbnail = torch.full((8, 8, 3), 7, dtype=torch.uint8)
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
        IdentitySink.arrived.append((identity.name, identity.keys["l"][0, 0, 0].item()))
        return io.NodeOutput()


class TestInTheGraph:
    """Through ComfyUI's own validation, execution and cache."""

    @pytest.fixture
    def queue(self, folder, monkeypatch):
        """Validates and runs a graph; returns validation errors or the UI output of each node."""
        for node in (SeFiSaveIdentity, SeFiLoadIdentity, IdentitySource, IdentitySink):
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

    def test_save_passes_on_and_tells_the_path(self, folder, queue):
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
        assert list(shown["2"]["text"]) == [f"<anna>: {folder / 'anna.safetensors'}"]

    def test_a_changed_file_is_read_again_and_only_then(self, folder, queue):
        storage.save_identity(make_identity(value=1))
        graph = {
            "1": ("SeFiLoadIdentity", {"file": "anna.safetensors", "name": ""}),
            "2": ("TestIdentitySink", {"identity": ["1", 0]}),
        }
        queue(graph)
        queue(graph)
        assert IdentitySink.arrived == [("anna", 1.0)]
        path = storage.save_identity(make_identity(value=2), if_exists="overwrite")
        os.utime(path, (1, 1))
        queue(graph)
        assert IdentitySink.arrived == [("anna", 1.0), ("anna", 2.0)]

    def test_two_files_with_one_name_can_be_told_apart(self, folder, queue):
        for value in (1, 2):
            storage.save_identity(make_identity(value=value))
        graph = {
            "1": ("SeFiLoadIdentity", {"file": "anna.safetensors", "name": "anna_one"}),
            "2": ("SeFiLoadIdentity", {"file": "anna_2.safetensors"}),
            "3": ("TestIdentitySink", {"identity": ["1", 0]}),
            "4": ("TestIdentitySink", {"identity": ["2", 0]}),
        }
        queue(graph)
        assert sorted(IdentitySink.arrived) == [("anna", 2.0), ("anna_one", 1.0)]

    def test_a_loaded_identity_shows_its_face(self, folder, queue):
        thumbnail = torch.full((8, 6, 3), 7, dtype=torch.uint8)
        storage.save_identity(make_identity(thumbnail=thumbnail))
        graph = {
            "1": ("SeFiLoadIdentity", {"file": "anna.safetensors"}),
            "2": ("TestIdentitySink", {"identity": ["1", 0]}),
        }
        (image,) = queue(graph)["1"]["images"]
        assert os.path.isfile(os.path.join(folder_paths.get_temp_directory(), image["filename"]))

    @pytest.mark.parametrize(
        "inputs, remedy",
        [
            ({"file": "anna.safetensors"}, "press R to refresh"),
            ({"file": "../anna.safetensors"}, "choose a file of the list"),
            ({"file": "bob.safetensors", "name": "b ob"}, "give a name of letters"),
        ],
    )
    def test_bad_inputs_are_refused_before_anything_runs(self, folder, queue, inputs, remedy):
        storage.save_identity(make_identity("bob"))
        graph = {
            "1": ("SeFiLoadIdentity", inputs),
            "2": ("TestIdentitySink", {"identity": ["1", 0]}),
        }
        assert any(remedy in detail for detail in queue(graph))
        assert IdentitySink.arrived == []

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
