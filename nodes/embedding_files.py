"""Nodes that exchange identities with ordinary textual inversions in ``{models}/embeddings``."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..sefi_core.comfyui import embedding_files, notices
from ..sefi_core.comfyui.library import IF_EXISTS
from ..sefi_core.errors import SeFiError, raised_by
from ..sefi_core.identity.identity import Identity
from .types import CATEGORY, SEFI_IDENTITY, TEXT, check_identity, check_input


class SeFiExportEmbedding(io.ComfyNode):
    """Save an identity as an ordinary textual inversion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiExportEmbedding",
            display_name="SeFi Export Embedding",
            category=CATEGORY,
            description=(
                "Saves a learned identity as an ordinary textual inversion in models/embeddings, "
                "for use without this pack: write embedding:anna in any prompt. It is less alike "
                "than the identity itself, whose stages become one."
            ),
            search_aliases=["export embedding", "textual inversion", "save embedding"],
            inputs=[
                SEFI_IDENTITY.Input("identity", tooltip="The identity to export."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip=(
                        "File name within models/embeddings, with or without .safetensors, and "
                        "without spaces. Empty: the identity's own name."
                    ),
                ),
                io.Combo.Input(
                    "if_exists",
                    options=list(IF_EXISTS),
                    default="new number",
                    tooltip=(
                        "What to do when the file exists and holds something else: save beside it "
                        "under a new number (anna_2), overwrite it, or stop with an error."
                    ),
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        """Refuse a bad file name before anything is trained. A linked one is None here."""
        try:
            if file_name:
                embedding_files.check_file_name(file_name)
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """NaN equals nothing: a file that is gone is written again, and an equal one is left."""
        return float("nan")

    @classmethod
    def execute(cls, identity: Identity, file_name: str, if_exists: str) -> io.NodeOutput:
        with raised_by("SeFi Export Embedding"):
            check_identity(identity)
            check_input("file_name", file_name, TEXT)
            written = embedding_files.export_embedding(identity, file_name, if_exists)
        told = f"Write {written} in prompts; with this pack, {identity.placeholder} is more alike."
        notices.say(told)
        return io.NodeOutput(ui=ui.PreviewText(told))


class SeFiLoadEmbedding(io.ComfyNode):
    """Make an identity of an ordinary textual inversion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiLoadEmbedding",
            display_name="SeFi Load Embedding",
            category=CATEGORY,
            description=(
                "Makes an identity of one stage of a textual inversion file in models/embeddings, "
                "to draw with or for SeFi Train Identity to go on from."
            ),
            search_aliases=["load embedding", "textual inversion", "import embedding"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=embedding_files.embedding_files(),
                    tooltip="Embedding in models/embeddings. Press R to see files that are new.",
                ),
                io.String.Input(
                    "class_word",
                    default="person",
                    tooltip="The general word for it, where <name> will stand: person, cat, chair.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="Write <name> in prompts later. Empty: the name of the file.",
                ),
            ],
            outputs=[SEFI_IDENTITY.Output(display_name="identity", tooltip="The identity.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Check that there is the file before the graph runs. A linked one is None here."""
        try:
            if file is not None:
                embedding_files.find_embedding(file)
        except SeFiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: object) -> object:
        """The file's content, so that a changed file is read again."""
        return float("nan") if file is None else embedding_files.fingerprint(file)

    @classmethod
    def execute(cls, file: str, class_word: str, name: str | None = "") -> io.NodeOutput:
        with raised_by("SeFi Load Embedding"):
            check_input("file", file, TEXT)
            check_input("class_word", class_word, TEXT)
            called = check_input("name", "" if name is None else name, TEXT)
            return io.NodeOutput(embedding_files.load_embedding(file, called, class_word))
