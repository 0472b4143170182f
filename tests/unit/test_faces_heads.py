"""The head's region, on people that are masks by formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sefi_ide.sefi_core.faces import heads, person
from sefi_ide.sefi_core.faces.crop import crop
from sefi_ide.sefi_core.faces.extract import Selection, extract_faces
from sefi_ide.sefi_core.faces.face import Face
from sefi_ide.sefi_core.faces.heads import head_region
from sefi_ide.sefi_core.faces.regions import paint
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tests.unit.test_faces_yunet import EXPECTED

HEIGHT, WIDTH = 400, 600
FACE = Face((300.0, 200.0), 76.0, 100.0)


def ellipse(x, y, half_width, half_height):
    rows, columns = np.indices((HEIGHT, WIDTH))
    return np.hypot((columns - x) / half_width, (rows - y) / half_height) < 1


# A head with hair, its neck and its shoulders.
HEAD = ellipse(300, 190, 52, 65)
NECK, SHOULDERS = ellipse(300, 260, 22, 40), ellipse(300, 380, 130, 110)
PERSON = HEAD | NECK | SHOULDERS


def mask_of(people, face=FACE, others=(), monkeypatch=None, **selection):
    """The mask, where the network takes for a person what ``people`` says."""
    monkeypatch.setattr(heads, "person_in", lambda square: (square.mean(-1) > 0.5).float())
    picture = torch.from_numpy(np.repeat(people[..., None], 3, 2)).float()
    mask = torch.zeros(people.shape)
    paint(head_region(picture, face, others), mask)
    return mask.numpy() > 0.5


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_the_network_answers_as_the_tflite_file_does():
    """``face_networks.safetensors`` holds the interpreter's answer for the same picture."""
    square = torch.from_numpy(drawn(256)).float() / 255
    answer = person.person_in(square)[::4, ::4]
    expected = load_file(EXPECTED)["selfie"]
    assert 0.2 < (expected > 0.5).float().mean() < 0.8
    torch.testing.assert_close(answer, expected, atol=1e-3, rtol=0)


def test_the_drawn_head_is_the_hair_and_the_face():
    """With the network itself; the shoulders and the wall are out."""
    picture = torch.from_numpy(drawn(400, 0.7)).float() / 255
    face = Face((200.0, 200.0), 0.72 * 140, 0.94 * 140)
    mask = torch.zeros(400, 400)
    paint(head_region(picture, face, ()), mask)
    rows, columns = np.indices((400, 400)) / 140 - 200 / 140
    head = (np.hypot(columns / 0.44, (rows + 0.14) / 0.52) < 1) | (
        np.hypot(columns / 0.36, rows / 0.47) < 1
    )
    assert overlap(mask.numpy() > 0.5, head) > 0.9


def test_neck_and_shoulders_are_out(monkeypatch):
    mask = mask_of(PERSON, monkeypatch=monkeypatch)
    assert overlap(mask, HEAD) > 0.9
    assert not mask[260:].any()


def test_hair_that_stands_off_is_in(monkeypatch):
    hair = HEAD | (ellipse(300, 180, 85, 75) & (np.indices(HEAD.shape)[0] < 230))
    assert overlap(mask_of(hair | NECK | SHOULDERS, monkeypatch=monkeypatch), hair) > 0.9


def test_an_arm_beside_the_head_is_out(monkeypatch):
    arm = np.zeros_like(HEAD)
    arm[80:340, 365:440] = True
    arm[200:230, 300:440] = True  # it touches
    mask = mask_of(PERSON | arm, monkeypatch=monkeypatch)
    assert (mask & arm & ~HEAD).sum() < 0.1 * HEAD.sum()
    assert overlap(mask, HEAD) > 0.8


def test_things_of_another_person_that_do_not_hang_together_are_out(monkeypatch):
    apart = ellipse(395, 130, 20, 20)
    assert not (mask_of(PERSON | apart, monkeypatch=monkeypatch) & apart).any()


