"""Faces that nobody has: boxes, points and vectors of a few numbers."""

from __future__ import annotations

import torch
from hotpath.face import Faces


def some_faces():
    boxes = torch.tensor([[10.0, 10, 30, 40], [60, 20, 100, 80], [5, 60, 25, 90], [60, 30, 100, 90]])
    points = torch.stack([(b[:2] + b[2:]) / 2 + torch.randn(5, 2) for b in boxes])
    vectors = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0]])
    return Faces(boxes, points, torch.tensor([0.9, 0.8, 0.95, 0.6]), vectors, (100, 120), 640)


def one_face(box, size=(256, 256)):
    centre = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    points = centre + torch.tensor([[-9.0, -9], [9, -9], [0, 0], [-7, 9], [7, 9]])
    return [Faces(torch.tensor([box]), points[None], torch.ones(1), None, size, 640)]
