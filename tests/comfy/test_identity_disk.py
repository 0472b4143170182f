"""Saving identities where the disk, its rights or other processes are in the way."""

import os
import subprocess
import sys

import pytest
from sefi_ide.sefi_core.comfyui import library
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.file import read_identity
from sefi_ide.tools.comfyui import comfyui_path

from .made_identity import files_in, make_identity

# Runs in a process of its own: argv[1] is the identity folder, the rest is up to the script.
PREAMBLE = """
import sys, types
sys.path.insert(0, {comfyui!r})
package = sys.modules["sefi_ide"] = types.ModuleType("sefi_ide")
package.__path__ = [{repository!r}]
import folder_paths, torch
from sefi_ide.sefi_core.comfyui import library
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
folder_paths.folder_names_and_paths["sefi"] = ([sys.argv[1]], {{".safetensors"}})

def make_identity(value, width=768):
    embeddings = {{"l": torch.full((5, 1, width), float(value))}}
    return Identity("anna", "person", "sd1", embeddings, embeddings, {{"steps": 1}}, None)

def attempt(value, **settings):
    try:
        library.save_identity(make_identity(value), **settings)
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
        path = library.save_identity(make_identity(value=1))
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
        assert read_identity(path).key_vectors["l"][0, 0, 0] == 1

    def test_a_full_disk_harms_nothing(self, folder):
        script = """
import os
attempt(1)                         # 32 KB: fits once into the 60 KB of the disk
for if_exists in ("new number", "overwrite"):
    attempt(2, if_exists=if_exists)
print(sorted(os.listdir(sys.argv[1])))
print(library.load_identity("anna.safetensors").key_vectors["l"].unique().tolist())
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
        path = library.save_identity(make_identity(value=1))
        for place in (tmp_path, *tmp_path.parents[:3]):
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
        assert read_identity(path).key_vectors["l"][0, 0, 0] == 1

    def test_a_file_in_place_of_the_folder(self, folder):
        folder.parent.mkdir()
        folder.write_bytes(b"precious")
        for name in ("", "people/anna"):
            with pytest.raises(SeFiError, match="move away the file or folder"):
                library.save_identity(make_identity(), name)
        assert folder.read_bytes() == b"precious"

    def test_a_folder_in_place_of_the_file(self, folder):
        (folder / "anna.safetensors").mkdir(parents=True)
        with pytest.raises(SeFiError, match="move away the file or folder"):
            library.save_identity(make_identity(), if_exists="overwrite")
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
    values = [read_identity(path).key_vectors["l"][0, 0, 0].item() for path in folder.iterdir()]
    expected = [*range(8), *(100 * who + number for who in (1, 2, 3) for number in range(8))]
    assert sorted(values) == sorted(expected)
