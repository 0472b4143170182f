"""Identity files in ComfyUI's model folder ``{models}/sefi``: listing, loading and safe saving."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..errors import SeFiError, quoted
from ..identity.file import read_identity, to_bytes
from ..identity.identity import Identity

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
    """The identity files that can be loaded, relative to the folder, sorted."""
    return folder_paths.get_filename_list(FOLDER)


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
    found = folder_paths.get_full_path(FOLDER, relative)
    if found is None:
        raise SeFiError(
            f"the identity file {quoted(file)} is not in {_save_folder()}: press R to refresh the "
            "lists and choose another, or put the file back"
        )
    return Path(found)


def fingerprint(file: str) -> str:
    """SHA-256 of the content of ``file``: another value whenever the file has changed."""
    digest = hashlib.sha256()
    with open(find_file(file), "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file_name(file_name: str) -> None:
    """Raise :class:`SeFiError` if :func:`save_identity` would refuse ``file_name``."""
    if file_name:
        _target(_save_folder(), file_name)


def save_identity(identity: Identity, file_name: str = "", if_exists: str = "new number") -> Path:
    """Save atomically into the first ``sefi`` folder and return the path.

    ``file_name`` may have subfolders ("people/anna") and the extension or not; empty means the
    identity's own name. If the file exists and holds the very same identity, nothing is written.
    If it holds anything else, ``if_exists`` decides: "new number" saves as ``anna_2``, ``anna_3``
    ..., "overwrite" replaces it, "error" refuses.

    The content is written to a temporary file beside the target and moved into place when it is
    safe on the disk, so a file is there whole or not at all, and other processes may save at the
    same time. Raises :class:`SeFiError`, and leaves existing files as they are, if the name is
    refused or the disk cannot take the file.
    """
    target = _target(_save_folder(), file_name or identity.name)
    content = to_bytes(identity)
    overwrite = if_exists == "overwrite"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in _numbered(target):
            try:
                if not (overwrite and _holds(path, identity)):
                    _write(path, content, overwrite)
                return path
            except FileExistsError as error:
                if _holds(path, identity):
                    return path
                if if_exists == "error":
                    raise SeFiError(
                        f"the file {path} exists already and holds something else: give another "
                        'file name, or set if_exists to "new number" or "overwrite"'
                    ) from error
    except OSError as error:
        raise SeFiError(
            f"the identity {identity.name} could not be saved as {target} "
            f"({error.strerror or error}): {_remedy(error)}; it is not lost, queue again to save it"
        ) from error
    raise AssertionError("the numbers never end")


def _save_folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _checked_relative(name: str) -> str:
    """``name`` with ``/`` between its parts and no extension; raises if it is not a tame path."""
    relative = name.replace("\\", "/")
    if relative.lower().endswith(EXTENSION):
        relative = relative[: -len(EXTENSION)]
    problem = None
    if not relative.isprintable() or _FORBIDDEN.search(relative):
        problem = "it has characters that file names cannot have everywhere"
    elif len(relative.encode()) > MAX_FILE_NAME_BYTES:
        problem = f"it is longer than {MAX_FILE_NAME_BYTES} bytes"
    else:
        for part in relative.split("/"):
            if not part or part.startswith("."):
                problem = "it leads out of the folder or to a hidden file"
            elif part != part.strip() or part.endswith("."):
                problem = "a part of it begins or ends with a space or ends with a dot"
            elif _RESERVED_BY_WINDOWS.match(part):
                problem = f"Windows keeps the name {part} for itself"
    if problem:
        raise SeFiError(
            f"the file name {quoted(name)} is refused, {problem}: give a plain name such as anna "
            "or people/anna"
        )
    return relative


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


def _write(path: Path, content: bytes, overwrite: bool) -> None:
    """Write a whole file or nothing; FileExistsError if it is there and must stay."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    # Not made by tempfile, whose files only their owner can read.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _move_without_overwriting(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_without_overwriting(temporary: Path, target: Path) -> None:
    """As os.replace, but raises FileExistsError if the target exists, even if only just now."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # No hard links on this file system: reserve the name with an empty file, then replace it.
        with open(target, "xb"):
            pass
        try:
            os.replace(temporary, target)
        except OSError:
            target.unlink()
            raise


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG):
        return "free some space on the disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "move away the file or folder that is in its place"
    if error.errno == errno.ENAMETOOLONG:
        return "give a shorter file name"
    return "check the disk and the folder"
