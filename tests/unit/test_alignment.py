"""Faces are brought to where recognition models expect them."""

import numpy as np
import pytest
from sefi_ide.sefi_core.faces.alignment import SIDE, TEMPLATE, aligned, similarity


def turned(points, degrees, scale, shift):
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * points @ turn.T + shift


@pytest.mark.parametrize("degrees", [0, 20, -75, 180])
@pytest.mark.parametrize("scale", [0.3, 1.0, 12.0])
def test_turned_scaled_and_moved_points_come_back_exactly(degrees, scale):
    points = turned(TEMPLATE, degrees, scale, (250, 40))
    found = similarity(points)
    back = np.hstack([points, np.ones((5, 1))]) @ found.T
    np.testing.assert_allclose(back, TEMPLATE, atol=1e-9)


def test_it_is_the_best_of_all_similarities():
    """Least squares over the four numbers of a similarity, by a general solver."""
    points = turned(TEMPLATE, 10, 2.0, (30, 60)) + np.random.default_rng(0).normal(0, 4, (5, 2))
    x, y = points.T
    zeros, ones = np.zeros(5), np.ones(5)
    equations = np.vstack([np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)])
    (a, b, c, d), *_ = np.linalg.lstsq(equations, TEMPLATE.T.ravel(), rcond=None)
    np.testing.assert_allclose(similarity(points), [[a, -b, c], [b, a, d]], atol=1e-9)


def test_a_mirrored_face_is_not_mirrored_back():
    found = similarity(TEMPLATE * [-1, 1])
    assert np.linalg.det(found[:, :2]) > 0


def test_points_in_one_place_are_refused():
    with pytest.raises(ValueError, match="one place"):
        similarity(np.full((5, 2), 7.0))


def dots(size, points, radius):
    """A grey picture with a white disk at each point, drawn without a jagged edge."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    picture = np.full((*size, 3), 60.0)
    for x, y in points:
        near = np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1)[..., None]
        picture = picture * (1 - near) + 250 * near
    return picture.round().astype(np.uint8)


@pytest.mark.parametrize("scale", [0.7, 1.0, 4.0, 11.0])
@pytest.mark.parametrize("degrees", [0, 25, -90])
def test_what_is_at_the_points_lands_at_the_template(scale, degrees):
    points = turned(TEMPLATE - 56, degrees, scale, (950, 900))
    face = aligned(dots((1800, 1900), points, 4 * scale), points)
    assert face.shape == (SIDE, SIDE, 3) and face.dtype == np.uint8
    expected = dots((SIDE, SIDE), TEMPLATE, 4)
    # A disk half a pixel off its place differs by 22 around its edge.
    assert np.abs(face.astype(int) - expected).mean() < 1.0
    for x, y in TEMPLATE:
        rows, columns = np.mgrid[round(y) - 7 : round(y) + 8, round(x) - 7 : round(x) + 8]
        weight = face[rows, columns, 0].astype(float) - 60
        centre = (weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()
        assert np.hypot(centre[0] - x, centre[1] - y) < 0.3


def test_a_large_face_is_averaged_and_a_fine_pattern_becomes_grey():
    picture = np.zeros((1120, 1120, 3), np.uint8)
    picture[::2] = 255
    face = aligned(picture, TEMPLATE * 10)
    assert np.abs(face[4:-4, 4:-4].astype(int) - 127).max() <= 3


def test_beyond_the_picture_it_is_black_and_a_face_outside_is_nothing():
    white = np.full((112, 112, 3), 255, np.uint8)
    face = aligned(white, TEMPLATE - [56, 0])  # its left half is outside
    assert face[:, :50].max() == 0 and face[5:100, 60:110].min() == 255
    assert aligned(white, TEMPLATE + 500).max() == 0


def test_a_picture_that_cannot_be_written_to_is_no_matter(recwarn):
    picture = np.zeros((112, 112, 3), np.uint8)
    picture.flags.writeable = False
    aligned(picture, TEMPLATE)
    assert not recwarn.list
