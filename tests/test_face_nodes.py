"""The face nodes over the demo models, foreign FACEANALYSIS objects, choices, crops and masks."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hotpath import demo, face
from hotpath.face import FaceChoice, FaceError, Faces, alignment, areas
from hotpath.face.crops import crop_places, cut, edge_weight, paste
from hotpath.face.foreign import ForeignAnalyser
from hotpath.host import Interrupted
from hotpath.host.headless import HeadlessHost
from hotpath.nodes import face_regions as regions
from hotpath.nodes import faces as nodes
from PIL import Image

pytestmark = pytest.mark.xdist_group("face_nodes")
ROOT = Path(demo.__file__).parent


@pytest.fixture
def loaded(tmp_path):
    from hotpath import host

    mine = HeadlessHost(models=ROOT / "models", input_folder=tmp_path, device="cpu", show_progress=False)
    before = host.use(mine)
    yield nodes.HotpathFaceLoader().load("antelopev2", "torch", "fp32")[0]
    host.use(before)


@pytest.fixture(scope="module")
def three():
    return torch.from_numpy(np.array(Image.open(ROOT / "inputs" / "faces_drawn_three.png"))).float()[None] / 255


def some_faces():
    boxes = torch.tensor([[10.0, 10, 30, 40], [60, 20, 100, 80], [5, 60, 25, 90], [60, 30, 100, 90]])
    points = torch.stack([(b[:2] + b[2:]) / 2 + torch.randn(5, 2) for b in boxes])
    vectors = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0]])
    return Faces(boxes, points, torch.tensor([0.9, 0.8, 0.95, 0.6]), vectors, (100, 120), 640)


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


def test_a_picture_without_the_face_that_is_picked_is_an_error_where_that_is_asked_for():
    faces, pick = [some_faces(), Faces.none((100, 120), 640)], nodes.HotpathFacePick().pick
    assert pick(faces, "largest", 0, "skip")[1] == 1
    with pytest.raises(FaceError, match="picture 1 of 2"):
        pick(faces, "largest", 0, "error")


def test_a_picture_that_passes_through_is_averaged():
    stripes = torch.zeros(1, 64, 64, 3)
    stripes[:, :, ::4] = 1.0
    crops, _ = face.cut_faces(stripes, [Faces.none((64, 64), 640)], 16, 0.3, True, "pass through")
    assert torch.allclose(crops[0, :, 2:-2], torch.tensor(0.25), atol=0.05)


def test_an_upright_crop_has_the_pixels_of_its_box():
    picture = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(5))
    faces = one_face([32.0, 48.0, 96.0, 112.0])
    own = picture[0, 48:112, 32:96]
    assert torch.allclose(cut(picture, crop_places(faces, 64, 0.0, True))[0], own, atol=1e-5)
    halved = own.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert torch.allclose(cut(picture, crop_places(faces, 32, 0.0, True))[0], halved, atol=1e-5)


def test_crops_of_another_number_are_refused_and_those_beside_the_picture_change_nothing():
    picture = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(6))
    for box in ([300.0, 100.0, 340.0, 140.0], [100.0, -90.0, 140.0, -50.0]):
        places = crop_places(one_face(box), 32, 0.0, upright=True)
        back, where = paste(picture, torch.ones(1, 32, 32, 3), places, 0.1)
        assert torch.equal(back, picture) and where.max() == 0
        with pytest.raises(FaceError, match="2 crops cannot be pasted into 1 places"):
            paste(picture, torch.ones(2, 32, 32, 3), places, 0.1)


def test_a_crop_that_shrinks_its_face_is_averaged(three):
    stripes = torch.zeros(1, 256, 256, 3)
    stripes[:, :, ::2] = 1.0
    box = torch.tensor([[0.0, 0, 256, 256]])
    faces = [Faces(box, torch.rand(1, 5, 2), torch.ones(1), None, (256, 256), 640)]
    crop = cut(stripes, crop_places(faces, 32, 0.0, upright=True))
    assert (crop[:, 2:-2, 2:-2] - 0.5).abs().max() < 0.01


def one_face(box, size=(256, 256)):
    centre = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    points = centre + torch.tensor([[-9.0, -9], [9, -9], [0, 0], [-7, 9], [7, 9]])
    return [Faces(torch.tensor([box]), points[None], torch.ones(1), None, size, 640)]


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("feather", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("box", [[60.3, 70.6, 133.1, 140.2], [-30.0, -20.5, 50.2, 60.0], [200.0, 210.0, 290.0, 280.0]])
def test_pasting_leaves_no_seam(upright, feather, box):
    """Neither around the crop, hard border or soft, nor where it reaches over the picture's."""
    white = torch.ones(1, 256, 256, 3)
    places = crop_places(one_face(box), 96, 0.4, upright)
    back, where = paste(white, cut(white, places), places, feather)
    assert (back - white).abs().max() < 1e-5 and where.max() > 0.99


