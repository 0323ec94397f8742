"""Labels of marked faces, and what is said of pictures without the face that was asked for."""

from __future__ import annotations

import pytest
import torch
from hotpath import face
from hotpath.face import FaceError, Faces
from hotpath.nodes import faces as nodes

POINTS = torch.tensor([[0.3, 0.6], [0.7, 0.6], [0.5, 0.7], [0.3, 0.9], [0.7, 0.9]])  # in parts of the box


def faces_at(boxes, size):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    points = boxes[:, None, :2] + POINTS * (boxes[:, None, 2:] - boxes[:, None, :2])
    return Faces(boxes, points, torch.full((len(boxes),), 0.97), None, size, 640)


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        (
            (400, 500),
            [[-20, -30, 80, 90], [450, 100, 530, 200], [180, -5, 300, 120], [200, 250, 300, 380], [230, 260, 330, 390]],
        ),
        ((500, 500), [[x, y, x + 26, y + 32] for y in range(20, 460, 60) for x in range(10, 480, 60)]),  # a crowd
        ((64, 64), [[2, -6, 30, 30], [40, 20, 70, 62]]),
        ((60, 900), [[400, 4, 440, 56]]),
        ((900, 60), [[4, 400, 56, 460]]),
    ],
)
def test_labels_are_whole_within_the_picture_and_hide_no_face(monkeypatch, size, boxes):
    from PIL import ImageDraw

    faces, drawn = faces_at(boxes, size), []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda ink, at, said, **how: (
            drawn.append((said, ink.textbbox(at, said, font=how["font"]))),
            text(ink, at, said, **how),
        ),
    )
    face.mark_faces(torch.zeros(*size, 3), faces)
    assert [said for said, _ in drawn] == [f"{i}  0.97" for i in range(len(boxes))]
    for i, (_, (x0, y0, x1, y1)) in enumerate(drawn):
        assert x0 >= 0 and y0 >= 0 and x1 <= size[1] and y1 <= size[0], i
        for j, (a0, b0, a1, b1) in enumerate([*faces.boxes.tolist(), *(place for _, place in drawn)]):
            if j not in (i, i + len(boxes)):
                assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0, (i, j)
    batch = face.mark_pictures(torch.zeros(1, *size, 3), [faces])
    assert torch.equal(face.mark_pictures(torch.zeros(*size, 3), [faces]), batch), "a picture that is no batch"


def test_a_position_that_a_picture_lacks_is_told_from_a_picture_without_a_face():
    none, pick = Faces.none((100, 120), 640), nodes.HotpathFacePick().pick
    faces = [faces_at([[10, 10, 30, 40], [60, 20, 100, 80]], (100, 120)), none]
    with pytest.raises(FaceError, match=r"There is no face at index 9 from the left in pictures 0, 1 of 2, .*: fewer"):
        pick(faces, "left to right", 9, "error")
    with pytest.raises(FaceError, match=r"No face was found in picture 1 of 2, counted from 0: lower"):
        pick(faces, "index", -1, "error")
    with pytest.raises(FaceError, match=r"found in pictures 0, 1, 2, .*, 10, 11 and 88 more of 100"):
        pick([none] * 100, "left to right", 0, "error")
