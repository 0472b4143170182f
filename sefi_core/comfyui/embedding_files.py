"""Textual inversions in ComfyUI's folder ``{models}/embeddings``: exporting and loading."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import folder_paths
from comfy.sd1_clip import SDTokenizer

from ..digest import file_digest
from ..errors import SeFiError, quoted
from ..identity.identity import Identity
from ..identity.textual_inversion import PICKLES, SAFE, embedding_bytes, read_embedding
from . import library

FOLDER = "embeddings"

_UNWRITABLE = re.compile(r"[\s()<>\[\],:\\]|embedding:")
"""What ends the name of an embedding in a prompt, or is changed by its weights."""


def embedding_files() -> list[str]:
    """The files that may be embeddings, relative to the folder and sorted."""
    names = folder_paths.get_filename_list(FOLDER)
    return sorted(name for name in names if Path(name).suffix.lower() in (SAFE, *PICKLES))


def find_embedding(file: str) -> Path:
    """The full path of a file of the list; raises :class:`SeFiError` if there is no such file."""
    path = None
    with suppress(ValueError):  # another drive, or a name that no file can have
        # A workflow may come from another operating system.
        path = folder_paths.get_full_path(FOLDER, file.replace("\\", "/")) if file else None
    if path is None or Path(path).suffix.lower() not in (SAFE, *PICKLES):
        raise SeFiError(
            f"the file {quoted(file)} is not in {save_folder()}: put an embedding (.safetensors or "
            ".pt) there, press R to refresh the lists and choose it"
        )
    return Path(path)


def fingerprint(file: str) -> str:
    """SHA-256 of the file: another whenever it has changed. Raises as :func:`find_embedding`."""
    path = find_embedding(file)
    try:
        return file_digest(path)
    except OSError as error:
        raise SeFiError(f"the file {path} cannot be read: check that you may open it") from error


def load_embedding(file: str, name: str, class_word: str) -> Identity:
    """An identity of one stage from an embedding; without a ``name`` it is called as the file."""
    path = find_embedding(file)
    return read_embedding(path, name or path.stem, class_word)


def save_folder() -> Path:
    """The first of ComfyUI's folders for embeddings, where new ones go."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def check_file_name(file_name: str) -> None:
    """Raise :class:`SeFiError` if :func:`export_embedding` would refuse ``file_name``."""
    library.check_file_name(file_name, save_folder())
    if _UNWRITABLE.search(file_name.replace("\\", "/")):
        raise SeFiError(
            f"the file name {quoted(file_name)} cannot be written behind embedding: in a prompt, "
            "which ends at spaces, brackets and commas: give a plain name such as anna"
        )


def export_embedding(identity: Identity, file_name: str = "", if_exists: str = "new number") -> str:
    """Save an identity as an embedding, as safely as :func:`library.save_identity` does.

    Gives its name for prompts, ``embedding:anna``. Raises :class:`SeFiError` if the name or
    ``if_exists`` is refused, the identity cannot be one or the disk cannot take the file.
    """
    folder, name = save_folder(), file_name or identity.name
    check_file_name(name)
    content = embedding_bytes(identity, _tokens_of(identity.class_word))

    def holds(path: Path) -> bool:
        try:
            return path.is_file() and path.read_bytes() == content
        except OSError:
            return False

    path = library.save_content(
        folder, name, content, if_exists, f"the embedding of {identity.name}", holds
    )
    return f"embedding:{path.relative_to(folder).with_suffix('').as_posix()}"


@cache
def _tokens_of(class_word: str) -> int:
    """How many places a class word takes in a prompt; all families divide words alike."""
    return len(SDTokenizer().tokenizer(class_word)["input_ids"]) - 2
