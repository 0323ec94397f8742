"""The face engine against insightface on the same random-weight files, and everything a batch can contain."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hotpath import cache, face
from hotpath.demo.face_networks import random_model_folder
from hotpath.face import DetectionOptions, FaceChoice, FaceError, Faces
from hotpath.face.alignment import similarity, template, warp
from hotpath.face.detection import Detector, merge_overlapping
from hotpath.face.insightface_api import foremost
from hotpath.face.linear_resize import resize, resize_into
from hotpath.face.loading import Stationary, agreement
from hotpath.face.onnx_graph import OnnxNetwork
from hotpath.face.pictures import group_pictures, letterbox

pytestmark = pytest.mark.xdist_group("face_engine")
pytest.importorskip("insightface")
cv2 = pytest.importorskip("cv2")
skimage_data = pytest.importorskip("skimage.data")
CPU = torch.device("cpu")
AT_640 = DetectionOptions(sizes=(640,))


@pytest.fixture(scope="module")
def pictures():
    return [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee()]


@pytest.fixture(scope="module")
def roots(tmp_path_factory, pictures):
    """Model folders with random weights: batch inside (the published layout) and outside (newer exports)."""
    shown = torch.from_numpy(cv2.resize(pictures[0], (640, 640)).astype(np.float32)).permute(2, 0, 1)[None]
    found = {}
    for layout in ("inside", "outside"):
        found[layout] = tmp_path_factory.mktemp(layout)
        # r18 at a quarter of the width: the contract counts here, not the size.
        random_model_folder(found[layout], (shown - 127.5) / 128, batch_outside=layout == "outside")
    return found


@pytest.fixture(scope="module")
def reference(roots):
    from insightface.app import FaceAnalysis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = FaceAnalysis("antelopev2", root=str(roots["inside"]), providers=["CPUExecutionProvider"])
    app.prepare(0, det_size=(640, 640))
    known: dict = {}

    def once(picture):
        """Every engine is compared on the same pictures."""
        key = picture.shape, picture.tobytes()
        if key not in known:
            known[key] = app.get(picture)
        return known[key]

    app.get_once = once
    return app


@pytest.fixture(scope="module")
def analysers(roots):
    return {
        (engine, layout): face.load_analyser([root], engine=engine, device=CPU, remember=False)
        for layout, root in roots.items()
        for engine in ("torch", "onnxruntime")
    }


@pytest.fixture(
    params=[("torch", "inside"), ("torch", "outside"), ("onnxruntime", "inside"), ("onnxruntime", "outside")]
)
def analyser(request, analysers):
    return analysers[request.param]


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


def test_single_pictures_agree_with_insightface(analyser, reference, pictures):
    for picture in pictures:
        found = analyser.analyse(as_image(picture)[None], options=AT_640)[0]
        assert_same_faces(reference, picture, found)


def test_batches_and_ragged_lists_agree_with_insightface(analyser, reference, pictures):
    same_size = [cv2.resize(p, (600, 500)) for p in pictures]
    for picture, found in zip(
        same_size, analyser.analyse(torch.stack([as_image(p) for p in same_size]), options=AT_640), strict=True
    ):
        assert_same_faces(reference, picture, found)
    ragged = [pictures[1], pictures[0], pictures[2], pictures[0][:, :300]]
    for picture, found in zip(ragged, analyser.analyse([as_image(p) for p in ragged], options=AT_640), strict=True):
        assert found.size == picture.shape[:2]
        assert_same_faces(reference, picture, found)


def test_pictures_of_all_sizes_are_one_detector_batch_and_one_recogniser_batch(roots, pictures, monkeypatch):
    """As on an accelerator: the CPU takes pictures one by one, so the device is given another name."""
    analyser = face.load_analyser([roots["inside"]], engine="torch", device=CPU, remember=False)
    ragged = [as_image(p) for p in (pictures[1], pictures[0], pictures[2], pictures[0][:300])]
    alone = [analyser.analyse([p], choose=FaceChoice.largest(), options=AT_640)[0] for p in ragged]
    batches = []
    for network in (analyser.detector.runner, analyser.recogniser.runner):
        original = network.run
        monkeypatch.setattr(network, "run", lambda x, run=original: (batches.append(len(x)), run(x))[1])

    class Elsewhere:
        type = "elsewhere"

    monkeypatch.setattr(type(analyser), "device", Elsewhere())
    monkeypatch.setattr("hotpath.face.pictures.PictureGroup.to", lambda group, device: group)
    monkeypatch.setattr(analyser, "_pictures_at_once", lambda options: 32)
    together = analyser.analyse(ragged, choose=FaceChoice.largest(), options=AT_640)
    assert batches == [4, 4]
    for a, b in zip(together, alone, strict=True):
        assert a.size == b.size and torch.allclose(a.boxes, b.boxes, atol=1e-2)
        assert torch.cosine_similarity(a.embeddings, b.embeddings).min() > 0.9999


def test_shrinking_gives_the_boxes_of_insightface_to_a_hundredth_of_a_pixel(analysers, reference, pictures):
    picture = cv2.resize(pictures[0], (1000, 900))
    found = analysers["torch", "inside"].analyse(as_image(picture)[None], options=AT_640)[0]
    assert_same_faces(reference, picture, found, boxes=0.01, cosine=0.99999)


@pytest.mark.parametrize("layout", ["inside", "outside"])
def test_equal_tensors_give_equal_outputs(roots, layout):
    import onnxruntime

    folder = roots[layout] / "models" / "antelopev2"
    x = torch.randn(1, 3, 192, 256, generator=torch.Generator().manual_seed(1))
    for name, given in (("scrfd_10g_bnkps.onnx", x), ("glintr100.onnx", x[:, :, :112, :112].contiguous())):
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        wanted = session.run(None, {"input.1": given.numpy()})
        for got, want in zip(OnnxNetwork(folder / name)(given), wanted, strict=True):
            scale = max(1.0, float(np.abs(want).max()))
            assert np.abs(got.numpy() - want).max() / scale < 1e-4


def test_the_layout_is_found_out_and_the_other_one_would_be_wrong(analysers):
    for engine in ("torch", "onnxruntime"):
        assert analysers[engine, "inside"].detector.layout == "batch inside"
        assert analysers[engine, "outside"].detector.layout == "batch outside"
    detector = analysers["torch", "inside"].detector
    x = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([detector.predict(x[i : i + 1])[1] for i in range(3)])
    assert torch.allclose(detector.predict(x)[1], alone, atol=1e-3)
    naive = torch.cat([o.reshape(3, -1, 4) for o in detector.runner.run(x)[3:6]], 1)
    assert (naive - alone).abs().max() > 0.1


def test_a_file_that_takes_one_picture_at_a_time_still_does_batches(analysers):
    class OneByOne:
        def __init__(self, runner):
            self.runner, self.device, self.engine, self.where = runner, runner.device, "torch", ""

        def run(self, x):
            if x.shape[0] > 1:
                raise RuntimeError("batch of one only")
            return self.runner.run(x)

        def release(self):
            self.runner.release()

    whole = analysers["torch", "inside"].detector
    single = Detector(OneByOne(whole.runner), whole.file)
    assert single.layout == "one picture at a time"
    x = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    for a, b in zip(single.predict(x), whole.predict(x), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_grey_transparent_and_byte_pictures_are_seen_alike(analysers, pictures):
    analyser = analysers["torch", "inside"]
    rgb = as_image(pictures[0])
    grey = rgb.mean(-1, keepdim=True)
    rgba = torch.cat([rgb, torch.rand(512, 512, 1, generator=torch.Generator().manual_seed(4))], -1)
    from_grey, from_three, from_rgb, from_rgba, from_bytes = (
        analyser.analyse([p], embed=False, options=AT_640)[0]
        for p in (grey, grey.expand(-1, -1, 3), rgb, rgba, torch.from_numpy(pictures[0]))
    )
    assert len(from_rgb) and torch.equal(from_grey.boxes, from_three.boxes)
    assert torch.equal(from_rgb.boxes, from_rgba.boxes) and torch.equal(from_rgb.boxes, from_bytes.boxes)


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (1, 300), (700, 3), (2160, 3840), (511, 333)])
def test_any_size_of_picture_goes_through(analysers, size):
    picture = torch.rand(*size, 3, generator=torch.Generator().manual_seed(5))
    found = analysers["torch", "inside"].analyse([picture], embed=True, options=AT_640)[0]
    assert found.size == size and found.embeddings.shape == (len(found), 512)
    assert torch.isfinite(found.boxes).all()


def test_pictures_without_a_face_go_down_the_ladder_together_and_say_where(analysers, reference, pictures):
    """Face sizes decide at which rung a picture succeeds; the batch gives what each picture alone gives."""
    analyser = analysers["torch", "inside"]
    plain = np.full((300, 300, 3), 90, np.uint8)
    mixed = [cv2.resize(pictures[0], (300, 300)), plain, cv2.resize(pictures[1], (300, 300))]
    options = DetectionOptions(threshold=0.72, sizes=(640, 384, 192))
    together = analyser.analyse(torch.stack([as_image(p) for p in mixed]), embed=False, options=options)
    for picture, found in zip(mixed, together, strict=True):
        for size in options.sizes:
            alone = analyser.analyse(
                [as_image(picture)], embed=False, options=DetectionOptions(threshold=0.72, sizes=(size,))
            )[0]
            if len(alone):
                break
        assert len(found) == len(alone) and found.detector_size == size
        assert torch.allclose(found.boxes, alone.boxes, atol=1e-3)


def test_the_choice_comes_before_the_embedding(analysers, pictures, monkeypatch):
    analyser = analysers["torch", "inside"]
    crops = []
    original = analyser.recogniser.embed
    monkeypatch.setattr(analyser.recogniser, "embed", lambda x: (crops.append(len(x)), original(x))[1])
    everyone = analyser.analyse([as_image(pictures[0])], options=AT_640)[0]
    one = analyser.analyse([as_image(pictures[0])], choose=FaceChoice.largest(), options=AT_640)[0]
    assert sum(crops[:-1]) == len(everyone) and crops[-1] == 1 and len(one) == 1
    i = int(everyone.areas.argmax())
    assert torch.equal(one.boxes[0], everyone.boxes[i])
    assert torch.allclose(one.embeddings[0], everyone.embeddings[i], rtol=1e-3, atol=1e-2)
    best = analyser.analyse(
        [as_image(pictures[0])], choose=FaceChoice.best_match(everyone.embeddings[2]), options=AT_640
    )
    assert torch.equal(best[0].boxes[0], everyone.boxes[2])


def test_the_recogniser_is_not_loaded_until_somebody_asks(roots):
    analyser = face.load_analyser([roots["inside"]], engine="torch", device=CPU, remember=False)
    picture = as_image(skimage_data.astronaut())
    assert analyser.analyse([picture], embed=False, options=AT_640)[0].embeddings is None
    assert analyser._recogniser is None
    empty = analyser.analyse([torch.zeros(64, 64, 3)], options=DetectionOptions(threshold=0.9999, sizes=(64,)))[0]
    assert empty.embeddings.shape == (0, 512) and analyser._recogniser is None, "no face, nothing to embed"
    analyser.analyse([picture], choose=FaceChoice.largest(), options=AT_640)
    assert analyser._recogniser is not None


def test_results_are_remembered_by_pixels_and_settings(roots):
    cache.clear_all("faces")
    analyser = face.load_analyser([roots["inside"]], engine="torch", device=CPU)
    runs = []
    original = analyser.detector.runner.run
    analyser.detector.runner.run = lambda x: (runs.append(len(x)), original(x))[1]
    picture = as_image(skimage_data.astronaut())
    first = analyser.analyse(picture[None], embed=False, options=AT_640)
    again = analyser.analyse(picture[None].clone(), embed=False, options=AT_640)
    assert runs == [1] and torch.equal(first[0].boxes, again[0].boxes) and "1 remembered" in analyser.report()
    other = picture.clone()
    other[100, 100, 0] = 1 - other[100, 100, 0]
    analyser.analyse(torch.stack([picture, other]), embed=False, options=AT_640)
    assert runs == [1, 1], "one pixel differs: only that picture is looked at"
    analyser.analyse(picture[None], embed=False, options=DetectionOptions(threshold=0.6, sizes=(640,)))
    assert runs == [1, 1, 1]
    cache.clear_all("faces")


def test_what_others_change_in_place_does_not_reach_the_memory(roots):
    cache.clear_all("faces")
    analyser = face.load_analyser([roots["inside"]], engine="torch", device=CPU)
    bgr = np.ascontiguousarray(skimage_data.astronaut()[..., ::-1])
    try:
        for _ in range(2):  # found anew, and remembered
            for one in analyser.get(bgr):
                one.bbox *= 2
                one.kps -= 1
                one.embedding /= np.linalg.norm(one.embedding)
        analyser.analyse([as_image(bgr[..., ::-1])])[0].boxes.mul_(2)
        kept = analyser.get(bgr)
        assert "1 remembered" in analyser.report()
        cache.clear_all("faces")
        fresh = analyser.get(bgr)
    finally:
        cache.clear_all("faces")
    assert kept and len(kept) == len(fresh)
    for again, first in zip(kept, fresh, strict=True):
        assert all(np.array_equal(again[name], first[name]) for name in ("bbox", "kps", "embedding"))


def test_half_precision_is_used_only_where_the_weights_stand_it(roots, monkeypatch):
    # How far bfloat16 turns the outputs of random weights depends on the processor, and may be either side of the limit.
    measured: list[float] = []

    def close(*arguments: object) -> float:
        measured.append(agreement(*arguments))
        return 0.9995

    monkeypatch.setattr("hotpath.face.loading.agreement", close)
    half = face.load_analyser([roots["inside"]], engine="torch", device=CPU, precision="bf16", remember=False)
    assert half.detector.runner.dtype == torch.bfloat16 and "bf16" in half.report()
    assert measured and all(0.99 < cosine < 1 for cosine in measured)
    file = half.detector.file
    network = OnnxNetwork(file.path)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    assert 0.99 < agreement(network, file, CPU, torch.bfloat16) < 1
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    monkeypatch.setattr("hotpath.face.loading.agreement", lambda *a: 0.9)
    kept = face.load_analyser([roots["inside"]], engine="torch", device=CPU, precision="bf16", remember=False)
    assert kept.detector.runner.dtype == torch.float32
    assert "stays in fp32" in kept.report() and "0.9000" in kept.report()


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
    from hotpath.face.onnxruntime_engine import PROVIDERS, OnnxRuntimeRunner, UnverifiedProvider, heavy_share

    file = face.load_analyser([roots["inside"]], engine="torch", device=CPU).detector.file
    session = OnnxRuntimeRunner(file, PROVIDERS["CPU"], CPU)._session(640, 640)
    # An older onnxruntime, such as the newest for Python 3.10, cannot say where its nodes went.
    tells = hasattr(session, "get_provider_graph_assignment_info")
    assert heavy_share(session, PROVIDERS["CPU"]) == (1.0 if tells else None)
    assert heavy_share(session, PROVIDERS["CUDA"]) == (0.0 if tells else None)
    # As if onnxruntime listed CoreML first, but had put its nodes elsewhere.
    monkeypatch.setattr(onnxruntime_engine, "long_name", lambda p: "CPUExecutionProvider")
    for share, words in ((0.5, "only 50%"), (None, "cannot be verified")):
        monkeypatch.setattr(onnxruntime_engine, "heavy_share", lambda *a, share=share: share)
        with pytest.raises(UnverifiedProvider, match=words):
            OnnxRuntimeRunner(file, PROVIDERS["CoreML"], CPU)
    monkeypatch.setattr(loading, "why_not", lambda p: None)
    report = face.load_analyser([roots["inside"]], engine="onnxruntime", provider="CoreML", device=CPU).report()
    assert "by torch" in report and "CoreML was asked for" in report


def test_a_session_that_cannot_be_made_leaves_torch_and_the_reason(roots, monkeypatch):
    import onnxruntime

    def refuse(*arguments, **settings):
        raise Exception("opset 99 is under development")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    report = face.load_analyser([roots["inside"]], device=CPU, remember=False).report()
    assert "by torch" in report and "onnxruntime is installed, but" in report and "opset 99" in report


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_a_network_outside_the_hosts_management_is_released(roots, device):
    network = OnnxNetwork(roots["inside"] / "models" / "antelopev2" / "glintr100.onnx")
    managed = Stationary(network, device)
    with managed.resident() as resident:
        assert next(resident.parameters()).device == device
    managed.release()
    assert next(network.parameters()).device.type == "cpu"


def bad_pictures():
    broken = torch.zeros(2, 40, 40, 3)
    broken[1, 3, 3, 1] = float("nan")
    return [
        (torch.zeros(0, 64, 64, 3), "the image batch is empty"),
        ([], "the image batch is empty"),
        (torch.zeros(1, 0, 64, 3), r"Picture 0 has no pixels \(64 x 0\)"),
        (broken, "Picture 1 holds NaN"),
        ([torch.zeros(8, 8, 3), torch.full((8, 8, 3), float("inf"))], "Picture 1 holds NaN or infinity"),
        (torch.zeros(1, 64, 64, 2), "has 2 channels"),
        (torch.zeros(64, 64), r"tensor of \[B, H, W, C\]"),
    ]


@pytest.mark.parametrize(("images", "words"), bad_pictures())
def test_bad_pictures_are_answered_in_one_sentence(analysers, images, words):
    with pytest.raises(FaceError, match=words) as error:
        analysers["torch", "inside"].analyse(images)
    assert "\n" not in str(error.value)


def test_detector_sizes_off_the_grid_are_refused(analysers):
    with pytest.raises(FaceError, match="multiples of 32"):
        analysers["torch", "inside"].analyse([torch.zeros(64, 64, 3)], options=DetectionOptions(sizes=(600,)))


@pytest.mark.parametrize(
    ("source", "target"),
    [((1024, 1024), (640, 640)), ((1280, 960), (640, 480)), ((700, 500), (640, 457)), ((2160, 3840), (360, 640)),
     ((640, 640), (576, 576)), ((384, 512), (192, 256)), ((333, 777), (100, 211))],
)  # fmt: skip
def test_shrinking_equals_cv2_exactly(source, target):
    picture = np.random.default_rng(6).integers(0, 256, (*source, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(picture)[None], *target)[0].numpy()
    assert np.array_equal(ours, cv2.resize(picture, target[::-1]))
    in_pieces(picture, ours)


def in_pieces(picture, wanted):
    """A CPU's way gives the same, also for several pictures, and into a part of something wider."""
    wide = torch.zeros(3, wanted.shape[0] + 1, wanted.shape[1] + 2, 3)
    given = torch.from_numpy(np.stack([picture, picture[::-1].copy(), picture]))
    resize_into(given, wide[:, 1:, 2:], 127.5, 128.0)
    for made in (wide[0], wide[2]):
        assert np.array_equal(made[1:, 2:].numpy(), (wanted - np.float32(127.5)) / np.float32(128))
    assert not torch.equal(wide[1], wide[0])
    assert not wide[:, :1].any() and not wide[:, :, :2].any(), "nothing beside it is written"


