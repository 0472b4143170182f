import numpy as np
import pytest
from sefi_ide.sefi_core.faces.face import Face
from sefi_ide.sefi_core.faces.regions import REGIONS, outline, region_mask

UPRIGHT = Face(center=(100.0, 90.0), width=60.0, height=80.0)
SIZE = (200, 220)


def test_the_oval_is_the_ellipse_of_the_face():
    mask = region_mask(UPRIGHT, "oval", SIZE)
    assert mask.shape == SIZE and mask.dtype == np.float32
    rows, columns = np.indices(SIZE)
    inside = ((columns - 100) / 30) ** 2 + ((rows - 90) / 40) ** 2 < 1
    assert abs(mask - inside).sum() < 0.04 * inside.sum()
    assert mask.sum() == pytest.approx(np.pi * 30 * 40, rel=0.03)


def test_regions_contain_one_another():
    masks = {region: region_mask(UPRIGHT, region, SIZE) > 0.5 for region in REGIONS}
    assert (masks["head"] | ~masks["face"]).all() and (masks["head"] | ~masks["oval"]).all()
    assert masks["head"].sum() > 1.6 * masks["oval"].sum()
    # The head reaches far above the hairline and little below the chin.
    rows = np.nonzero(masks["head"].any(1))[0]
    assert rows.min() < 90 - 40 - 25 and 90 + 40 < rows.max() < 90 + 40 + 8


def test_the_face_narrows_towards_the_chin():
    mask = region_mask(UPRIGHT, "face", SIZE) > 0.5
    assert mask[70].sum() > mask[110].sum() + 4


@pytest.mark.parametrize("grow", [12, -10])
def test_grow_moves_the_outline_by_pixels(grow):
    mask = region_mask(UPRIGHT, "oval", SIZE, grow=grow) > 0.5
    assert mask[90].sum() == pytest.approx(60 + 2 * grow, abs=2)
    assert mask[:, 100].sum() == pytest.approx(80 + 2 * grow, abs=2)


def test_shrunk_to_nothing():
    assert region_mask(UPRIGHT, "oval", SIZE, grow=-60).max() == 0


def test_feather_fades_over_its_pixels_and_keeps_the_outline():
    row = region_mask(UPRIGHT, "oval", SIZE, feather=20)[90]
    outside = row[100:]  # from the middle to the right, the outline is 30 pixels away
    assert (np.diff(outside) <= 0).all()
    assert outside[:18].min() == 1 and outside[43:].max() == 0
    assert outside[30] == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(np.diff(outside[24:36]), -1 / 20, atol=0.03)


def test_feather_at_the_border_of_the_picture():
    """The border is no outline: there the mask does not fade."""
    face = Face(center=(0.0, 90.0), width=60.0, height=80.0)
    mask = region_mask(face, "oval", SIZE, feather=10)
    assert mask[90, 0] == 1
    whole = region_mask(Face((110.0, 90.0), 60.0, 80.0), "oval", SIZE, feather=10)
    np.testing.assert_allclose(mask[:, :60], whole[:, 110:170], atol=1e-6)


@pytest.mark.parametrize("region", REGIONS)
def test_roll_turns_clockwise(region):
    turned = Face(UPRIGHT.center, UPRIGHT.width, UPRIGHT.height, roll=90)
    middle = np.array(UPRIGHT.center)
    x, y = (outline(UPRIGHT, region) - middle).T
    np.testing.assert_allclose(outline(turned, region) - middle, np.stack([-y, x], 1), atol=1e-9)


def test_a_face_outside_the_picture_or_of_no_size():
    assert region_mask(Face((-500.0, 90.0), 60.0, 80.0), "head", SIZE).max() == 0
    assert np.isfinite(region_mask(Face((10.0, 10.0), 0.1, 0.1), "oval", SIZE)).all()


def test_landmarks_that_lie_on_a_turned_head():
    points = np.stack([np.cos(np.linspace(0, np.pi, 106)), np.sin(np.linspace(0, np.pi, 106))], 1)
    upright = Face((100.0, 90.0), 60.0, 80.0, 0, points * 30 + (100, 90))
    turn = np.array([[0, 1], [-1, 0]])
    turned = Face((100.0, 90.0), 60.0, 80.0, 90, points @ turn * 30 + (100, 90))
    a, b = (region_mask(face, "face", (200, 200)) > 0.5 for face in (upright, turned))
    # Turned by a quarter around (100, 90).
    rows, columns = np.nonzero(a)
    assert b[90 + (columns - 100), 100 - (rows - 90)].mean() > 0.97
    assert b.sum() == pytest.approx(a.sum(), rel=0.03)
