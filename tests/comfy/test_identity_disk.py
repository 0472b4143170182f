"""Saving and reading identities where the disk, its rights or other processes are in the way."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest
from sefi_ide.sefi_core.comfyui import library
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity import saving
from sefi_ide.sefi_core.identity.file import read_identity
from sefi_ide.tools.comfyui import comfyui_path

from .made_identity import files_in, make_identity

if os.name == "posix":
    import fcntl

# Runs in a process of its own: argv[1] is the identity folder, the rest is up to the script.
PREAMBLE = """
import os, sys, types
sys.path.insert(0, {comfyui!r})
package = sys.modules["sefi_ide"] = types.ModuleType("sefi_ide")
package.__path__ = [{repository!r}]
import folder_paths, torch
from sefi_ide.sefi_core.comfyui import library
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.identity import Identity
torch.set_num_threads(1)
folder_paths.folder_names_and_paths["sefi"] = ([sys.argv[1]], {{".safetensors"}})

def make_identity(value, width=768):
    embeddings = {{"l": torch.full((5, 1, width), float(value))}}
    return Identity("anna", "person", "sd1", embeddings, embeddings, {{"steps": 1}}, None)

def no_links(*_):
    raise PermissionError(1, "Operation not permitted")  # as on exFAT and many network drives

if "no links" in sys.argv:
    os.link = no_links

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


posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits, rights and processes")


def no_links(*_):
    raise PermissionError(1, "Operation not permitted")


