"""The face nodes over the demo models."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hotpath import demo, face
from hotpath.face import FaceError
from hotpath.face.crops import crop_places, paste
from hotpath.host.headless import HeadlessHost
from hotpath.nodes import face_regions as regions
from hotpath.nodes import faces as nodes
from PIL import Image

pytestmark = pytest.mark.xdist_group("face_nodes")
ROOT = Path(demo.__file__).parent


def test_the_nodes_are_registered_with_what_a_person_reads():
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    for name, node in {**nodes.NODES, **regions.NODES}.items():
        assert NODE_CLASS_MAPPINGS[name] is node
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) and node.DESCRIPTION and node.DISPLAY_NAME
        sections = node.INPUT_TYPES()
        for section in ("required", "optional"):
            for entry in sections.get(section, {}).values():
                assert entry[1]["tooltip"].endswith(".")


def test_a_batch_goes_through_all_nodes(loaded, three):
    batch = torch.cat([three, torch.full_like(three, 0.4)])
    found, marked, report, count = nodes.HotpathFaces().find(loaded, batch, "all", 0, 0.5, True, "skip")
    assert [len(f) for f in found] == [3, 0] and count == 3
    assert marked.shape == batch.shape and not torch.equal(marked[0], batch[0]) and "no face" in report
    picked, pictures = nodes.HotpathFacePick().pick(found, "left to right", 1, "skip")
    assert pictures == 1 and 300 < float(picked[0].boxes[0, :2].mean()) * 2 < 600
    drawing = regions.HotpathFaceKeypoints().draw(found, 320, 224, "stretch")[0]
    assert drawing.shape == (2, 224, 320, 3) and drawing[0].max() == 1 and drawing[1].max() == 0
    mask = regions.HotpathFaceMask().mask(found, "oval", 0.0, 0, 0, 0)[0]
    assert mask.shape == (2, 448, 640) and mask[1].max() == 0
    for box in found[0].boxes.long().tolist():
        assert mask[0, (box[1] + box[3]) // 2, (box[0] + box[2]) // 2] == 1
    best, similarity, matches, text = nodes.HotpathFaceMatch().match(found, picked, 0.9)
    assert torch.equal(best[0].boxes, picked[0].boxes) and abs(similarity - 0.5) < 1e-4 and not matches
    assert text.startswith("Mean of the best cosines 0.500")
    with pytest.raises(FaceError, match="No face was found in picture 1 of 2"):
        nodes.HotpathFaces().find(loaded, batch, "all", 0, 0.5, False, "error")
    assert torch.equal(marked[1], batch[1]), "a picture without a face is as it was"
    blank = batch[1:]
    found, marked, _, _ = nodes.HotpathFaces().find(loaded, blank, "largest", 0, 0.5, False, "skip", identity=found[1:])
    assert marked.data_ptr() == blank.data_ptr(), "nothing to draw, no copy of the batch"
    assert nodes.HotpathFacePick().pick(found, "largest", 0, "skip", identity=found)[1] == 0
    with pytest.raises(FaceError, match="The identity has no embedded face"):
        nodes.HotpathFacePick().pick(found, "best match", 0, "skip", identity=found)


def test_small_faces_of_a_large_picture_need_a_larger_detector(loaded, three):
    crowd = torch.full((1, 1280, 1280, 3), 0.4)
    small = torch.nn.functional.interpolate(three.movedim(-1, 1), scale_factor=0.2, mode="area").movedim(1, -1)
    crowd[:, 500:589, 700:828] = small
    missed = nodes.HotpathFaces().find(loaded, crowd, "all", 0, 0.5, False, "skip")[0]
    found, _, report, count = nodes.HotpathFaces().find(
        loaded, crowd, "all", 0, 0.5, False, "skip", detector_size="1280"
    )
    assert len(missed[0]) < 3 and count == 3 and found[0].detector_size == 1280 and "at 1280" in report
    centres = (found[0].boxes[:, :2] + found[0].boxes[:, 2:]) / 2
    assert (centres > torch.tensor([700, 500])).all() and (centres < torch.tensor([828, 589])).all()
    # One that fills its picture is found all the same, further down.
    large = nodes.HotpathFaces().find(loaded, three, "all", 0, 0.5, False, "error", detector_size="1024")[0]
    assert len(large[0]) == 3


def test_the_same_drawn_person_is_picked_out_of_three(loaded, three):
    one = torch.from_numpy(np.array(Image.open(ROOT / "inputs" / "faces_drawn_one.png"))).float()[None] / 255
    person = nodes.HotpathFaces().find(loaded, one, "largest", 0, 0.5, True, "error")[0]
    found = nodes.HotpathFaces().find(loaded, three, "best match", 0, 0.5, True, "error", identity=person)[0]
    centre = float(found[0].boxes[0, [0, 2]].mean())
    assert 300 < centre < 360, "the person in the middle is the one of the other picture"


@pytest.mark.parametrize("align", [True, False])
def test_crops_that_nobody_changed_paste_back_without_a_trace(loaded, three, align):
    # Crops much finer than the picture, and a picture without detail finer than two pixels, or resampling shows.
    smooth = torch.nn.functional.avg_pool2d(three.permute(0, 3, 1, 2), 9, 1, 4).permute(0, 2, 3, 1)
    found = nodes.HotpathFaces().find(loaded, three, "all", 0, 0.5, False, "error")[0]
    crops, places, count = regions.HotpathFaceCrop().crop(smooth, found, 768, 0.3, align, "error")
    assert crops.shape == (3, 768, 768, 3) and count == 3
    back, where = regions.HotpathFacePaste().paste(smooth, crops, places, 0.2)
    assert (back - smooth).abs().max() < 0.02
    assert where.shape == (1, 448, 640) and where.max() > 0.99
    red = torch.zeros_like(crops)
    red[..., 0] = 1
    painted, where = regions.HotpathFacePaste().paste(smooth, red, places, 0.2)
    for box in found[0].boxes.long().tolist():
        middle = painted[0, (box[1] + box[3]) // 2, (box[0] + box[2]) // 2]
        assert middle[0] > 0.98 and middle[1] < 0.02
    assert torch.equal(painted[where == 0], smooth[where == 0])


def test_crops_may_come_back_in_another_size(loaded, three):
    found = nodes.HotpathFaces().find(loaded, three, "largest", 0, 0.5, False, "error")[0]
    crops, places, _ = regions.HotpathFaceCrop().crop(three, found, 256, 0.5, True, "error")
    larger = torch.nn.functional.interpolate(crops.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
    back, _ = paste(three, larger.permute(0, 2, 3, 1), places, 0.3)
    same, _ = paste(three, crops, places, 0.3)
    assert (back - same).abs().mean() < 0.003
    with pytest.raises(FaceError, match="2 crops cannot be pasted into 1 places"):
        paste(three, torch.cat([crops, crops]), places, 0.3)
    with pytest.raises(FaceError, match="of 1 pictures and 2 are connected"):
        paste(torch.cat([three, three]), crops, places, 0.3)


def test_an_aligned_crop_has_its_eyes_level(loaded, three):
    found = nodes.HotpathFaces().find(loaded, three, "left to right", 0, 0.5, False, "error")[0]
    places = crop_places(found, 400, 0.0, upright=False)
    from hotpath.face.alignment import TEMPLATE, invert

    forward = invert(places.inverse)[0]
    points = found[0].keypoints[0].numpy() @ forward[:, :2].T + forward[:, 2]
    assert abs(points[0, 1] - points[1, 1]) < 8
    assert np.abs(points - TEMPLATE / 112 * 400).max() < 40


def test_a_picture_without_a_face_keeps_the_batch_aligned(loaded, three):
    batch = torch.cat([torch.full_like(three, 0.4), three])
    found = nodes.HotpathFaces().find(loaded, batch, "largest", 0, 0.5, False, "skip")[0]
    for when_none, value in (("skip", 0.0), ("pass through", 0.4)):
        crops, places, count = regions.HotpathFaceCrop().crop(batch, found, 64, 0.5, True, when_none)
        assert count == 2 and torch.allclose(crops[0], torch.full_like(crops[0], value), atol=1e-6)
        back, where = paste(batch, torch.ones_like(crops), places, 0.2)
        assert torch.equal(back[0], batch[0]) and where[0].max() == 0 and where[1].max() > 0.9
    with pytest.raises(FaceError, match="No face was found in picture 0 of 2, counted from 0:"):
        regions.HotpathFaceCrop().crop(batch, found, 64, 0.5, True, "error")


def test_loading_asks_in_its_own_thread_only(loaded, monkeypatch):
    """One that was left would take the stop of a later run."""
    askers: set[int] = set()
    monkeypatch.setattr(HeadlessHost, "check_interrupt", lambda _: askers.add(threading.get_ident()))
    root = ROOT / "models" / "insightface"
    face.load_analyser([root], engine="torch", device=torch.device("cpu"), remember=False)
    assert askers == {threading.get_ident()}


@pytest.mark.comfy
def test_weights_go_through_comfyuis_memory_management_and_back(monkeypatch):
    import comfy.model_management as management
    from hotpath import host
    from hotpath.host.comfyui import ComfyUIHost

    def loaded(network):
        # An entry whose MODEL is gone has None.
        return any(getattr(entry.model, "model", None) is network for entry in management.current_loaded_models)

    before = host.use(ComfyUIHost())
    try:
        analyser = face.load_analyser([ROOT / "models" / "insightface"], engine="torch", remember=False)
        assert loaded(analyser.detector.runner.network)
        picture = torch.from_numpy(np.array(Image.open(ROOT / "inputs" / "astronaut.png"))).float()[None] / 255
        first = analyser.analyse(picture)[0]
        management.unload_all_models()
        assert not loaded(analyser.detector.runner.network)
        again = analyser.analyse(picture)[0]
        assert torch.allclose(first.embeddings, again.embeddings, atol=1e-4)
    finally:
        host.use(before)
