"""Likeness, copying, order and contact sheet, with faces whose embeddings are known."""

import numpy as np
import pytest
import torch
from sefi_ide.sefi_core import contact_sheet as sheets
from sefi_ide.sefi_core.contact_sheet import Entry, contact_sheet
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.faces.alignment import TEMPLATE
from sefi_ide.sefi_core.faces.face import Face, choose
from sefi_ide.sefi_core.faces.recognition import SFACE
from sefi_ide.sefi_core.likeness import LEAST, Judged, copying, judge, ranked, table, words_of


class Colours:
    """Finds a face in every block of 112 columns that is not black; the larger, the redder."""

    def detect(self, picture):
        return [
            Face((x + 56.0, 56.0), 60, 70 + picture[0, x, 0] / 10, points=TEMPLATE + [x, 0])
            for x in range(0, picture.shape[1], 112)
            if picture[:, x : x + 112].any()
        ]


class Mean:
    """The mean colour of a face is its embedding."""

    kind = SFACE

    def embed(self, face):
        mean = face.reshape(-1, 3).mean(0)
        return mean / np.linalg.norm(mean)


RED, GREEN, BLUE, YELLOW = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)
BLACK = (0, 0, 0)


def picture(*colours):
    return np.hstack([np.full((112, 112, 3), colour, np.uint8) for colour in colours])


def judged(pictures, references, training=()):
    return judge(pictures, references, training, Colours(), Mean())


def test_likeness_is_the_mean_over_the_references_on_the_encoders_scale():
    one, two = judged([picture(RED), picture(YELLOW)], [picture(RED), picture(GREEN)])
    half = np.sqrt(0.5)
    assert one.likeness == pytest.approx(SFACE.likeness(0.5), abs=1e-3)
    assert two.likeness == pytest.approx(SFACE.likeness(half), abs=1e-3)
    assert one.copying is None and [one.number, two.number] == [0, 1]


def test_of_several_faces_the_most_alike_counts_and_of_a_reference_the_largest():
    (one,) = judged([picture(BLUE, GREEN, RED)], [picture(GREEN, RED)])  # red ones are larger
    assert one.likeness == pytest.approx(SFACE.likeness(1.0), abs=1e-3)
    assert one.face.center[0] == 56 + 2 * 112


def test_the_largest_face_of_a_reference_is_the_one_that_is_masked():
    """One rule for SeFi Likeness and SeFi Face Mask, also where one face is wide and one high."""
    low = Face((56.0, 56.0), 100, 60, points=TEMPLATE)
    high = Face((168.0, 56.0), 50, 90, points=TEMPLATE + [112, 0])
    assert low.width * low.height > high.width * high.height
    photo = picture(GREEN, BLUE)

    class Two:
        def detect(self, given):
            return [low, high] if given is photo else Colours().detect(given)

    (masked,) = choose([low, high], "largest", 0, photo.shape[:2], "the picture")
    of_green, of_blue = judge([picture(GREEN), picture(BLUE)], [photo], [], Two(), Mean())
    assert of_green.likeness == pytest.approx(SFACE.likeness(0.0), abs=1e-3)
    assert of_blue.likeness == pytest.approx(SFACE.likeness(1.0), abs=1e-3)
    assert masked is high


def test_a_picture_without_a_face_is_nobodys_and_comes_last():
    pictures = [picture(BLACK), picture(BLUE), picture(RED)]
    found = judged(pictures, [picture(RED)])
    assert found[0].face is None and found[0].likeness == 0 and found[1].likeness < 0
    order = ranked(found)
    assert [one.number for one in order] == [2, 1, 0]
    assert words_of(order[-1]) == "no face"
    assert table(order, 2).splitlines()[-1] == "| 3 | 0 | no face | no |"


@pytest.mark.parametrize("points", [None, np.full((5, 2), 3.0), np.full((5, 2), np.nan)])
def test_a_face_that_cannot_be_aligned_is_none(points):
    class Useless:
        def detect(self, picture):
            return [Face((5.0, 5.0), 4, 4, points=points)]

    with pytest.raises(SeFiError, match="no face was found in reference"):
        judge([picture(RED)], [picture(RED)], [], Useless(), Mean())


def test_photos_without_a_face_are_named():
    with pytest.raises(SeFiError, match="no face was found in reference:"):
        judged([picture(RED)], [picture(BLACK)])
    with pytest.raises(SeFiError, match="no face was found in photo 2 of reference"):
        judged([picture(RED)], [picture(RED), picture(BLACK)])
    with pytest.raises(SeFiError, match="no face was found in training_photo"):
        judged([picture(RED)], [picture(RED)], [picture(BLACK)])


