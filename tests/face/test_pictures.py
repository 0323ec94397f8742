"""What is done with pixels before and after the networks: bad pictures, scaling, letterbox, alignment, overlap."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hotpath.face import DetectionOptions, FaceError
from hotpath.face.alignment import similarity, template, warp
from hotpath.face.analyser import PictureAnalyser
from hotpath.face.detection import merge_overlapping
from hotpath.face.linear_resize import resize, resize_into
from hotpath.face.pictures import PictureGroup, group_pictures, letterbox
from hotpath.host.device_work import copies_at_once

pytestmark = pytest.mark.xdist_group("face_engine")
pytest.importorskip("insightface")
cv2 = pytest.importorskip("cv2")
skimage_data = pytest.importorskip("skimage.data")


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
    ragged = group_pictures([given[:1], given[1, :200], given[1]])
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


def test_copies_wait_where_the_device_reads_memory_later(monkeypatch):
    """As Metal does, and Intel's cards: what the copy was to read may be free again by then."""
    plain = torch.Tensor.to

    def to(tensor, *given, non_blocking=False, **settings):
        made = plain(tensor, *given, **settings)
        return torch.full_like(made, 7) if non_blocking else made

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (3, 60, 60, 3), generator=generator).to(torch.uint8)
    points = torch.tensor([[[20.0, 22], [40, 22], [30, 32], [22, 42], [38, 42]]]).repeat(2, 1, 1)
    analyser = SimpleNamespace(recogniser=SimpleNamespace(size=112))
    group, rows = PictureGroup(pixels, (0, 1, 2)), torch.tensor([0, 2])
    wanted = PictureAnalyser.aligned(analyser, pixels, rows, points)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert torch.equal(PictureAnalyser.aligned(analyser, pixels, rows, points), wanted)
    assert torch.equal(group.take([2, 0]).pixels, pixels[[2, 0]])
    assert torch.equal(group.to(torch.device("cpu")).pixels, pixels)
    assert [copies_at_once(torch.device(kind)) for kind in ("cuda", "mps", "xpu", "cpu")] == [True, False, False, False]
