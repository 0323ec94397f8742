"""insightface and onnxruntime as engines, and ours in insightface's place."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from found_faces import AT_640, CPU, as_image
from hotpath import face
from hotpath.face import Faces
from hotpath.face.insightface_api import foremost

pytestmark = pytest.mark.xdist_group("face_engine")
pytest.importorskip("insightface")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("skimage.data")


def test_other_packs_can_use_it_as_insightface(analysers, reference, pictures):
    ours = analysers["torch", "inside"]
    bgr = np.ascontiguousarray(pictures[0][..., ::-1])
    ours.prepare(ctx_id=0, det_thresh=0.5, det_size=(640, 640))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference.get(bgr)
        assert np.abs(reference.get(bgr, max_num=1)[0].bbox - ours.get(bgr, max_num=1)[0].bbox).max() < 0.5
        assert [len(ours.get(bgr, max_num=n)) for n in (0, 1, 999)] == [len(ours.get(bgr)), 1, len(ours.get(bgr))]
    mine = ours.get(bgr)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a["bbox"].dtype == np.float32 and a.bbox.shape == (4,) and a.kps.shape == (5, 2)
        assert np.abs(a.bbox - b.bbox).max() < 0.5
        assert abs(np.linalg.norm(a.normed_embedding) - 1) < 1e-5 and a.gender is None
        assert np.dot(a.normed_embedding, b.normed_embedding) > 0.999
    assert ours.det_size == reference.det_size and ours.model_dir == str(ours.folder.path)
    recognition = reference.models["recognition"]
    assert ours.models["recognition"].input_size == tuple(recognition.input_size)
    for pair in ([1, 2, 3], [4, 0, 1]), ([1, 1, 0], [2, 2, 0]):
        one, other = (np.array(feature, np.float32) for feature in pair)
        expected = recognition.compute_sim(one, other)
        assert ours.models["recognition"].compute_sim(one[None], other) == pytest.approx(float(expected))
    boxes, keypoints = ours.det_model.detect(bgr)
    assert boxes.shape == (len(mine), 5) and keypoints.shape == (len(mine), 5, 2)
    face_of_theirs = {"kps": mine[0].kps}
    embedding = ours.models["recognition"].get(bgr, face_of_theirs)
    assert face_of_theirs["embedding"] is embedding
    assert (
        np.dot(embedding, theirs[0].embedding) / np.linalg.norm(embedding) / np.linalg.norm(theirs[0].embedding) > 0.999
    )
    # Crops of another size are brought to that of the recogniser, as it does.
    large = cv2.resize(bgr[60:200, 180:320], (224, 224))
    theirs_of_crops = reference.models["recognition"].get_feat([large, large[:112, :112]])
    of_crops = ours.models["recognition"].get_feat([large, large[:112, :112]])
    assert of_crops.shape == theirs_of_crops.shape
    assert (torch.cosine_similarity(*map(torch.from_numpy, (of_crops, theirs_of_crops))) > 0.9999).all()
    ours.det_model.prepare(0, det_thresh=0.0, nms_thresh=0.0)
    assert (ours.det_thresh, ours.det_model.nms_thresh) == (0.0, 0.0)
    ours.det_model.prepare(0, det_thresh=0.5, nms_thresh=0.4)
    ours.det_model.input_size = (320, 320)
    reference.prepare(0, det_size=(320, 320))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smaller = reference.get(bgr)
    assert [len(ours.get(bgr))] == [len(smaller)] and len(smaller) != len(theirs)
    reference.prepare(0, det_size=(640, 640))
    ours.prepare(det_size=(640, 640))


def test_the_foremost_faces_are_large_and_as_insightface_counts_near_the_middle():
    """Its measure: the area, less twice the squared distance of the centres."""
    boxes = torch.tensor([[0.0, 0, 40, 40], [40, 40, 60, 60], [45, 40, 65, 60]])
    faces = Faces(boxes, torch.zeros(3, 5, 2), torch.ones(3), None, (100, 100), 640)
    assert foremost(faces, 2, "default") == [1, 2] and foremost(faces, 1, "max") == [0]
    for all_of_them in (0, -1, 3, 9):
        assert foremost(faces, all_of_them, "max") == [0, 1, 2]


def test_the_insightface_engine_is_the_library_itself(roots, pictures):
    analyser = face.load_analyser([roots["inside"]], engine="insightface", device=CPU)
    assert "insightface" in analyser.report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = analyser.analyse([as_image(pictures[0])], options=AT_640)[0]
        assert len(analyser.get(np.ascontiguousarray(pictures[0][..., ::-1]))) == len(found) > 0


def test_onnxruntime_falls_back_with_the_reason_and_the_cure(roots):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    analyser = face.load_analyser([roots["inside"]], engine="onnxruntime", provider="CUDA", device=CPU)
    report = analyser.report()
    assert analyser.detector.runner.engine == "torch"
    assert "CUDA was asked for" in report and "pip install onnxruntime-gpu" in report


def test_a_provider_that_got_only_part_of_the_graph_is_not_believed(roots, monkeypatch):
    from hotpath.face import loading, onnxruntime_engine
    from hotpath.face.onnxruntime_engine import PROVIDERS, OnnxRuntimeRunner, Provider, UnverifiedProvider, heavy_share

    file = face.load_analyser([roots["inside"]], engine="torch", device=CPU).detector.file
    session = OnnxRuntimeRunner(file, PROVIDERS["CPU"], CPU)._session(640, 640)
    # An older onnxruntime, such as the newest for Python 3.10, cannot say where its nodes went.
    tells = hasattr(session, "get_provider_graph_assignment_info")
    assert heavy_share(session, PROVIDERS["CPU"]) == (1.0 if tells else None)
    assert heavy_share(session, PROVIDERS["CUDA"]) == (0.0 if tells else None)
    # As if onnxruntime listed CoreML first, but had put its nodes elsewhere.
    monkeypatch.setattr(Provider, "long_name", "CPUExecutionProvider")
    for share, words in ((0.5, "only 50%"), (None, "cannot be verified")):
        monkeypatch.setattr(onnxruntime_engine, "heavy_share", lambda *a, share=share: share)
        with pytest.raises(UnverifiedProvider, match=words):
            OnnxRuntimeRunner(file, PROVIDERS["CoreML"], CPU)
    monkeypatch.setattr(loading, "why_not", lambda p: None)
    report = face.load_analyser([roots["inside"]], engine="onnxruntime", provider="CoreML", device=CPU).report()
    assert "by torch" in report and "CoreML was asked for" in report
    # It has all of the graph, and computes something else.
    monkeypatch.setattr(onnxruntime_engine, "heavy_share", lambda *a: 1.0)
    assert OnnxRuntimeRunner(file, PROVIDERS["CoreML"], CPU).provider.name == "CoreML"
    run = OnnxRuntimeRunner.run
    for wrong, words in ((lambda y: 1.1 * y, "10% off"), (torch.zeros_like, "100% off"), (lambda y: y / 0, "nan% off")):
        monkeypatch.setattr(OnnxRuntimeRunner, "run", lambda self, x, wrong=wrong: [wrong(y) for y in run(self, x)])
        with pytest.raises(UnverifiedProvider, match=f"other numbers than the CPU \\({words}"):
            OnnxRuntimeRunner(file, PROVIDERS["CoreML"], CPU)


def test_a_session_that_cannot_be_made_leaves_torch_and_the_reason(roots, monkeypatch):
    import onnxruntime

    def refuse(*arguments, **settings):
        raise Exception("opset 99 is under development")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    report = face.load_analyser([roots["inside"]], device=CPU, remember=False).report()
    assert "by torch" in report and "onnxruntime is installed, but" in report and "opset 99" in report


@pytest.mark.parametrize(("release", "switched_off"), [("1.26.0", True), ("1.27.0", True), ("1.28.0", False)])
def test_arms_kernels_are_left_alone_until_they_are_right(roots, monkeypatch, release, switched_off):
    """Every picture stays in memory there, and what a session computes again differs."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", release)
    made, plain = [], onnxruntime.InferenceSession

    def session(model, sess_options=None, **settings):
        made.append(sess_options)
        return plain(model, sess_options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    analyser = face.load_analyser([roots["inside"]], engine="onnxruntime", device=CPU, remember=False)
    assert analyser.recogniser.width and len(made) == 2
    for options in made:
        if switched_off:
            assert options.get_session_config_entry("mlas.disable_kleidiai") == "1"
        else:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry("mlas.disable_kleidiai")
