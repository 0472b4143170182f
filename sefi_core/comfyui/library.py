"""Identity files in ComfyUI's model folder ``{models}/sefi``: listing, loading and safe saving."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..checks import check_choice
from ..errors import SeFiError, quoted
from ..identity.content import not_a_plain_file, read_content, unreadable
from ..identity.file import read_identity, to_bytes
from ..identity.identity import Identity
from ..identity.saving import LOCK, make_folder, remove_leftovers, write_whole
from ..text.placeholders import check_name, without_joiners

FOLDER = "sefi"
EXTENSION = ".safetensors"

IF_EXISTS = ("new number", "overwrite", "error")
"""What :func:`save_identity` does when another identity has the file name already."""

MAX_FILE_NAME_BYTES = 180
"""Room for a number, the extension and the folder within the path limit of Windows, 260."""

_FORBIDDEN = re.compile(r'[<>:"|?*]')
_RESERVED_BY_WINDOWS = re.compile(
    r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])\s*(\.|$)", re.IGNORECASE
)


def register_model_folder() -> None:
    """Make ``{models}/sefi`` a model folder of ComfyUI that lists ``*.safetensors``.

    Called once when ComfyUI loads the pack; calling it again changes nothing. Folders that the
    user's extra_model_paths.yaml gives for ``sefi`` stay, in front of this one.
    """
    default = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, default)
    folder_paths.folder_names_and_paths[FOLDER][1].add(EXTENSION)


def identity_files() -> list[str]:
    """The identity files that can be loaded, relative to the folder, in form NFC and sorted."""
    names = folder_paths.get_filename_list(FOLDER)
    composed = {name: unicodedata.normalize("NFC", name) for name in names}
    # Of two files that differ in nothing else, the one in form NFC goes by that name.
    return sorted(name if nfc in composed else nfc for name, nfc in composed.items())


def load_identity(file: str) -> Identity:
    """The identity in ``file``, one of :func:`identity_files`.

    Raises :class:`SeFiError` as :func:`sefi_core.identity.read_identity` does, and for names that
    lead out of the folder.
    """
    return read_identity(find_file(file))


def find_file(file: str) -> Path:
    """The full path of ``file``; raises :class:`SeFiError` if the folder has no such file."""
    if not file:
        raise SeFiError(
            f"there is no identity file to load: train an identity and save it, or put a file into "
            f"{_save_folder()} and press R to refresh the lists"
        )
    relative = file.replace("\\", "/")  # a workflow may come from another operating system
    if relative.startswith("/") or ":" in relative or ".." in relative.split("/"):
        raise SeFiError(
            f"the file name {quoted(file)} is refused, it leads out of {_save_folder()}: choose a "
            "file of the list"
        )
    folders = map(Path, folder_paths.get_folder_paths(FOLDER))
    paths = [_as_spelled_on_disk(folder, relative) for folder in folders]
    for path in paths:
        if os.path.isfile(path):
            return path
    for path in paths:
        _check_absent(path)
    raise SeFiError(
        f"the identity file {quoted(file)} is not in {_save_folder()}: press R to refresh the "
        "lists and choose another, or put the file back"
    )


def fingerprint(file: str) -> str:
    """SHA-256 of the content of ``file``: another value whenever the file has changed.

    Raises :class:`SeFiError` if there is no such file, or if it is too large for an identity.
    """
    return hashlib.sha256(read_content(find_file(file)).data).hexdigest()


def check_file_name(file_name: str, folder: Path | None = None) -> None:
    """Raise :class:`SeFiError` if :func:`save_identity`, or :func:`save_content` into ``folder``,
    would refuse ``file_name``."""
    if file_name:
        _target(folder or _save_folder(), file_name)


def check_saveable_name(name: str) -> None:
    """Raise :class:`SeFiError` if an identity of this name could not be saved under it.

    Names that :func:`sefi_core.text.placeholders.check_name` allows may be reserved by Windows, or
    too long in bytes.
    """
    if problem := _problem_with(unicodedata.normalize("NFC", name)):
        raise SeFiError(
            f"an identity cannot be saved under the name {quoted(name)}, {problem}: give it "
            "another name, for example anna_2"
        )


def save_identity(identity: Identity, file_name: str = "", if_exists: str = "new number") -> Path:
    """Save atomically into the first ``sefi`` folder and return the path.

    ``file_name`` may have subfolders ("people/anna") and the extension or not; empty means the
    identity's own name. If the file exists and holds the very same identity, nothing is written.
    If it holds anything else, ``if_exists`` decides: "new number" saves as ``anna_2``, ``anna_3``
    ..., "overwrite" replaces it, "error" refuses.

    The file is there whole or not at all, with or without hard links, and other processes may save
    at the same time. Raises :class:`SeFiError`, and leaves existing files as they are, if the name
    or ``if_exists`` is refused, something else than a file is to be overwritten or the disk cannot
    take the file.
    """
    return save_content(
        _save_folder(),
        file_name or identity.name,
        to_bytes(identity),
        if_exists,
        f"the identity {identity.name}",
        lambda path: _holds(path, identity),
    )


def save_content(
    folder: Path,
    file_name: str,
    content: bytes,
    if_exists: str,
    called: str,
    holds: Callable[[Path], bool],
) -> Path:
    """Save a safetensors file into a folder as :func:`save_identity` does, and return the path.

    ``called`` is what it is in errors, and ``holds`` whether a file has this content already.
    """
    check_choice("if_exists", if_exists, IF_EXISTS)
    target = _target(folder, file_name)
    try:
        make_folder(target.parent)
        for path in _numbered(target):
            try:
                write_whole(path, content)
                return path
            except FileExistsError as error:
                if holds(path):
                    remove_leftovers(path.parent)
                    return path
                if if_exists == "error":
                    raise SeFiError(
                        f"the file {path} exists already and holds something else: give another "
                        'file name, or set if_exists to "new number" or "overwrite"'
                    ) from error
            if if_exists == "overwrite":
                write_whole(path, content, overwrite=True)
                return path
    except OSError as error:
        raise SeFiError(
            f"{called} could not be saved as {target} "
            f"({error.strerror or error}): {_remedy(error)}; it is not lost, queue again to save it"
        ) from error
    raise AssertionError("the numbers never end")


def how_to_use(identity: Identity, path: Path) -> str:
    """Which file :func:`save_identity` has written, and what to write in prompts.

    A file of another name, such as that of a second ``<anna>``, still has the identity's own
    placeholder.
    """
    file = path.relative_to(_save_folder()).as_posix()
    told = f"Saved as {file}. Write {identity.placeholder} in prompts"
    try:
        name = check_name(path.stem)
    except SeFiError:
        return f"{told}; for another placeholder, set name in SeFi Load Identity."
    if name == identity.name:
        return f"{told}."
    return f"{told}; to write <{name}>, set name in SeFi Load Identity to {name}."


def _save_folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _checked_relative(name: str) -> str:
    """``name`` in form NFC, with ``/`` between its parts and no extension; raises if not tame."""
    relative = unicodedata.normalize("NFC", name).replace("\\", "/")
    if relative.lower().endswith(EXTENSION):
        relative = relative[: -len(EXTENSION)]
    if problem := _problem_with(relative):
        raise SeFiError(
            f"the file name {quoted(name)} is refused, {problem}: give a plain name such as anna "
            "or people/anna"
        )
    return relative


def _problem_with(relative: str) -> str:
    """Why a path, without extension, cannot be a file on every system; "" if it can."""
    if not without_joiners(relative).isprintable() or _FORBIDDEN.search(relative):
        return "it has characters that file names cannot have everywhere"
    if len(relative.encode()) > MAX_FILE_NAME_BYTES:
        return f"it is longer than {MAX_FILE_NAME_BYTES} bytes"
    for part in relative.split("/"):
        if not part or part.startswith("."):
            return "it leads out of the folder or to a hidden file"
        if part != part.strip() or part.endswith("."):
            return "a part of it begins or ends with a space or ends with a dot"
        if _RESERVED_BY_WINDOWS.match(part):
            return f"Windows keeps the name {part} for itself"
    return ""


def _as_spelled_on_disk(folder: Path, relative: str) -> Path:
    """The path below ``folder`` that ``relative`` names: systems write accents in two ways."""
    path = folder
    for part in relative.split("/"):
        names = [part]
        if not os.path.lexists(path / part):
            with suppress(OSError):
                composed = unicodedata.normalize("NFC", part)
                names += [
                    n for n in os.listdir(path) if unicodedata.normalize("NFC", n) == composed
                ]
        path /= names[-1]
    return path


def _check_absent(path: Path) -> None:
    """Raise :class:`SeFiError` if there is something at ``path``, or if one may not look."""
    try:
        path.stat()
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (OSError, ValueError):
        return
    raise not_a_plain_file(path)


def _target(folder: Path, name: str) -> Path:
    target = folder / (_checked_relative(name) + EXTENSION)
    real_folder, real_parent = map(os.path.realpath, (folder, target.parent))
    if not Path(real_parent).is_relative_to(real_folder):
        raise SeFiError(
            f"the file name {quoted(name)} is refused, a link leads out of {folder}: give a name "
            "in a real subfolder"
        )
    return target


def _numbered(target: Path) -> Iterator[Path]:
    """``anna``, ``anna_2``, ``anna_3`` ..."""
    yield target
    for number in itertools.count(2):
        yield target.with_name(f"{target.stem}_{number}{EXTENSION}")


def _holds(path: Path, identity: Identity) -> bool:
    """Whether there is a sound file at ``path`` with exactly this identity."""
    try:
        return read_identity(path).same_content(identity)
    except SeFiError:
        return False


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG):
        return "free some space on the disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"make the folder writable, and {LOCK} in it if there is one"
    if error.errno == errno.EBUSY:
        return "wait until the other program has saved"
    if error.errno == getattr(errno, "ENOLCK", None):
        return "let the network drive lock files, or give another folder in extra_model_paths.yaml"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "move away the file or folder that is in its place"
    if error.errno == errno.ENAMETOOLONG:
        return "give a shorter file name"
    return "check the disk and the folder"