def scaled(picture, height, width):
    return torch.nn.functional.interpolate(picture.movedim(-1, 1), size=(height, width), mode="area").movedim(1, -1)


@pytest.mark.parametrize("align", [True, False])
def test_places_follow_pictures_that_were_scaled(align):
    """After their faces were found, and again after the crops were cut; sides are rounded to whole pixels."""
    picture = torch.zeros(1, 150, 101, 3)
    picture[:, 60:90, 40:70, 0] = 1
    faces = one_face([40.0, 60.0, 70.0, 90.0], (150, 101))
    crops, places = face.cut_faces(picture, faces, 64, 0.5, not align, "error")
    for height, width in ((300, 202), (449, 303), (75, 50)):
        large = scaled(picture, height, width)
        again, found_again = face.cut_faces(large, faces, 64, 0.5, not align, "error")
        assert (again - crops).abs().mean() < 0.02
        for where_from in (places, found_again):
            green = torch.zeros_like(crops)
            green[..., 1] = crops[..., 0]
            pasted, where = paste(large, green, where_from, 0.2)
            inside = large[..., 0] > 0.5
            assert pasted[..., 1][inside].mean() > 0.8 and pasted[..., 1][~inside].mean() < 0.01
            assert where[inside].min() > 0.9
    for shape in ((150, 150), (300, 101), (150, 104)):
        other = torch.zeros(1, *shape, 3)
        words = rf"found in a picture of 101 x 150, and this one of {shape[1]} x {shape[0]} has another shape"
        with pytest.raises(FaceError, match=words):
            face.cut_faces(other, faces, 64, 0.5, not align, "error")
        with pytest.raises(FaceError, match=words):
            paste(other, crops, places, 0.2)


def test_crops_copy_one_picture_at_a_time_of_a_batch_that_lies_channel_by_channel(monkeypatch):
    """As a VAE leaves it: brought in order as a whole for every strip of every crop, time grows with the square."""
    batch = torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(3)).movedim(1, -1)
    faces = one_face([10.0, 12.0, 30.0, 32.0], (40, 48)) * 6
    wanted, _ = face.cut_faces(batch.contiguous(), faces, 64, 0.3, False, "error")
    seen = []
    strip = alignment._strip
    monkeypatch.setattr(alignment, "_strip", lambda pixels, *a: (seen.append(pixels), strip(pixels, *a))[1])
    assert torch.equal(face.cut_faces(batch, faces, 64, 0.3, False, "error")[0], wanted)
    assert len(seen) >= 6 and all(len(p) == 1 and p.is_contiguous() for p in seen)


def test_masks_of_crops_are_one_or_as_many_as_the_crops():
    pictures = torch.zeros(3, 64, 64, 3)
    crops, places = face.cut_faces(pictures, one_face([10.0, 12.0, 40.0, 44.0], (64, 64)) * 3, 32, 0.3, True, "error")
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    one, alike = paste(pictures, crops + 1, places, 0.1, half[None]), paste(pictures, crops + 1, places, 0.1, half)
    assert all(torch.equal(a, b) for a, b in zip(one, alike, strict=True)) and 0.9 < one[1].amax() <= 1
    assert one[0][:, 28, 15].min() > 0.9 and one[0][:, 28, 35].max() == 0 == one[1][:, 28, 35].max()
    each = torch.stack([half, 1 - half, half * 0])
    assert (paste(pictures, crops + 1, places, 0.1, each)[1][:, 28, 15] > 0.9).tolist() == [True, False, False]
    for masks in (half.expand(2, 16, 16), half[None, None]):
        with pytest.raises(FaceError, match=rf"the shape \[{', '.join(map(str, masks.shape))}\] for 3 crops"):
            paste(pictures, crops, places, 0.1, masks)


def test_a_crop_finer_than_its_picture_is_averaged_when_it_is_pasted():
    picture = torch.full((1, 256, 256, 3), 0.5)
    places = crop_places(one_face([96.0, 96.0, 160.0, 160.0]), 512, 0.0, upright=True)
    checks = ((torch.arange(512)[:, None] + torch.arange(512)[None]) % 2).float()[None, :, :, None].expand(1, -1, -1, 3)
    back, _ = paste(picture, checks, places, 0.1)
    assert (back - 0.5).abs().max() < 0.02
    noise = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    back, _ = paste(picture, noise, places, 0.1)
    assert back[0, 110:146, 110:146].std() < 0.08  # a pixel is the mean of 64; one alone would have 0.29