def test_copying_is_1_for_the_training_photo_and_0_for_what_is_as_far_as_another_photo():
    e = np.eye(4)
    training, person = e[:1], np.array([[0.6, 0.8, 0, 0], [0.6, 0, 0.8, 0]])
    assert copying(training[0], training, person) == pytest.approx(1)
    assert copying(
        np.array([0.75, 0.75, 0, 0]) / np.linalg.norm([0.75, 0.75]), training, person
    ) == (pytest.approx((0.7071 - (0.6 + 0.8 + 0.6) * 0.7071 / 2) / (1 - 0.6), abs=1e-3))
    assert copying(e[3], training, person) == pytest.approx(0)  # as far from it as from the others
    assert copying(person[0], training, person) < 0


def test_the_training_photo_among_the_references_is_left_out_of_copying():
    e = np.eye(3)
    other = np.array([[0.6, 0.8, 0]])
    alone = copying(e[0], e[:1], other)
    assert copying(e[0], e[:1], np.vstack([e[:1], other])) == pytest.approx(alone)
    assert copying(e[0], e[:1], e[:1]) is None
    assert copying(e[0], e[:0], other) is None


def test_of_several_training_photos_the_one_that_is_copied_most_counts():
    e = np.eye(3)
    person = np.array([[0.6, 0.6, 0.53]])
    assert copying(e[1], e[:2], person) == pytest.approx(1)


def test_copying_reaches_the_table():
    found = judged([picture(RED), picture(BLACK)], [picture(YELLOW)], [picture(RED)])
    assert found[0].copying == pytest.approx(1, abs=1e-3)
    assert words_of(found[0]).endswith(", copying 1.00")
    lines = table(found, 1).splitlines()
    assert lines[0] == "| rank | picture | likeness | copying | kept |"
    assert lines[3] == "| 2 | 1 | no face |  | no |"


FACE = Face((5.0, 5.0), 4, 4)
FOUR = [Judged(0, FACE, 0.2), Judged(1), Judged(2, FACE, 0.9), Judged(3, FACE, -0.3)]


@pytest.mark.parametrize(
    ("threshold", "keep", "numbers"),
    [
        (LEAST, 0, [2, 0, 3, 1]),
        (LEAST, 2, [2, 0]),
        (LEAST, 9, [2, 0, 3, 1]),
        (0.2, 0, [2, 0]),
        (0.2, 1, [2]),
        (-0.9, 0, [2, 0, 3]),
        (1.5, 3, [2]),
    ],
)
def test_what_is_kept(threshold, keep, numbers):
    assert [one.number for one in ranked(FOUR, threshold, keep)] == numbers


def test_every_photo_and_picture_is_told_as_done():
    told = []
    judge([picture(RED)] * 3, [picture(RED)] * 2, [picture(RED)], Colours(), Mean(), told.append)
    assert told == [1, 2, 3, 4, 5, 6]


def test_the_sheet_has_every_picture_in_its_place_with_the_face_marked():
    entries = [Entry(picture(RED), "1: 0.9", FACE), Entry(picture(GREEN), "2: no face", faint=True)]
    entries += [Entry(np.full((20, 80, 3), (0, 0, 200), np.uint8), "a very long label " * 5)]
    sheet = contact_sheet(entries)
    assert sheet.shape == (
        sheets.GAP + 2 * (sheets.CELL + sheets.STRIP + sheets.GAP),
        sheets.GAP + 2 * (sheets.CELL + sheets.GAP),
        3,
    )

    def at(row, column):
        y = sheets.GAP + row * (sheets.CELL + sheets.STRIP + sheets.GAP) + sheets.CELL // 2
        x = sheets.GAP + column * (sheets.CELL + sheets.GAP) + sheets.CELL // 2
        return sheet[y, x]

    for place, colour in (((0, 0), RED), ((0, 1), GREEN), ((1, 0), BLUE), ((1, 1), (255,) * 3)):
        torch.testing.assert_close(at(*place), torch.tensor(colour) / 255)
    unmarked = contact_sheet([Entry(picture(RED), "1: 0.9")])
    marked = contact_sheet([Entry(picture(RED), "1: 0.9", Face((56.0, 56.0), 40, 60, 20.0))])
    assert (marked != unmarked).any(-1).sum() > 100
    assert torch.equal(marked[sheets.GAP + sheets.CELL :], unmarked[sheets.GAP + sheets.CELL :])


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (700, 3)])
def test_pictures_of_any_shape_fit(size):
    entry = Entry(np.full((*size, 3), 9, np.uint8), "x")
    assert contact_sheet([entry] * 70).shape[1] == sheets.GAP + 8 * (sheets.CELL + sheets.GAP)