@pytest.mark.parametrize("distance", [60, 90, 140, 220])
@pytest.mark.parametrize("height", [60.0, 100.0, 150.0])
@pytest.mark.parametrize("seen", [True, False])
def test_no_other_face_is_in_the_mask(monkeypatch, distance, height, seen):
    """Whether the network sees people there or not."""
    other = Face((300.0 + distance, 195.0), 0.76 * height, height)
    its_face = ellipse(300 + distance, 195, 0.3 * height, 0.4 * height)
    people = (PERSON | ellipse(300 + distance, 185, 0.5 * height, 0.65 * height)) & seen
    mask = mask_of(people, others=[other], monkeypatch=monkeypatch)
    closer = np.indices(HEAD.shape)[1] > 300 + distance  # beyond its middle
    assert not (mask & its_face & closer).any()
    assert mask[200, 270] and mask.sum() > 0.3 * HEAD.sum()
    if distance >= 140 and height <= 100:  # two faces that do not cover one another
        assert not (mask & its_face).any()


def test_the_masks_of_two_neighbours_share_nothing(monkeypatch):
    other = Face((420.0, 195.0), 80.0, 105.0)
    people = np.ones_like(HEAD)
    mine = mask_of(people, FACE, [other], monkeypatch)
    its = mask_of(people, other, [FACE], monkeypatch)
    # Where one ends the other begins; the edge's pixels may be half of each.
    assert (mine & its).sum() <= 0.02 * min(mine.sum(), its.sum())


def test_without_a_person_it_is_the_ellipse(monkeypatch):
    mask = mask_of(np.zeros_like(HEAD), monkeypatch=monkeypatch)
    rows, columns = np.nonzero(mask)
    assert 0.9 < mask.sum() / (np.pi * (38 + 12) * 69) < 1.1
    assert abs(columns.mean() - 300) < 2 and abs(rows.mean() - 184) < 3


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_head_that_lies_is_turned_for_the_network(monkeypatch, quarters):
    """The network is asked for people who stand: it is given the head upright."""
    seen = []

    def upright_only(square):
        seen.append(square)
        return (square.mean(-1) > 0.5).float()

    monkeypatch.setattr(heads, "person_in", upright_only)
    ramp = np.linspace(0.6, 1, HEIGHT)[:, None] * PERSON  # brighter below
    picture = torch.from_numpy(np.repeat(ramp[..., None], 3, 2)).float()
    turned = torch.rot90(picture, quarters)
    x, y = 300.0, 200.0
    center = {1: (y, WIDTH - x), 2: (WIDTH - x, HEIGHT - y), 3: (HEIGHT - y, x)}[quarters]
    masks = []
    for one, face in (
        (picture, FACE),
        (turned, Face(center, FACE.width, FACE.height, -90.0 * quarters)),
    ):
        mask = torch.zeros(one.shape[:2])
        paint(head_region(one, face, ()), mask)
        masks.append(mask)
    assert (seen[0] - seen[1]).abs().mean() < 0.02  # but for a pixel at the edges
    assert (seen[0] - torch.rot90(seen[1], 2)).abs().mean() > 0.1
    first, second = masks[0].numpy() > 0.5, np.rot90(masks[1].numpy() > 0.5, -quarters)
    assert overlap(first, second) > 0.97


def test_every_head_of_a_batch_has_its_own_mask():
    pair = np.concatenate([drawn(300, 0.6), drawn(300, 0.6)], 1)
    picture = torch.from_numpy(pair)[None].float() / 255
    faces = [Face((x, 150.0), 65.0, 85.0) for x in (150.0, 450.0)]

    class Finds:
        def detect(self, picture):
            return faces

    found = extract_faces(picture, Finds(), Selection(which_face="all", crop_size=64))
    alone = [
        extract_faces(
            picture, Finds(), Selection(which_face="left to right", face_index=index)
        ).masks
        for index in (0, 1)
    ]
    torch.testing.assert_close(found.masks, torch.maximum(*alone))
    assert alone[0][..., 300:].max() == 0 and alone[1][..., :300].max() == 0


def test_crops_that_the_network_sees_are_squares_of_the_head():
    """The square is as large as :data:`heads.AROUND` says, wherever the picture ends."""
    picture = torch.zeros(80, 80, 3)
    picture[:, :, 0] = torch.linspace(0, 1, 80)
    region = head_region(picture, Face((10.0, 10.0), 40.0, 50.0), ())
    side = len(region.inside) * region.step
    assert side == pytest.approx(1.38 * 50 * heads.AROUND, abs=2)
    assert region.left < 0 and region.top < 0
    assert crop(picture, (region.left, region.top, side), 32).isfinite().all()