def test_crops_with_other_channels_than_the_picture():
    coloured = torch.rand(1, 256, 256, 4, generator=torch.Generator().manual_seed(1))
    places = crop_places(one_face([96.0, 96.0, 160.0, 160.0]), 64, 0.0, upright=True)
    red = torch.zeros(1, 64, 64, 3)
    red[..., 0] = 1.0
    back, _ = paste(coloured, red, places, 0.1)
    assert torch.allclose(back[0, 128, 128, :3], red[0, 0, 0], atol=1e-5)
    assert torch.equal(back[..., 3], coloured[..., 3]), "transparency stays"
    grey, _ = paste(coloured[..., :1], red, places, 0.1)
    assert abs(float(grey[0, 128, 128, 0]) - 1 / 3) < 1e-5
    for given in (1, 4):
        for channels in (1, 3):
            back, _ = paste(coloured[..., :channels], torch.full((1, 64, 64, given), 0.25), places, 0.1)
            assert torch.allclose(back[0, 128, 128], torch.full((channels,), 0.25), atol=1e-5)
    back, _ = paste(coloured, torch.full((1, 64, 64, 4), 0.25), places, 0.1)
    assert torch.allclose(back[0, 128, 128], torch.full((4,), 0.25), atol=1e-5)
    with pytest.raises(FaceError, match="came back as 80 x 64; crops are square"):
        paste(coloured, torch.zeros(1, 64, 80, 3), places, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_pictures_of_other_dtypes(dtype):
    """As some packs give them; numpy's own floats are double."""
    whole = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    odd = (whole * 255).to(dtype) if dtype == torch.uint8 else whole.to(dtype)
    faces = [*one_face([10.0, 12.0, 40.0, 44.0], (64, 64)), Faces.none((64, 64), 640)]
    crops, places = face.cut_faces(odd, faces, 32, 0.3, True, "pass through")
    wanted, _ = face.cut_faces(whole, faces, 32, 0.3, True, "pass through")
    assert crops.dtype == torch.float32 and torch.allclose(crops, wanted, atol=0.01)
    pasted, where = paste(odd, 1 - crops, places, 0.2)
    assert pasted.dtype == where.dtype == torch.float32
    assert torch.allclose(pasted, paste(whole, 1 - wanted, places, 0.2)[0], atol=0.02)
    assert torch.allclose(face.mark_faces(odd[0], faces[0]), face.mark_faces(whole[0], faces[0]), atol=0.02)


def test_large_crops_are_computed_in_strips_with_equal_results(monkeypatch):
    """A crop of 512 pixels around a face eight times as large has 4096 x 4096 samples."""
    picture = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(2))
    places = crop_places(one_face([20.0, 30.0, 220.0, 230.0]), 64, 0.2, upright=False)
    whole = cut(picture, places)
    pasted = paste(picture, whole, places, 0.3)
    asked: list[int] = []
    strip = alignment._strip
    monkeypatch.setattr(alignment, "_strip", lambda *a: (asked.append(len(a[3]) * a[4]), strip(*a))[1])
    monkeypatch.setattr(alignment, "SAMPLES_AT_ONCE", 2000)
    assert torch.equal(cut(picture, places), whole)
    assert all(torch.equal(a, b) for a, b in zip(paste(picture, whole, places, 0.3), pasted, strict=True))
    assert len(asked) > 10 and max(asked) <= 2000


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
    for box, own, colour in zip(boxes.long().tolist(), points.long().tolist(), areas.MARKS, strict=False):
        left, top, right, bottom = box
        middle = (left + right) // 2, (top + bottom) // 2
        here = (marked * 255).round().eq(torch.tensor(colour)).all(-1)
        assert all(here[y, x] for x, y in ((middle[0], bottom), (left, middle[1]), (right, middle[1])))
        assert here[top, right - 2] and not here[middle[1], middle[0]]
        for (x, y), point_colour in zip(own, areas.POINT_COLOURS, strict=True):
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


def test_the_soft_border_is_smooth_and_whole_inside():
    weight = edge_weight(64, 0.5)
    assert weight[32, 32] == 1 and weight[0, 32] < 0.01 and (weight.diff(dim=0).abs() < 0.12).all()
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


def test_loading_asks_in_its_own_thread_only(loaded, monkeypatch):
    """One that was left would take the stop of a later run."""
    askers: set[int] = set()
    monkeypatch.setattr(HeadlessHost, "check_interrupt", lambda _: askers.add(threading.get_ident()))
    root = ROOT / "models" / "insightface"
    face.load_analyser([root], engine="torch", device=torch.device("cpu"), remember=False)
    assert askers == {threading.get_ident()}


def test_our_own_objects_pass_unchanged(loaded):
    assert face.adapt(loaded) is loaded
    wrapped = ForeignAnalyser(Recorder(640))
    assert face.adapt(wrapped) is wrapped and wrapped.size == 640


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
