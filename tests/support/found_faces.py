"""How faces that were found are compared with insightface's."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from hotpath.face import DetectionOptions

CPU = torch.device("cpu")
AT_640 = DetectionOptions(sizes=(640,))


def as_image(picture):
    # Between two levels, so that truncation gives back the byte whatever the division rounded to.
    return (torch.from_numpy(np.ascontiguousarray(picture)).float() + 0.25) / 255


def assert_same_faces(reference, picture, found, boxes=0.5, cosine=0.999):
    """Each face of insightface away from the threshold is among ours, and none of ours is invented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = reference.get_once(np.ascontiguousarray(picture[..., ::-1]))
    sure = [f for f in wanted if f.det_score > 0.51]
    assert sure, "the random detector finds nothing here: the test would compare nothing"
    for one in sure:
        distance = (found.boxes - torch.from_numpy(one.bbox)).abs().amax(1)
        i = int(distance.argmin())
        assert distance[i] < boxes
        assert (found.keypoints[i] - torch.from_numpy(one.kps)).abs().max() < boxes
        assert abs(float(found.scores[i]) - float(one.det_score)) < 0.01
        embedding = torch.from_numpy(one.embedding)
        assert torch.cosine_similarity(found.embeddings[i], embedding, dim=0) > cosine
    assert int((found.scores > 0.51).sum()) <= len(wanted)
