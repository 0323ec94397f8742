"""Which face is chosen, and which is the same person."""

from __future__ import annotations

import pytest
import torch
from hotpath import face
from hotpath.face import FaceChoice, FaceError, Faces
from hotpath.nodes import faces as nodes
from made_faces import some_faces

pytestmark = pytest.mark.xdist_group("face_nodes")


@pytest.mark.parametrize(
    ("choice", "index"),
    [
        (FaceChoice.largest(), 3),  # as large as number 1: the last of equals, as the reference pack has it
        (FaceChoice.highest_score(), 2),
        (FaceChoice.left_to_right(0), 2),
        (FaceChoice.left_to_right(-1), 3),
        (FaceChoice.centre(), 1),
        (FaceChoice.index(1), 1),
        (FaceChoice.index(-4), 0),
        (FaceChoice.best_match(torch.tensor([0.0, 0.0, 5.0])), 2),
    ],
)
def test_choices(choice, index):
    faces = some_faces()
    assert choice.apply(faces).boxes.tolist() == faces.boxes[[index]].tolist()


def test_the_largest_face_is_the_one_of_the_largest_area():
    boxes = torch.tensor([[5.0, 5, 15, 105], [50, 10, 90, 50], [10, 60, 40, 90]])
    found = Faces(boxes, torch.zeros(3, 5, 2), torch.ones(3), None, (120, 120), 640)
    assert FaceChoice.largest().apply(found).boxes.tolist() == boxes[[1]].tolist()


def test_a_position_that_does_not_exist_is_no_face_and_not_an_error():
    assert len(FaceChoice.index(4).apply(some_faces())) == 0
    assert len(FaceChoice.left_to_right(-5).apply(some_faces())) == 0
    assert len(FaceChoice.largest().apply(Faces.none((9, 9), 192))) == 0


def test_a_match_needs_an_identity_of_the_same_width():
    with pytest.raises(FaceError, match="needs an identity"):
        face.choose_face("best match")
    with pytest.raises(FaceError, match="has 4 numbers and this recogniser makes 3"):
        FaceChoice.best_match(torch.zeros(4)).apply(some_faces())
    with pytest.raises(FaceError, match="no embeddings"):
        Faces.none((9, 9), 192).similarity(torch.zeros(3))


def test_a_picture_without_the_face_that_is_picked_is_an_error_where_that_is_asked_for():
    faces, pick = [some_faces(), Faces.none((100, 120), 640)], nodes.HotpathFacePick().pick
    assert pick(faces, "largest", 0, "skip")[1] == 1
    with pytest.raises(FaceError, match="picture 1 of 2"):
        pick(faces, "largest", 0, "error")


def test_faces_match_from_the_threshold_on():
    faces, nobody = some_faces(), Faces.none((100, 120), 640)
    person = [faces.select([0])]
    found = face.match_faces([faces, nobody, faces.select([1])], person, 0.5)
    assert [len(best) for best in found.best] == [1, 0, 0] and torch.equal(found.best[0].boxes, faces.boxes[:1])
    assert found.similarity == pytest.approx(1 / 3) and not found.all_match
    assert found.report.splitlines()[0] == "Mean of the best cosines 0.333; 1 of 3 reach 0.50."
    assert found.report.splitlines()[1:] == [
        "picture 0: 0: 1.000, 1: 0.000, 2: 0.000, 3: 0.707",
        "picture 1: no face",
        "picture 2: 0: 0.000",
    ]
    half = [faces.select([3])]
    cosine = face.match_faces(half, person, 0.9).similarity
    assert (
        face.match_faces(half, person, cosine).all_match and not face.match_faces(half, person, cosine + 1e-6).all_match
    )
    none = face.match_faces([], person, 0.5)
    assert (none.similarity, none.all_match) == (0, False)
