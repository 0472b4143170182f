"""Saving and loading identities in ComfyUI's model folder, against the real file system."""

import os

import folder_paths
import pytest
import safetensors.torch
import torch
from sefi_ide.nodes.identity_files import SeFiLoadIdentity, SeFiSaveIdentity
from sefi_ide.sefi_core.comfyui import library
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.identity.file import read_identity

from .made_identity import files_in, make_identity


class TestFolder:
    def test_registered_beside_the_folders_of_the_user(self, monkeypatch):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "sefi", (["/users/own"], set()))
        for _ in range(2):
            library.register_model_folder()
        paths, extensions = folder_paths.folder_names_and_paths["sefi"]
        assert paths == ["/users/own", os.path.join(folder_paths.models_dir, "sefi")]
        assert extensions == {".safetensors"}

    def test_registered_where_there_is_none(self, monkeypatch):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "sefi", None)
        monkeypatch.delitem(folder_paths.folder_names_and_paths, "sefi")
        library.register_model_folder()
        default = os.path.join(folder_paths.models_dir, "sefi")
        assert folder_paths.folder_names_and_paths["sefi"] == ([default], {".safetensors"})

    def test_only_identity_files_are_listed(self, folder):
        assert library.identity_files() == []
        library.save_identity(make_identity(), "people/anna")
        library.save_identity(make_identity("bob"))
        (folder / "notes.txt").touch()
        (folder / ".leftover.tmp").touch()
        assert library.identity_files() == [
            "bob.safetensors",
            os.path.join("people", "anna.safetensors"),
        ]


