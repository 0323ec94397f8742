"""The key-point drawing, to the pixel, against cv2; and key points laid into other sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hotpath.face import FaceError, Faces, draw_faces, draw_keypoints
from hotpath.face.raster import ellipse_outline, fill_circle, fill_convex_polygon

cv2 = pytest.importorskip("cv2")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]


def with_cv2(height: int, width: int, faces: np.ndarray) -> np.ndarray:
    canvas = np.zeros((height, width, 3), np.uint8)
    for points in faces:
        for first, second in ((0, 2), (1, 2), (3, 2), (4, 2)):
            x, y = points[[first, second]].T
            length = ((x[0] - x[1]) ** 2 + (y[0] - y[1]) ** 2) ** 0.5
            angle = math.degrees(math.atan2(y[0] - y[1], x[0] - x[1]))
            centre = (int(np.mean(x)), int(np.mean(y)))
            outline = cv2.ellipse2Poly(centre, (int(length / 2), 4), int(angle), 0, 360, 1)
            cv2.fillConvexPoly(canvas, outline, COLOURS[first])
    canvas = (canvas * 0.6).astype(np.uint8)
    for points in faces:
        for (x, y), colour in zip(points, COLOURS, strict=True):
            cv2.circle(canvas, (int(x), int(y)), 10, colour, -1)
    return canvas


def in_bytes(drawing: torch.Tensor) -> np.ndarray:
    return (drawing * 255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_drawing_equals_cv2_on_random_off_canvas_degenerate_and_tiny_faces(seed):
    rng = np.random.default_rng(seed)
    for case in range(80):
        height, width = (int(v) for v in rng.integers(1, 400, 2))
        spread = rng.choice([0.5, 8, 30, 200, 600, 3000])
        faces = rng.normal(0, spread, (rng.integers(1, 3), 5, 2)) + rng.uniform(-100, 500, (1, 1, 2))
        if case % 7 == 0:
            faces[:] = faces[:, :1]  # all five points in one
        if case % 5 == 0:
            faces = faces.round()
        faces = faces.astype(np.float32)
        ours = in_bytes(draw_keypoints(height, width, torch.from_numpy(faces)))
        assert np.array_equal(ours, with_cv2(height, width, faces)), (seed, case)


def test_a_single_face_may_come_without_its_axis():
    points = torch.tensor([[30.0, 30], [70, 32], [50, 55], [35, 75], [66, 76]])
    assert torch.equal(draw_keypoints(100, 100, points), draw_keypoints(100, 100, points[None]))
    assert draw_keypoints(100, 100, points).max() == 1.0


def test_ellipse_outline_equals_cv2_for_every_angle():
    for angle in range(-360, 361, 7):
        for axes in ((0, 4), (1, 4), (25, 4), (300, 4)):
            theirs = [tuple(p) for p in cv2.ellipse2Poly((50, -7), axes, angle, 0, 360, 1).tolist()]
            assert ellipse_outline((50, -7), axes, angle) == theirs, (angle, axes)


def test_convex_polygons_and_circles_equal_cv2():
    rng = np.random.default_rng(5)
    for _ in range(150):
        t = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
        outline = np.stack([np.cos(t), np.sin(t)], 1) * rng.uniform(1, 80, 2) + rng.uniform(-40, 140, 2)
        outline = outline.round().astype(np.int32)
        ours, theirs = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96, 3), np.uint8)
        fill_convex_polygon(ours, [(int(x), int(y)) for x, y in outline], (9, 8, 7))
        cv2.fillConvexPoly(theirs, outline, (9, 8, 7))
        centre, radius = (int(outline[0, 0]), int(outline[0, 1])), int(rng.integers(0, 30))
        fill_circle(ours, centre, radius, (1, 2, 3))
        cv2.circle(theirs, centre, radius, (1, 2, 3), -1)
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_coordinates_that_are_no_pixels_are_refused(value):
    points = torch.zeros(5, 2)
    points[3, 1] = value
    with pytest.raises(FaceError, match="not all pixel coordinates"):
        draw_keypoints(64, 64, points)


def test_a_drawing_without_pixels_is_refused():
    with pytest.raises(FaceError, match="no pixels"):
        draw_keypoints(0, 64, torch.zeros(5, 2))


def one_face(points, size):
    points = torch.tensor(points, dtype=torch.float32)[None]
    box = torch.cat([points.amin(1), points.amax(1)], 1)
    return Faces(box, points, torch.ones(1), None, size, 640)


def test_a_batch_of_drawings_stays_aligned_and_takes_any_size():
    face = one_face([[30, 30], [70, 32], [50, 55], [35, 75], [66, 76]], (100, 120))
    drawings = draw_faces([face, Faces.none((100, 120), 192), face], 256, 512, "contain")
    assert drawings.shape == (3, 256, 512, 3)
    assert drawings[1].sum() == 0 and torch.equal(drawings[0], drawings[2])
    # contain: scale 2.56, shifted by (512 - 120 * 2.56) / 2
    x, y = int(30 * 2.56 + (512 - 120 * 2.56) / 2), int(30 * 2.56)
    assert drawings[0, y, x].tolist() == [1.0, 0.0, 0.0]
    assert draw_faces([face]).shape == (1, 100, 120, 3)
