"""The face engine against insightface on the same random-weight files, and everything a batch can contain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from found_faces import AT_640, CPU, as_image, assert_same_faces
from hotpath import cache, face
from hotpath.face import DetectionOptions, FaceChoice
from hotpath.face.detection import Detector
from hotpath.face.loading import Stationary, agreement
from hotpath.face.onnx_graph import OnnxNetwork
from hotpath.products.metal import order_on

pytestmark = pytest.mark.xdist_group("face_engine")
pytest.importorskip("insightface")
cv2 = pytest.importorskip("cv2")
skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(
    params=[("torch", "inside"), ("torch", "outside"), ("onnxruntime", "inside"), ("onnxruntime", "outside")]
)
def analyser(request, analysers):
    return analysers[request.param]


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
        for device in ("cpu", "mps"):
            network = OnnxNetwork(folder / name, order_on(torch.device(device)))
            # Torch on Metal takes weights for what they would be in its plain order.
            assert all(weight.is_contiguous() for weight in network.parameters()) == (device == "mps")
            for got, want in zip(network(given), wanted, strict=True):
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


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_a_network_outside_the_hosts_management_is_released(roots, device):
    network = OnnxNetwork(roots["inside"] / "models" / "antelopev2" / "glintr100.onnx")
    managed = Stationary(network, device)
    with managed.resident() as resident:
        assert next(resident.parameters()).device == device
    managed.release()
    assert next(network.parameters()).device.type == "cpu"


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