@pytest.mark.parametrize(
    ("source", "target"), [((512, 512), (640, 640)), ((33, 47), (449, 640)), ((20, 90), (142, 640))]
)
def test_enlarging_is_within_one_level_of_cv2(source, target):
    picture = np.random.default_rng(7).integers(0, 256, (*source, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(picture)[None], *target)[0].numpy()
    in_pieces(picture, ours)
    difference = np.abs(ours - cv2.resize(picture, target[::-1]))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("kind", ["wide", "half", "bfloat16", "double", "rgba", "grey", "transposed", "in range"])
def test_floats_become_bytes_by_truncation_whatever_their_layout(kind):
    """Also outside of 0..1, across the borders between pieces, and never in the pictures that were given."""
    values = torch.rand(2, 350, 800, 4, generator=torch.Generator().manual_seed(10)) * 3 - 1
    values[0, 0, :5] = torch.tensor([0.0, -0.0, 1.0, 3e38, -3e38])[:, None]
    given = {
        "wide": values[..., :3].contiguous(),
        "half": values[..., :3].clamp(-9, 9).half(),
        "bfloat16": values[..., :3].bfloat16().clamp(-9, 9),
        "double": values[..., :3].double(),
        "rgba": values,
        "grey": values[..., :1],
        "transposed": values[..., :3].transpose(1, 2),
        "in range": values[..., :3].clamp(0, 1),
    }[kind]
    before = given.clone()
    wanted = given[..., :3].float().mul(255).clamp(0, 255).to(torch.uint8).expand(*given.shape[:3], 3)
    assert torch.equal(group_pictures(given)[0].pixels, wanted)
    ragged = group_pictures([given[0], given[1, :200], given[1]])
    assert [group.positions for group in ragged] == [(0, 2), (1,)]
    assert torch.equal(ragged[0].pixels, wanted) and torch.equal(ragged[1].pixels[0], wanted[1, :200])
    assert torch.equal(given, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_picture_with_a_broken_number_is_named(bad):
    pictures = torch.rand(4, 300, 500, 3, generator=torch.Generator().manual_seed(11))
    pictures[1, -1, -1, -1] = pictures[3, 0, 0, 0] = bad
    with pytest.raises(FaceError, match="Picture 1 holds NaN or infinity"):
        group_pictures(pictures)
    with pytest.raises(FaceError, match="Picture 2 holds NaN or infinity"):
        group_pictures([pictures[0], pictures[2, :200], pictures[1]])


def test_the_letterbox_is_black_outside_and_keeps_the_scale():
    canvas, place = letterbox(torch.full((1, 100, 50, 3), 255, dtype=torch.uint8), (640, 640))
    assert (place.height, place.width, place.scale) == (640, 320, 6.4)
    assert canvas.shape == (1, 3, 640, 640)
    assert (canvas[..., :320] == 127.5 / 128).all() and (canvas[..., 320:] == -127.5 / 128).all()


def test_alignment_equals_skimage_and_cv2():
    from skimage.transform import SimilarityTransform

    rng = np.random.default_rng(8)
    for _ in range(20):
        points = (rng.uniform(0, 300, 2) + rng.uniform(5, 100) * rng.normal(size=(5, 2))).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = SimilarityTransform()
            wanted.estimate(points, template(112))
        ours = similarity(points[None], template(112))[0]
        assert np.abs(ours - wanted.params[:2]).max() < 1e-4 * max(1, np.abs(wanted.params).max())
    picture = skimage_data.astronaut()
    points = np.array([[203, 101], [246.6, 103.6], [223.6, 127], [204.4, 140], [244.4, 140.4]], np.float32)
    matrix = similarity(points[None], template(112))
    inverse = torch.from_numpy(np.linalg.inv(np.vstack([matrix[0], [0, 0, 1]]))[None, :2].astype(np.float32))
    ours = warp(torch.from_numpy(picture)[None], torch.zeros(1, dtype=torch.long), inverse, 112, 112)[0].round()
    wanted = cv2.warpAffine(picture, matrix[0], (112, 112), borderValue=0.0)
    difference = np.abs(ours.numpy() - wanted)
    # cv2 before 5 rounds coordinates to 1/32 pixel.
    assert difference.mean() < 0.5 and (int(cv2.__version__.split(".")[0]) < 5 or difference.max() <= 1)


def test_five_points_in_one_place_are_shifted_and_nothing_more():
    matrix = similarity(np.full((1, 5, 2), 7, np.float32), template(112))[0]
    assert np.isfinite(matrix).all() and np.array_equal(matrix[:, :2], np.eye(2))


def test_overlap_counts_one_pixel_more_as_insightface_does(reference):
    rng = np.random.default_rng(9)
    boxes = rng.uniform(0, 100, (300, 2))
    boxes = np.concatenate([boxes, boxes + rng.uniform(0, 40, (300, 2))], 1).astype(np.float32)
    scores = np.sort(rng.uniform(0.5, 1, 300).astype(np.float32))[::-1]
    wanted = reference.det_model.nms(np.concatenate([boxes, scores[:, None]], 1))
    assert merge_overlapping(boxes, 0.4) == [int(i) for i in wanted]


def test_a_stop_is_heard_between_the_pictures_of_a_batch(headless_host, analysers):
    """On a CPU a batch is looked at picture by picture, at several sizes; a stop must not wait for all of them."""
    from hotpath.host import Interrupted

    analyser = analysers["torch", "inside"]
    pictures, once = torch.rand(4, 64, 64, 3), DetectionOptions(sizes=(64,))
    asked = 0

    def stop_at_third() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted("stop")

    headless_host.check_interrupt = stop_at_third
    with pytest.raises(Interrupted):
        analyser.analyse(pictures, options=once)
    asked = 10
    analyser.analyse(pictures, options=once)
    assert asked >= 10 + len(pictures)
