"""``make test-photos``: what the pack makes of real photos.

Prints one JSON object with the figures, and leaves a contact sheet with the boxes and masks in
``output/photos.png``.

A face is found when a detection's box shares at least 0.35 with it (intersection over union), or
when its centre is within a third of the face's width and height from the face's and neither box is
more than twice as wide as the other. A detection finds one face.
"""

from __future__ import annotations

# ruff: noqa: E402
import json
import runpy
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from time import process_time

if __name__ == "__main__":  # as a file, whose package is still to be found
    __package__ = "sefi_ide.tests.photos"
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "comfyui.py"))[
        "name_the_pack"
    ]()

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment

from ...sefi_core.faces.extract import Selection, extract_faces
from ...sefi_core.faces.face import Detector, Face, choose
from ...sefi_core.faces.yunet import YuNetDetector
from ...tools import photos

HEADS = Path(__file__).with_name("heads.json")
SHEET = photos.REPOSITORY / "output" / "photos.png"

OVERLAP = 0.35
# Two people are as large as each other within this share of the area (an eighth of the length: the
# box of a side view is taller), as central within this share of half the diagonal, and as far to
# the left within this share of a face's width.
TIES = {"largest": 0.25, "most central": 0.075, "index": 0.15}

Box = tuple[float, float, float, float]


def pixels_of(photo: dict) -> np.ndarray:
    """(height, width, 3), uint8, as the file stores it."""
    with Image.open(photos.path_of(photo)) as picture:
        return np.array(picture.convert("RGB"))


def box_of(face: Face) -> Box:
    (x, y), width, height = face.center, face.width, face.height
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared)


def finds(detection: Box, face: Box) -> bool:
    if overlap(detection, face) >= OVERLAP:
        return True
    width, height = face[2] - face[0], face[3] - face[1]
    off_x = abs(detection[0] + detection[2] - face[0] - face[2]) / 2
    off_y = abs(detection[1] + detection[3] - face[1] - face[3]) / 2
    times = (detection[2] - detection[0]) / width
    return off_x <= width / 3 and off_y <= height / 3 and 0.5 <= times <= 2


def match(detections: list[Box], faces: list[Box]) -> dict[int, int]:
    """Which detection finds which face, each at most once: as many as possible, then as well."""
    if not detections or not faces:
        return {}
    score = np.array(
        [[finds(one, face) * (10 + overlap(one, face)) for face in faces] for one in detections]
    )
    pairs = zip(*linear_sum_assignment(-score), strict=True)
    return {int(one): int(face) for one, face in pairs if score[one, face] > 0}


@dataclass
class Result:
    """What was found in one photo of ``truth.json``."""

    photo: dict
    found: list[Face]
    size: tuple[int, int]
    seconds: float

    @cached_property
    def boxes(self) -> list[Box]:
        return [box_of(face) for face in self.found]

    @cached_property
    def matches(self) -> dict[int, int]:
        """The index of a face of the truth by that of what was found."""
        return match(self.boxes, self.photo["faces"] or [])

    @property
    def faces(self) -> int:
        """How many faces there are."""
        return 1 if self.photo["faces"] is None else len(self.photo["faces"])

    @property
    def hits(self) -> int:
        """How many of them are found. Without a box: the one is, if one in the middle is."""
        if self.photo["faces"] is not None:
            return len(self.matches)
        height, width = self.size
        middle = (width / 2, height / 2)
        return int(
            any(
                abs(face.center[0] - middle[0]) <= width / 4
                and abs(face.center[1] - middle[1]) <= height / 4
                and width / 3 <= face.width <= width
                for face in self.found
            )
        )

    @property
    def alarms(self) -> int:
        """Detections that find neither a face nor one of those that need not be found."""
        if self.photo["faces"] is None:
            return len(self.found) - self.hits
        rest = [box for one, box in enumerate(self.boxes) if one not in self.matches]
        return sum(not any(finds(box, face) for face in self.photo["ignore"]) for box in rest)


