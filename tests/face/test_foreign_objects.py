"""FACEANALYSIS objects of other packs are asked as they were set up; our own pass unchanged."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest
import torch
from hotpath import face
from hotpath.face import FaceError
from hotpath.face.foreign import ForeignAnalyser
from hotpath.host import Interrupted

pytestmark = pytest.mark.xdist_group("face_nodes")


class Recorder:
    """A FACEANALYSIS of another pack: finds one face, in pictures over which its detector is small enough."""

    def __init__(self, finds_at, prepare=True, det_model=True, embedding=True):
        self.finds_at, self.embedding, self.sizes = finds_at, embedding, []
        self.size = 640
        if prepare:
            self.prepare = self._prepare
        if det_model:
            self.det_model = type("Detector", (), {"input_size": (640, 640)})()

    def _prepare(self, ctx_id=0, det_thresh=0.5, det_size=None):
        self.size = det_size[0]

    def get(self, picture):
        assert picture.dtype == np.uint8 and picture.shape == (50, 60, 3)
        self.colour = picture[0, 0].tolist()
        if hasattr(self, "det_model") and not hasattr(self, "prepare"):
            self.size = self.det_model.input_size[0]
        self.sizes.append(self.size)
        if self.size > self.finds_at:
            return []
        one = {"bbox": np.array([1, 2, 30, 40.0]), "kps": np.arange(10.0).reshape(5, 2), "det_score": 0.8}
        return [one | ({"embedding": np.arange(7.0)} if self.embedding else {})]


PICTURE = torch.tensor([0.2, 0.5, 0.9]).expand(1, 50, 60, 3)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [640, 576, 512, 448]),
        ({"prepare": False}, [640, 576, 512, 448]),
        ({"det_model": False}, [640, 576, 512, 448]),
    ],
)
def test_foreign_objects_are_asked_down_the_ladder(settings, sizes):
    foreign = Recorder(448, **settings)
    found = face.adapt(foreign).analyse(PICTURE)[0]
    assert foreign.sizes == sizes and found.detector_size == 448
    assert found.boxes.tolist() == [[1, 2, 30, 40]] and found.embeddings.shape == (1, 7)
    assert foreign.colour == [229, 127, 51], "BGR, truncated"


@pytest.mark.parametrize("found", [True, False])
def test_a_foreign_object_keeps_its_settings_and_its_threshold_counts(found):
    """It is other nodes' as well."""
    asked = []

    class Analysis:
        def __init__(self):
            self.det_model = type("Detector", (), {})()
            self.prepare(0, 0.3, (512, 512))

        def prepare(self, ctx_id=0, det_thresh=0.5, det_size=None):
            self.det_thresh = self.det_model.det_thresh = det_thresh
            self.det_size = self.det_model.input_size = det_size

        def get(self, picture):
            asked.append((self.det_size[0], self.det_model.det_thresh))
            if not found:
                raise RuntimeError("no more")
            return []

    analysis = Analysis()
    try:
        face.adapt(analysis).analyse(PICTURE, options=face.DetectionOptions(sizes=(640, 320)))
        face.adapt(analysis).analyse(PICTURE, options=face.DetectionOptions(0.7, sizes=(64,)))
        assert asked == [(640, 0.3), (320, 0.3), (64, 0.7)]
    except RuntimeError:
        assert not found
    detector = analysis.det_model
    assert (analysis.det_thresh, analysis.det_size) == (detector.det_thresh, detector.input_size) == (0.3, (512, 512))


def test_a_foreign_object_that_sets_its_own_size_is_asked_once():
    foreign = Recorder(0, prepare=False, det_model=False)
    assert len(face.adapt(foreign).analyse(PICTURE)[0]) == 0 and foreign.sizes == [640]


def test_foreign_objects_without_embeddings_or_get_are_answered_in_a_sentence():
    with pytest.raises(FaceError, match="no embeddings"):
        face.adapt(Recorder(640, embedding=False)).analyse(PICTURE)
    assert len(face.adapt(Recorder(640, embedding=False)).analyse(PICTURE, embed=False)[0]) == 1
    with pytest.raises(FaceError, match="connect the output of a face analysis loader"):
        face.adapt(object())
    with pytest.raises(FaceError, match="A dict is no face analysis"):
        face.adapt({})


def test_a_search_that_was_left_sets_no_sizes_later(headless_host):
    """The object is the next run's as well, which has set its own."""
    release, left = threading.Event(), threading.Event()
    sizes: list[int] = []

    class Slow:
        def prepare(self, det_size, **_):
            sizes.append(det_size[0])

        def get(self, _):
            headless_host.stop()
            release.wait(30)
            threading.Timer(0.2, left.set).start()
            return []

    with pytest.raises(Interrupted):
        face.adapt(Slow()).analyse(PICTURE)
    release.set()
    assert left.wait(30) and sizes == [640]


def test_our_own_objects_pass_unchanged(loaded):
    assert face.adapt(loaded) is loaded
    wrapped = ForeignAnalyser(Recorder(640))
    assert face.adapt(wrapped) is wrapped and wrapped.size == 640


@pytest.mark.parametrize(("finds_at", "found"), [(640, "1 face"), (0, "0 faces, 1 picture without a face")])
def test_the_report_says_what_was_found_and_how_long_it_took(finds_at, found):
    analyser = ForeignAnalyser(Recorder(finds_at))
    analyser.analyse(torch.zeros(1, 50, 60, 3))
    assert re.search(rf": 1 picture, {found}, \d+ ms\.$", analyser.report())