@posix
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
        assert (names, values) == ("['.sefi.lock', 'anna.safetensors']", "[1.0]")

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
            line for line in lines if "make the folder writable, and .sefi.lock in it" in line
        ] == lines
        assert len(lines) == 3
        assert files_in(folder) == ["anna.safetensors"]
        assert read_identity(path).key_vectors["l"][0, 0, 0] == 1

    def test_what_may_not_be_read_is_not_said_to_be_absent(self, folder, tmp_path):
        path = library.save_identity(make_identity(), "people/anna")
        for place in (tmp_path, *tmp_path.parents[:3]):
            place.chmod(0o755)  # pytest's folders are private, and the user changes below
        script = """
if os.getuid() == 0:
    os.setuid(65534)               # root may read anything
for read in (library.load_identity, library.fingerprint):
    try:
        read("people/anna.safetensors")
    except SeFiError as error:
        print(error)
"""
        for place in (path, path.parent, folder):
            place.chmod(0)
            lines = finish(start(script, folder)).splitlines()
            place.chmod(0o755)
            assert len(lines) == 2
            for line in lines:
                assert f"the identity file {path} cannot be read (Permission denied)" in line
        assert library.load_identity("people/anna.safetensors").name == "anna"

    def test_a_file_in_place_of_the_folder(self, folder):
        folder.parent.mkdir()
        folder.write_bytes(b"precious")
        for name in ("", "people/anna"):
            with pytest.raises(SeFiError, match="move away the file or folder"):
                library.save_identity(make_identity(), name)
        assert folder.read_bytes() == b"precious"

    def test_a_folder_in_place_of_the_file(self, folder):
        (folder / "anna.safetensors").mkdir(parents=True)
        self.assert_left_alone(folder)

    def test_a_pipe_in_place_of_the_file(self, folder):
        folder.mkdir(parents=True)
        os.mkfifo(folder / "anna.safetensors")
        self.assert_left_alone(folder)
        assert (folder / "anna.safetensors").is_fifo()

    def assert_left_alone(self, folder):
        with pytest.raises(SeFiError, match="is a folder, a pipe or a device.*: move away the"):
            library.save_identity(make_identity(), if_exists="overwrite")
        with pytest.raises(SeFiError, match="exists already"):
            library.save_identity(make_identity(), if_exists="error")
        assert files_in(folder) == ["anna.safetensors"]

    def test_a_folder_that_another_program_keeps_locked(self, folder, monkeypatch):
        path = library.save_identity(make_identity(value=1))
        monkeypatch.setattr(saving, "LOCK_SECONDS", 0.1)
        with open(folder / saving.LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for if_exists in ("new number", "overwrite"):
                with pytest.raises(SeFiError, match="sefi.lock locked.*: wait until"):
                    library.save_identity(make_identity(value=2), if_exists=if_exists)
            assert library.save_identity(make_identity(value=1)) == path
        assert files_in(folder) == ["anna.safetensors"]
        assert library.save_identity(make_identity(value=2)).name == "anna_2.safetensors"

    def test_a_drive_that_cannot_lock(self, folder, monkeypatch):
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(SeFiError, match="No locks available.*: let the network drive lock"):
            library.save_identity(make_identity())
        assert files_in(folder) == []

    @pytest.mark.parametrize("links", [True, False])
    def test_it_is_on_the_disk_when_it_is_saved(self, folder, monkeypatch, links):
        """First the content, then its name."""
        order = []

        def note(name, function):
            monkeypatch.setattr(os, name, lambda *args: order.append(name) or function(*args))

        note("link" if links else "rename", os.link if links else os.rename)
        if not links:
            monkeypatch.setattr(os, "link", no_links)
        folder.mkdir(parents=True)
        sync = os.fsync

        def note_sync(descriptor):
            order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", note_sync)
        library.save_identity(make_identity())
        assert order == ["file", "link" if links else "rename", "folder"]


@pytest.mark.parametrize("links", ["links", "no links"])
def test_processes_that_save_at_once_lose_nothing(folder, links):
    script = """
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    attempt(100 * int(sys.argv[2]) + number)    # differs from everybody's
    attempt(number)                             # everybody's
"""
    processes = [start(script, folder, str(number), links) for number in (1, 2, 3)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [finish(process) for process in processes] == ["", "", ""]
    values = [
        read_identity(folder / name).key_vectors["l"][0, 0, 0].item() for name in files_in(folder)
    ]
    expected = [*range(8), *(100 * who + number for who in (1, 2, 3) for number in range(8))]
    assert sorted(values) == sorted(expected)


KILLS = 40


@posix
@pytest.mark.parametrize("links", ["links", "no links"])
def test_a_killed_saver_leaves_whole_files_and_the_next_one_tidies_up(folder, links):
    script = """
import itertools, random, signal, time
from pathlib import Path
from sefi_ide.sefi_core.identity.file import read_identity
folder, chance = Path(sys.argv[1]), random.Random(0)
leftovers = 0
for kill in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        for number in itertools.count():
            library.save_identity(make_identity(number, 8), "old", "overwrite")
            library.save_identity(make_identity(number, 8), f"new{number}", "error")
    time.sleep(chance.uniform(0.002, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = set(os.listdir(folder)) if folder.exists() else set()
    for name in found:
        if name.endswith(".safetensors"):
            assert read_identity(folder / name).name == "anna", name
    leftovers += any(name.endswith(".tmp") for name in found)
    library.save_identity(make_identity(-1, 8), f"after{kill}")
    names = set(os.listdir(folder))
    assert names == {n for n in found if n.endswith(".safetensors")} | {f"after{kill}.safetensors",
                                                                        ".sefi.lock"}, names
    for name in names - {".sefi.lock", "old.safetensors"}:
        (folder / name).unlink()
print(leftovers)
"""
    leftovers = int(finish(start(script, folder, links, str(KILLS))))
    assert leftovers > 0  # some were hit in the middle


def test_a_saver_who_finds_his_identity_saved_tidies_up_too(folder):
    library.save_identity(make_identity())
    for name in (".sefi-0123456789abcdef.tmp", ".sefi-mine.tmp", "notes.tmp"):
        (folder / name).touch()
    library.save_identity(make_identity())
    assert files_in(folder) == [".sefi-mine.tmp", "anna.safetensors", "notes.tmp"]


@posix
def test_readers_beside_writers_of_every_kind(folder):
    """No reader dies, gets a mixture of two identities, or is told that a file is damaged."""
    script = """
import itertools, json, shutil, signal, time, traceback
from pathlib import Path
from sefi_ide.sefi_core.identity.file import read_identity, to_bytes
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
path = folder / "anna.safetensors"

def in_two_halves(file, content):
    file.write(content[:len(content) // 2])
    file.flush()
    time.sleep(0.001)
    file.write(content[len(content) // 2:])

def copy_over(content):
    (folder / "source").write_bytes(content)
    shutil.copyfile(folder / "source", path)

def truncate(content):
    with open(path, "wb") as file:
        in_two_halves(file, content)

def write_in_place(content):
    with open(path, "r+b") as file:
        in_two_halves(file, content)

def rename(content):
    (folder / "source").write_bytes(content)
    os.replace(folder / "source", path)

def read():
    reads, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        library.fingerprint("anna.safetensors")
        identity = read_identity(path)
        values = torch.cat([identity.key_vectors["l"], identity.value_vectors["l"]]).unique()
        assert values.tolist() in ([1.0], [2.0]), values
        reads += 1
    return reads

figures = {}
for write, widths in ((copy_over, (768, 4096)), (truncate, (768, 4096)),
                      (write_in_place, (768, 768)), (rename, (768, 4096))):
    versions = [to_bytes(make_identity(value, width)) for value, width in zip((1, 2), widths)]
    path.write_bytes(versions[0])
    writer = os.fork()
    if writer == 0:
        for version in itertools.cycle(versions):
            write(version)
            time.sleep(0.003)
    readers = {}
    for _ in range(3):
        receiving, sending = os.pipe()
        reader = os.fork()
        if reader == 0:
            try:
                told = read()
            except BaseException:
                told = traceback.format_exc()
            os.write(sending, json.dumps(told).encode())
            os._exit(0)
        os.close(sending)
        readers[reader] = receiving
    figures[write.__name__] = []
    for reader, receiving in readers.items():
        told, (_, status) = os.read(receiving, 1 << 16), os.waitpid(reader, 0)
        figures[write.__name__].append(json.loads(told) if status == 0 else f"died of {status}")
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
print(json.dumps(figures))
"""
    figures = json.loads(finish(start(script, folder)))
    assert list(figures) == ["copy_over", "truncate", "write_in_place", "rename"]
    for kind, told in figures.items():
        assert all(isinstance(reads, int) and reads > 0 for reads in told), (kind, told)