class TestSave:
    def test_under_its_own_name_and_whole(self, folder):
        identity = make_identity()
        path = library.save_identity(identity)
        assert path == folder / "anna.safetensors"
        assert read_identity(path).same_content(identity)
        assert files_in(folder) == ["anna.safetensors"]

    @pytest.mark.parametrize("name", ["people/anna", "people\\anna", "people/anna.safetensors"])
    def test_into_a_subfolder(self, folder, name):
        library.save_identity(make_identity(), name)
        assert files_in(folder) == ["people", "people/anna.safetensors"]

    def test_the_file_has_the_usual_permissions(self, folder):
        path = library.save_identity(make_identity())
        (folder / "other").touch()
        assert path.stat().st_mode == (folder / "other").stat().st_mode

    def test_another_identity_gets_a_number_and_the_same_one_is_kept(self, folder):
        for value, expected in [(1, ""), (2, "_2"), (1, ""), (2, "_2"), (3, "_3"), (3, "_3")]:
            path = library.save_identity(make_identity(value=value))
            assert path.name == f"anna{expected}.safetensors"
            assert read_identity(path).key_vectors["l"][0, 0, 0] == value
        assert len(files_in(folder)) == 3

    def test_a_damaged_or_foreign_file_is_not_overwritten_either(self, folder):
        folder.mkdir(parents=True)
        (folder / "anna.safetensors").write_bytes(b"half an identi")
        (folder / "anna_2.safetensors").mkdir()
        assert library.save_identity(make_identity()).name == "anna_3.safetensors"
        assert (folder / "anna.safetensors").read_bytes() == b"half an identi"

    def test_overwrite_when_asked(self, folder):
        for value in (1, 2):
            path = library.save_identity(make_identity(value=value), if_exists="overwrite")
        assert read_identity(path).key_vectors["l"][0, 0, 0] == 2
        assert files_in(folder) == ["anna.safetensors"]

    def test_the_same_content_is_not_written_again(self, folder):
        for if_exists in library.IF_EXISTS:
            path = library.save_identity(make_identity(), if_exists=if_exists)
            os.utime(path, (1, 1))
            assert library.save_identity(make_identity(), if_exists=if_exists) == path
            assert path.stat().st_mtime == 1

    def test_error_when_asked(self, folder):
        path = library.save_identity(make_identity(value=1))
        with pytest.raises(SeFiError, match="exists already .*: give another file name"):
            library.save_identity(make_identity(value=2), if_exists="error")
        assert read_identity(path).key_vectors["l"][0, 0, 0] == 1
        assert files_in(folder) == ["anna.safetensors"]

    def test_without_hard_links(self, folder, monkeypatch):
        def no_links(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)  # as on exFAT and many network drives
        for value in (1, 2):
            library.save_identity(make_identity(value=value))
        assert files_in(folder) == ["anna.safetensors", "anna_2.safetensors"]
        assert read_identity(folder / "anna.safetensors").key_vectors["l"][0, 0, 0] == 1

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "rename", full)
        with pytest.raises(SeFiError, match="free some space"):
            library.save_identity(make_identity(value=3))
        assert files_in(folder) == ["anna.safetensors", "anna_2.safetensors"]

    def test_without_hard_links_another_file_is_not_destroyed(self, folder, monkeypatch):
        """Somebody else's file comes at the worst moment."""
        path = folder / "anna.safetensors"

        def too_late(*_):
            path.write_bytes(b"precious")
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", too_late)
        with pytest.raises(SeFiError, match="exists already"):
            library.save_identity(make_identity(), if_exists="error")
        assert path.read_bytes() == b"precious"
        assert files_in(folder) == ["anna.safetensors"]


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "../anna", "people/../../anna", "..", ".", "..\\anna", "/people/anna", "\\anna",
            "C:\\anna", "c:anna", "\\\\server\\share\\anna", "people//anna", "people/", "~/../anna",
            "CON", "nul", "people/COM1", "lpt9.anna", "AUX .x", "com¹", "anna\0", "anna\n", "a*",
            "a|b", "anna:stream", "anna.", "anna ", " anna", ".hidden", ".git/anna", ".safetensors",
            "x" * 200, "é" * 100, "a/" * 100 + "a", "\ud800", "an\u200cna", "\u200d", "a\u200eb",
        ],
    )  # fmt: skip
    def test_refused(self, folder, tmp_path, name):
        for if_exists in library.IF_EXISTS:
            with pytest.raises(SeFiError, match="is refused.*: give a "):
                library.save_identity(make_identity(), name, if_exists)
        assert files_in(tmp_path) == []

    def test_accents_are_one_character_on_the_disk(self, folder):
        library.save_identity(make_identity(), "fe\u0301/Jose\u0301")
        assert files_in(folder) == ["f\u00e9", "f\u00e9/Jos\u00e9.safetensors"]
        for name in ("f\u00e9/Jos\u00e9.safetensors", "fe\u0301\\Jose\u0301.safetensors"):
            assert library.load_identity(name).name == "anna"

    def test_files_of_systems_that_write_accents_as_two_characters(self, folder):
        composed, decomposed = "Jos\u00e9.safetensors", "Jose\u0301.safetensors"
        path = library.save_identity(make_identity("two"))
        path.rename(folder / decomposed)
        assert library.identity_files() == [composed]
        assert library.load_identity(composed).name == "two"
        library.save_identity(make_identity("one"), "Jos\u00e9")
        assert library.identity_files() == sorted([composed, decomposed])
        assert library.load_identity(composed).name == "one"
        assert library.load_identity(decomposed).name == "two"

    def test_joiners_of_persian_and_sinhala(self, folder):
        name = "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627"
        library.save_identity(make_identity(name))
        assert library.identity_files() == [f"{name}.safetensors"]
        assert library.load_identity(f"{name}.safetensors").placeholder == f"<{name}>"

    @pytest.mark.parametrize("name", ["CON", "nul", "com1", "LPT\u00b9", "\U00010400" * 64])
    def test_names_that_could_be_learned_but_not_saved(self, folder, name):
        assert make_identity(name).name == name
        with pytest.raises(SeFiError, match="cannot be saved under the name .*: give it another"):
            library.check_saveable_name(name)
        with pytest.raises(SeFiError, match="is refused"):
            library.save_identity(make_identity(name))

    def test_names_that_can_be_saved(self, folder):
        for name in ("anna", "Jose\u0301", "CONNY", "x" * 64, "\u5b89" * 60):
            library.check_saveable_name(name)
            library.save_identity(make_identity(name))

    def test_a_link_out_of_the_folder_is_refused(self, folder, tmp_path):
        folder.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        (folder / "link").symlink_to(tmp_path / "elsewhere")
        (folder / "loop").symlink_to("loop")
        with pytest.raises(SeFiError, match="link leads out"):
            library.save_identity(make_identity(), "link/anna")
        with pytest.raises(SeFiError, match="link leads out"):
            library.save_identity(make_identity(), "link/deeper/anna")
        with pytest.raises(SeFiError):
            library.save_identity(make_identity(), "loop/anna")
        assert files_in(tmp_path / "elsewhere") == []

    def test_a_linked_file_is_replaced_and_its_target_left_alone(self, folder, tmp_path):
        folder.mkdir(parents=True)
        (tmp_path / "elsewhere").write_bytes(b"precious")
        (folder / "anna.safetensors").symlink_to(tmp_path / "elsewhere")
        assert library.save_identity(make_identity()).name == "anna_2.safetensors"
        library.save_identity(make_identity(), if_exists="overwrite")
        assert (tmp_path / "elsewhere").read_bytes() == b"precious"
        assert read_identity(folder / "anna.safetensors").name == "anna"

    def test_the_folder_itself_may_be_a_link(self, folder, tmp_path):
        (tmp_path / "big_disk").mkdir()
        folder.parent.mkdir()
        folder.symlink_to(tmp_path / "big_disk")
        library.save_identity(make_identity(), "people/anna")
        assert files_in(tmp_path / "big_disk") == ["people", "people/anna.safetensors"]
        assert library.load_identity("people/anna.safetensors").name == "anna"