def detect(photo: dict, detector: Detector) -> Result:
    pixels = pixels_of(photo)
    start = process_time()
    found = detector.detect(pixels)
    return Result(photo, found, pixels.shape[:2], process_time() - start)


@dataclass
class Groups:
    """How often each way to choose meant the right person: ``right`` of ``asked``."""

    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wrong: list[str] = field(default_factory=list)

    def add(self, way: str, photo: str, good: bool) -> None:
        self.asked[way] += 1
        self.right[way] += good
        if not good:
            self.wrong.append(f"{way}: {photo}")


def choices(results: list[Result]) -> Groups:
    """The choice among several, judged by the boxes of the truth.

    By index: the people from left to right. Groups with someone who need not be found count only
    for the largest. Ties, by :data:`TIES`, may be decided either way.
    """
    groups = Groups()
    for result in results:
        faces, name = result.photo["faces"] or [], result.photo["name"]
        if len(faces) < 2:
            continue
        areas = [(face[2] - face[0]) * (face[3] - face[1]) for face in faces]
        one = _chosen(result, "largest")
        least = max(areas) * (1 - TIES["largest"])
        groups.add("largest", name, one is not None and areas[one] >= least)
        if result.photo["ignore"]:
            continue
        middle = np.array(result.size[::-1]) / 2
        centres = np.array([[(a + c) / 2, (b + d) / 2] for a, b, c, d in faces])
        distances = np.linalg.norm(centres - middle, axis=1) / np.linalg.norm(middle)
        one = _chosen(result, "most central")
        near = one is not None and distances[one] <= min(distances) + TIES["most central"]
        groups.add("most central", name, near)
        order = [_chosen(result, "left to right", index) for index in range(len(result.found))]
        groups.add("index", name, len(order) == len(faces) and _from_the_left(order, faces))
    return groups


def _chosen(result: Result, which: str, index: int = 0) -> int | None:
    """The face of the truth that the choice means, or None."""
    if not result.found:
        return None
    (face,) = choose(result.found, which, index, result.size, result.photo["name"])
    at = next(number for number, one in enumerate(result.found) if one is face)
    return result.matches.get(at)


def _from_the_left(order: list[int | None], faces: list[Box]) -> bool:
    known = [one for one in order if one is not None]
    if len(known) < len(order):
        return False
    for one, following in zip(known, known[1:], strict=False):
        a, b = faces[one], faces[following]
        if (a[0] + a[2]) / 2 > (b[0] + b[2]) / 2 + TIES["index"] * (a[2] - a[0]):
            return False
    return True


def head_overlaps(detector: Detector) -> dict[str, float]:
    """Intersection over union of the region "head" with the heads of ``heads.json``."""
    known = {photo["sha256"]: photo for photo in photos.photos()}
    return {
        head["name"]: head_overlap(head, head_mask(head, known[head["sha256"]], detector))
        for head in json.loads(HEADS.read_text("utf-8"))["photos"]
        if photos.path_of(known[head["sha256"]]).exists()
    }


def head_mask(head: dict, photo: dict, detector: Detector) -> np.ndarray | None:
    """The mask of the person whose face is nearest to the head's, or None if it is not found."""
    pixels = pixels_of(photo)
    found = sorted(detector.detect(pixels), key=lambda face: face.center)
    matches = match([box_of(face) for face in found], [head["face"]])
    if not matches:
        return None
    (index,) = matches
    selection = Selection(which_face="left to right", face_index=index, region="head")
    batch = torch.from_numpy(pixels)[None].float() / 255
    return extract_faces(batch, detector, selection).masks[0].numpy()


def head_overlap(head: dict, mask: np.ndarray | None) -> float:
    if mask is None:
        return 0.0
    drawn = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(drawn).polygon([tuple(point) for point in head["polygon"]], fill=1)
    truth, mask = np.array(drawn, bool), mask >= 0.5
    return float((truth & mask).sum() / (truth | mask).sum())


