"""Nodes that keep identities in ``{models}/sefi``."""

from __future__ import annotations

import os
from pathlib import Path

from comfy_api.latest import io, ui

from ..sefi_core.comfyui import library, notices
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.identity.identity import Identity
from .types import CATEGORY, SEFI_IDENTITY, TEXT, check_identity, check_input

_saved: set[tuple[str, str, Path]] = set()
"""Under which ``file_name`` and ``if_exists`` this process has saved which files."""

_gone: list[tuple[str, str]] = []
"""Under which of them a file has been found gone, one entry for each."""


class SeFiSaveIdentity(io.ComfyNode):
    """Save an identity into ``{models}/sefi``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiSaveIdentity",
            display_name="SeFi Save Identity",
            category=CATEGORY,
            description=(
                "Saves a learned identity as one small safetensors file in models/sefi. Another "
                "identity is never overwritten unless you ask for it."
            ),
            search_aliases=[
                "save identity",
                "save face",
                "export identity",
                "save character",
                "save lora",
                "embedding",
            ],
            inputs=[
                SEFI_IDENTITY.Input("identity", tooltip="The identity to save."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip=(
                        "File name within models/sefi, with or without .safetensors; may have "
                        "subfolders, for example people/anna. Empty: the identity's own name."
                    ),
                ),
                io.Combo.Input(
                    "if_exists",
                    options=list(library.IF_EXISTS),
                    default="new number",
                    tooltip=(
                        "What to do when the file exists and holds another identity: save beside "
                        "it under a new number (anna_2), overwrite it, or stop with an error."
                    ),
                ),
            ],
            outputs=[
                SEFI_IDENTITY.Output(
                    display_name="identity", tooltip="The identity, unchanged, to go on with."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        """Refuse a bad file name before anything is trained. A linked one is None here."""
        try:
            library.check_file_name(file_name or "")
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        identity: object = None,
        file_name: str | None = None,
        if_exists: str | None = None,
    ) -> int:
        """The same number until a file that was saved with these inputs is gone.

        ComfyUI does not run a node again whose inputs have not changed, and would not notice.
        Linked inputs are None here and may have been anything.
        """

        def may_be(saved_as: str, saved_if: str) -> bool:
            return file_name in (None, saved_as) and if_exists in (None, saved_if)

        for entry in list(_saved):
            if may_be(*entry[:2]) and not os.path.lexists(entry[2]):
                _saved.remove(entry)
                _gone.append(entry[:2])
        return sum(may_be(*inputs) for inputs in _gone)

    @classmethod
    def execute(cls, identity: Identity, file_name: str, if_exists: str) -> io.NodeOutput:
        with raised_by("SeFi Save Identity"):
            check_identity(identity)
            check_input("file_name", file_name, TEXT)
            path = library.save_identity(identity, file_name, if_exists)
        _saved.add((file_name, if_exists, path))
        told = library.how_to_use(identity, path)
        notices.say(told)
        return io.NodeOutput(identity, ui=ui.PreviewText(told))


class SeFiLoadIdentity(io.ComfyNode):
    """Load an identity from ``{models}/sefi``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiLoadIdentity",
            display_name="SeFi Load Identity",
            category=CATEGORY,
            description="Loads an identity that SeFi Save Identity has put into models/sefi.",
            search_aliases=[
                "load identity",
                "load face",
                "import identity",
                "load character",
                "consistent character",
                "lora loader",
                "embedding",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=library.identity_files(),
                    tooltip="Identity file in models/sefi. Press R to see files that are new.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Another name for it in prompts: anna_2 makes the placeholder <anna_2>, so "
                        "that two files with the same name can be used together. Empty: the name "
                        "it was saved with."
                    ),
                ),
            ],
            outputs=[SEFI_IDENTITY.Output(display_name="identity", tooltip="The identity.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Check the file before the graph runs. A linked one is None here.

        ComfyUI marks every input that this takes, whichever is at fault, and checks a list itself
        (without our sentences, or a way to spell a name) if this does not take it. So it takes no
        name.
        """
        try:
            if file is not None:
                library.find_file(file)
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, name: str | None = None) -> object:
        """The file's content, so that a changed file is read again."""
        # A linked file name is not known yet: NaN equals nothing, so the file is read every time.
        return float("nan") if file is None else library.fingerprint(file)

    @classmethod
    def execute(cls, file: str, name: str | None = "") -> io.NodeOutput:
        with raised_by("SeFi Load Identity"):
            check_input("file", file, TEXT)
            name = "" if name is None else check_input("name", name, TEXT)
            identity = library.load_identity(file)
            if name:
                identity = identity.renamed(name)
        return io.NodeOutput(identity)
