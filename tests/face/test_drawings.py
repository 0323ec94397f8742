"""Marks, key points and masks are where the faces are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hotpath import face
from hotpath.face import FaceError, Faces, areas, marks
from hotpath.face.crops import edge_weight
from made_faces import some_faces

pytestmark = pytest.mark.xdist_group("face_nodes")


def test_boxes_the_wrong_way_round_and_far_outside_are_marked_all_the_same():
    boxes = torch.tensor([[50.0, 60.0, 20.0, 10.0], [-900.0, -900.0, -800.0, 5000.0], [10.0, 10.0, 10.0, 10.0]])
    odd = Faces(boxes, torch.zeros(3, 5, 2), torch.full((3,), 0.1), None, (80, 80), 640)
    assert face.mark_faces(torch.zeros(80, 80, 3), odd).max() > 0
    ordered = replace(odd, boxes=torch.cat([torch.tensor([[20.0, 10.0, 50.0, 60.0]]), boxes[1:]]))
    assert torch.equal(face.mark_faces(torch.zeros(80, 80, 3), odd), face.mark_faces(torch.zeros(80, 80, 3), ordered))
    assert face.mask_faces([odd], 0, 0, "oval", 0.1, 3.0).isfinite().all()


def test_marks_are_where_the_faces_are():
    boxes = torch.tensor([[100.0, 200.0, 180.0, 300.0], [250.0, 0.0, 390.0, 200.0]])
    points = torch.stack([torch.stack([box[:2] + 30 + 8 * i for i in range(5)]) for box in boxes])
    faces = Faces(boxes, points, torch.tensor([0.9, 0.8]), None, (400, 400), 640)
    (marked,) = face.mark_pictures(torch.zeros(1, 400, 400, 1), [faces])
    for box, own, colour in zip(boxes.long().tolist(), points.long().tolist(), marks.MARKS, strict=False):
        left, top, right, bottom = box
        middle = (left + right) // 2, (top + bottom) // 2
        here = (marked * 255).round().eq(torch.tensor(colour)).all(-1)
        assert all(here[y, x] for x, y in ((middle[0], bottom), (left, middle[1]), (right, middle[1])))
        assert here[top, right - 2] and not here[middle[1], middle[0]]
        for (x, y), point_colour in zip(own, marks.POINT_COLOURS, strict=True):
            assert (marked[y, x] * 255).round().tolist() == list(point_colour)
        inside, above = here[top + 3 : top + 12, left + 3 : right - 3], here[max(0, top - 12) : top, left:right]
        assert (inside.any(), above.any()) == ((True, False) if top == 0 else (False, True)), "its number and score"
    untouched = torch.rand(1, 8, 8, 3)
    assert face.mark_pictures(untouched, [Faces.none((8, 8), 640)]) is untouched
    (mixed, alone) = face.mark_pictures(torch.full((2, 400, 400, 1), 0.5), [faces, Faces.none((400, 400), 640)])
    assert (
        mixed[350, 20].tolist() == pytest.approx([0.5] * 3, abs=0.01) and alone.eq(0.5).all() and alone.shape[-1] == 3
    )


@pytest.mark.parametrize(
    ("fit", "scale", "shift"),
    [("stretch", (1.5, 2), (0, 0)), ("contain", (1.5, 1.5), (0, 25)), ("cover", (2, 2), (-30, 0))],
)
def test_key_points_are_fitted_into_a_picture_of_another_shape(fit, scale, shift):
    faces = some_faces()  # of 120 x 100
    wanted = faces.keypoints * torch.tensor(scale) + torch.tensor(shift)
    assert torch.allclose(areas.fit_keypoints(faces, 200, 180, fit), wanted)
    with pytest.raises(FaceError, match="'fill' is no way to fit a drawing"):
        areas.fit_keypoints(faces, 200, 180, "fill")


def test_the_soft_border_is_smooth_and_whole_inside():
    weight = edge_weight(64, 0.5)
    assert weight[32, 32] == 1 and weight[0, 32] < 0.01 and (weight.diff(dim=0).abs() < 0.12).all()
    assert torch.equal(weight, weight.flip(0, 1)) and torch.equal(weight, weight.T)
    assert edge_weight(64, 0.0).min() == 1


def test_masks_have_the_shape_and_the_soft_edge_that_was_asked_for():
    faces = some_faces().select([1])
    box = face.mask_faces([faces], 0, 0, "box", 0.0, 0.0)[0]
    assert box[50, 80] == 1 and box[50, 50] == 0 and abs(float((box > 0.5).sum()) - 40 * 60) < 150
    oval = face.mask_faces([faces], 0, 0, "oval", 0.0, 0.0)[0]
    assert 0.7 < float((oval > 0.5).sum()) / (40 * 60) < 0.86, "an ellipse fills pi / 4 of its box"
    soft = face.mask_faces([faces], 0, 0, "box", 0.0, 10.0)[0]
    assert 0.3 < soft[50, 105] < 0.7
    assert (face.mask_faces([faces], 0, 0, "box", 0.25, 0.0) >= box).all()


@pytest.mark.parametrize("degrees", [0, 90, 180, -90, 45])
def test_an_oval_fills_the_box_of_a_face_whichever_way_it_lies(degrees):
    """The box of a face that lies is wide, and its eyes are one above the other."""
    upright = torch.tensor([[-20.0, -20.0], [20.0, -20.0], [0.0, 0.0], [-15.0, 25.0], [15.0, 25.0]])
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    points = upright @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float32) + torch.tensor([150.0, 120.0])
    half = {0: (50, 70), 180: (50, 70), 45: (60, 60)}.get(degrees, (70, 50))
    box = torch.tensor([[150.0 - half[0], 120.0 - half[1], 150.0 + half[0], 120.0 + half[1]]])
    lying = Faces(box, points[None], torch.ones(1), None, (240, 300), 640)
    oval = face.mask_faces([lying], 0, 0, "oval", 0.0, 0.0)[0] > 0.5
    ys, xs = oval.nonzero().T
    assert abs(int(xs.max() - xs.min()) + 1 - 2 * half[0]) <= 2 and abs(int(ys.max() - ys.min()) + 1 - 2 * half[1]) <= 2


@pytest.mark.parametrize("side", [1, -1])
def test_an_oval_leans_the_way_the_face_does(side):
    eyes = torch.tensor([[-17.0, -10.0 * side], [17.0, 10.0 * side]])
    points = torch.cat([eyes, torch.zeros(3, 2)]) + torch.tensor([100.0, 100.0])
    leaning = Faces(torch.tensor([[60.0, 40.0, 140.0, 160.0]]), points[None], torch.ones(1), None, (200, 200), 640)
    oval = face.mask_faces([leaning], 0, 0, "oval", 0.0, 0.0)[0]
    assert oval[143, 100 - 25 * side] == 1 and oval[143, 100 + 25 * side] == 0


@pytest.mark.parametrize("shape", face.SHAPES)
@pytest.mark.parametrize("feather", [0.0, 12.0, 300.0])
def test_a_mask_is_computed_around_its_face_and_cut_nowhere(shape, feather, monkeypatch):
    """The soft edge ends at nothing, also for a face that is turned or reaches over the border."""
    points = torch.tensor([[[60.0, 70.0], [75.0, 85.0], [60.0, 88.0], [50.0, 85.0], [60.0, 100.0]]])
    boxes = torch.tensor([[50.0, 60.0, 90.0, 100.0], [-20.0, 150.0, 30.0, 260.0], [900.0, 900.0, 950.0, 950.0]])
    faces = Faces(boxes, points.repeat(3, 1, 1), torch.ones(3), None, (200, 180), 640)
    found = face.mask_faces([faces], 0, 0, shape, 0.1, feather)[0]
    wide = replace(faces, boxes=faces.boxes + 500, keypoints=faces.keypoints + 500, size=(1200, 1200))
    assert torch.allclose(face.mask_faces([wide], 0, 0, shape, 0.1, feather)[0, 500:700, 500:680], found, atol=1e-3)
    sizes = []
    clamp = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: (sizes.append(x.numel()), clamp(x, *a, **k))[1])
    face.mask_faces([faces.select([0])], 0, 0, shape, 0.1, min(feather, 12.0))
    assert max(sizes) < 100 * 100, "the region of the face, and not the picture"