def share(results: list[Result]) -> float:
    return sum(one.hits for one in results) / sum(one.faces for one in results)


def figures(results: list[Result], heads: dict[str, float]) -> dict:
    """All that is measured, by name; times in milliseconds of this process."""
    kinds = defaultdict(list)
    for one in results:
        kinds[one.photo["kind"]].append(one)
    faces = kinds["faces"]
    men = defaultdict(list)
    for one in kinds["johns"]:
        men[one.photo["name"].split("/")[0]].append(one)
    groups = choices(faces)
    times = [one.seconds * 1000 for one in results]
    return {
        "photos": len(results),
        "one_person": round(share([one for one in faces if one.faces == 1]), 4),
        "all_faces": round(share(faces), 4),
        "missed": [one.photo["name"] for one in faces + kinds["johns"] if one.hits < one.faces],
        "men": {man: f"{sum(r.hits for r in of)} of {len(of)}" for man, of in men.items()},
        "alarms": {kind: sum(r.alarms for r in of) for kind, of in kinds.items()},
        "alarms_in": [one.photo["name"] for one in results if one.alarms],
        "groups": {way: f"{groups.right[way]} of {groups.asked[way]}" for way in groups.asked},
        "groups_wrong": groups.wrong,
        "head_mean": round(float(np.mean(list(heads.values()))), 4) if heads else None,
        "head": {name: round(value, 3) for name, value in heads.items()},
        "ms_median": round(float(np.median(times)), 1),
        "ms_mean_with_a_face": round(
            1000 * float(np.mean([one.seconds for one in faces + kinds["johns"]])), 1
        ),
        "ms_largest": round(max(times), 1),
    }


def contact_sheet(results: list[Result], detector: Detector) -> Image.Image:
    """Each photo with the faces of the truth in green, of those found in yellow, the head's mask in
    red and the polygon drawn by hand in blue."""
    polygons = defaultdict(list)
    for head in json.loads(HEADS.read_text("utf-8"))["photos"]:
        polygons[head["sha256"]].append([tuple(point) for point in head["polygon"]])
    side, columns = 240, 10
    sheet = Image.new("RGB", (columns * side, ceil(len(results) / columns) * side))
    for number, one in enumerate(results):
        pixels = pixels_of(one.photo)
        line = max(1, max(one.size) // side)
        if one.found:
            selection = Selection(which_face="all", region="head")
            batch = torch.from_numpy(pixels)[None].float() / 255
            mask = extract_faces(batch, detector, selection).masks[0].numpy()[..., None]
            pixels = (pixels * (1 - 0.45 * mask) + mask * (115, 0, 0)).astype(np.uint8)
        tile = Image.fromarray(pixels)
        draw = ImageDraw.Draw(tile)
        for boxes, colour in ((one.photo["faces"] or [], "lime"), (one.boxes, "yellow")):
            for box in boxes:
                draw.rectangle(tuple(box), outline=colour, width=line)
        for polygon in polygons[one.photo["sha256"]]:
            draw.line([*polygon, polygon[0]], fill="deepskyblue", width=line)
        tile.thumbnail((side - 4, side - 14))
        left, top = number % columns * side, number // columns * side
        sheet.paste(tile, (left, top))
        name = f"{one.hits}/{one.faces} {one.photo['name']}"[:38]
        ImageDraw.Draw(sheet).text((left + 2, top + side - 13), name, fill="white")
    return sheet


def main() -> int:
    torch.set_num_threads(1)
    fetched = photos.fetch(photos.photos())
    detector = YuNetDetector()
    there = [one for one in photos.photos() if one["name"] not in fetched.missing]
    detector.detect(np.zeros((64, 64, 3), np.uint8))  # reads the weights
    results = [detect(photo, detector) for photo in there]
    SHEET.parent.mkdir(exist_ok=True)
    contact_sheet(results, detector).save(SHEET)
    measured = figures(results, head_overlaps(detector)) | {"not_fetched": fetched.missing}
    sys.stdout.write(json.dumps(measured) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