class TestLoad:
    def test_foreign_names_do_not_leave_the_folder(self, folder, tmp_path):
        path = library.save_identity(make_identity())
        outside = path.rename(tmp_path / "anna.safetensors")
        for name in ("../../anna.safetensors", str(outside), "C:\\anna.safetensors", "..\\x"):
            with pytest.raises(SeFiError, match="refused"):
                library.load_identity(name)
        for name in ("anna.safetensors", "anna\0.safetensors", "\ud800", "people"):
            with pytest.raises(SeFiError, match="is not in .* press R"):
                library.load_identity(name)
        with pytest.raises(SeFiError, match="no identity file to load: train"):
            library.load_identity("")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_what_is_no_file_is_not_said_to_be_absent(self, folder):
        (folder / "people").mkdir(parents=True)
        os.mkfifo(folder / "anna.safetensors")
        for name in ("people", "anna.safetensors"):
            with pytest.raises(SeFiError, match=f"{name} cannot be read, it is a folder, a pipe"):
                library.load_identity(name)

    def test_a_huge_file_is_refused_before_it_is_hashed(self, folder):
        folder.mkdir(parents=True)
        (folder / "anna.safetensors").touch()
        os.truncate(folder / "anna.safetensors", 2**40)  # of holes
        for read in (library.load_identity, library.fingerprint):
            with pytest.raises(SeFiError, match="1048576 MiB .*: choose a file"):
                read("anna.safetensors")

    def test_workflows_from_windows(self, folder):
        library.save_identity(make_identity(), "people/anna")
        assert library.load_identity("people\\anna.safetensors").name == "anna"

    def test_files_from_elsewhere_with_unusual_names(self, folder):
        path = library.save_identity(make_identity())
        path.rename(folder / "Anna from mum (2) .SAFETENSORS")
        (file,) = library.identity_files()
        assert library.load_identity(file).name == "anna"

    def test_errors_name_the_node_and_the_file(self, folder):
        folder.mkdir(parents=True)
        safetensors.torch.save_file({"lora_up": torch.ones(1)}, folder / "style.safetensors")
        with pytest.raises(SeFiError, match="^SeFi Load Identity: .*style.safetensors .*a LoRA"):
            SeFiLoadIdentity.execute("style.safetensors")
        with pytest.raises(SeFiError, match="^SeFi Save Identity: .*'../x' is refused"):
            SeFiSaveIdentity.execute(make_identity(), "../x", "error")
