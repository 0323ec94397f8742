"""Pictures compared: numbers against closed forms and against the libraries, faces, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.comparison import (
    Thresholds,
    compare_batches,
    compare_faces,
    compare_pair,
    describe,
    difference_map,
    face_agreement,
    load_perceptual,
    read_picture,
    side_by_side,
    values,
)
from hotpath.comparison.measures import Incomparable, as_rgb, measure
from hotpath.comparison.page import Files, page
from hotpath.comparison.pair import Comparison
from hotpath.comparison.pictures import RAMP
from PIL import Image
from plain_pictures import flat, noise


class Unfitting:
    """scikit-image 0.22 with numpy 2.4."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError("numpy.dtype size changed, may indicate binary incompatibility.")


class TestMeasures:
    def test_equal_pictures(self) -> None:
        found = measure(noise(1), noise(1))
        assert (found.ssim, found.psnr, found.mean_difference, found.max_difference) == (1.0, math.inf, 0.0, 0.0)
        assert found.identical

    @pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (0.0, 1.0), (0.5, 0.51)])
    def test_flat_pictures_by_the_formula(self, a: float, b: float) -> None:
        """Without variance SSIM is (2ab + C1) / (a^2 + b^2 + C1), C1 = 0.01^2."""
        found = measure(flat(a), flat(b))
        assert found.ssim == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-6)
        assert found.psnr == pytest.approx(-20 * math.log10(b - a), abs=1e-4)
        assert found.mean_difference == pytest.approx(b - a, abs=1e-6) == found.max_difference

    def test_ssim_is_that_of_the_paper_written_out(self) -> None:
        """Gaussian window of 11 pixels and sigma 1.5, sums of populations, mean over the inside and over the channels."""
        a, b = noise(2), (noise(2) + 0.1 * noise(3)).clamp(0, 1)
        taps = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
        window = torch.outer(taps, taps) / torch.outer(taps, taps).sum()

        def mean(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x[:, None], window[None, None])[:, 0]

        x, y = (p.double().movedim(-1, 0) for p in (a, b))
        mx, my = mean(x), mean(y)
        vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        expected = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
        assert measure(a, b).ssim == pytest.approx(float(expected), abs=1e-6)

    @pytest.mark.parametrize("built_for_another_numpy", [False, True])
    def test_without_scikit_image_the_number_is_the_same(
        self, monkeypatch: pytest.MonkeyPatch, built_for_another_numpy: bool
    ) -> None:
        wide = torch.rand(11, 40, 3, generator=torch.Generator().manual_seed(8))
        pairs = [(noise(2), (noise(2) + 0.1 * noise(3)).clamp(0, 1)), (wide, 1 - wide), (wide, wide)]
        with_it = [measure(a, b) for a, b in pairs]
        monkeypatch.setitem(sys.modules, "skimage.metrics", Unfitting() if built_for_another_numpy else None)
        for (a, b), expected in zip(pairs, with_it, strict=True):
            found = measure(a, b)
            assert found.ssim == pytest.approx(expected.ssim, abs=1e-7)
            assert dataclasses.replace(found, ssim=0) == dataclasses.replace(expected, ssim=0)

    def test_psnr_and_differences_are_the_plain_sums(self) -> None:
        from skimage.metrics import peak_signal_noise_ratio

        a, b = noise(4), noise(5)
        found = measure(a, b)
        assert found.psnr == pytest.approx(peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0), abs=1e-4)
        assert found.mean_difference == pytest.approx(float((a - b).abs().mean()), abs=1e-6)
        assert found.max_difference == pytest.approx(float((a - b).abs().max()))

    def test_a_difference_map_is_brightest_where_most_differs(self) -> None:
        a, b = flat(0.5), flat(0.5)
        b[0, 0, 1], b[3, 3] = 0.55, 1.0
        shown = difference_map(a, b)
        assert shown[10, 10].tolist() == pytest.approx(RAMP[0]) and shown[3, 3].tolist() == pytest.approx(RAMP[-1])
        assert shown[10, 10].sum() < shown[0, 0].sum() < shown[3, 3].sum()

    @pytest.mark.parametrize(
        ("a", "b", "reason"),
        [
            (flat(0.5), flat(0.5, 30, 20), "The sizes differ: A is 20x24, B is 20x30"),
            (flat(0.5, 10, 40), flat(0.5, 10, 40), "are 40x10; to compare structures they need 11"),
            (flat(0.5), flat(math.nan), r"B holds values that are not finite \(NaN\)"),
            (torch.zeros(24, 20), flat(0.5), r"A is no picture: its shape is \(24, 20\)"),
            (torch.zeros(24, 20, 2), flat(0.5), "A is no picture"),
        ],
    )
    def test_what_cannot_be_compared_gets_a_sentence(self, a: Any, b: Any, reason: str) -> None:
        pair = compare_pair("x", a, b, Thresholds())
        assert pair.state == "not comparable"
        with pytest.raises(Incomparable, match=reason):
            raise Incomparable(pair.problem)
        assert side_by_side(pair).isfinite().all()

    def test_grey_and_transparent_pictures(self) -> None:
        grey = torch.rand(20, 20, 1)
        assert torch.equal(as_rgb(grey, "A"), grey.expand(20, 20, 3))
        assert torch.equal(as_rgb(torch.cat([noise(1), noise(2)[..., :1]], -1), "A"), noise(1))


class TestThresholds:
    def test_each_is_judged(self) -> None:
        a, b = noise(1), (noise(1) + 0.05 * noise(2)).clamp(0, 1)
        ssim = measure(a, b).ssim
        assert compare_pair("x", a, b, Thresholds(min_ssim=ssim)).state == "passed"
        failed = compare_pair("x", a, b, Thresholds(min_ssim=ssim + 1e-4))
        assert failed.state == "failed" and failed.failures == (f"SSIM {ssim:.4f} is below {ssim + 1e-4:g}.",)
        with_lpips = compare_pair(
            "x", noise(1, 64, 64), noise(2, 64, 64), Thresholds(-1, -1, 0.2), None, lambda a, b: 0.3
        )
        assert with_lpips.lpips == 0.3 and with_lpips.failures == ("LPIPS 0.3000 is above 0.2.",)

    def test_batches_must_be_equally_long(self) -> None:
        with pytest.raises(Incomparable, match="A has 2 pictures and B has 3"):
            compare_batches(torch.rand(2, 20, 20, 3), torch.rand(3, 20, 20, 3), Thresholds())
        with pytest.raises(Incomparable, match="B is no batch"):
            compare_batches(torch.rand(2, 20, 20, 3), torch.rand(20, 20, 3), Thresholds())
        with pytest.raises(Incomparable, match="A is no batch"):
            compare_batches(torch.rand(0, 20, 20, 3), torch.rand(0, 20, 20, 3), Thresholds())


def found_faces(*faces: tuple[list[float], list[float]]) -> Any:
    class Found(SimpleNamespace):
        def __len__(self) -> int:
            return len(faces)

    boxes = torch.tensor([box for box, _ in faces]).reshape(-1, 4)
    return Found(boxes=boxes, embeddings=torch.tensor([e for _, e in faces]).reshape(len(faces), 2))


class Faces:
    """Gives the faces it was made with, A's and B's in turn."""

    def __init__(self, *found: Any) -> None:
        self.found = list(found)

    def analyse(self, images: torch.Tensor, *, embed: bool = True) -> list[Any]:
        assert images.shape[0] == 1 and embed
        return [self.found.pop(0)]


LEFT, RIGHT, FAR = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [100.0, 100, 110, 110]


class TestFaces:
    def test_cosines_by_hand_and_pairs_by_place(self) -> None:
        a = found_faces((LEFT, [3.0, 4.0]), (RIGHT, [1.0, 0.0]))
        b = found_faces(([21.0, 0, 31, 10], [1.0, 1.0]), ([1.0, 1, 11, 11], [6.0, 8.0]))
        found = compare_faces(Faces(a, b), flat(0), flat(0))
        assert sorted(found.cosines) == pytest.approx([1 / math.sqrt(2), 1.0])
        assert found.least == pytest.approx(1 / math.sqrt(2)) and not found.problem

    def test_overlap_is_the_shared_area_in_parts_of_both(self) -> None:
        a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 4]])
        b = torch.tensor([[5.0, 0, 15, 10], [0, 0, 8, 8], [10, 10, 20, 20], [3, 3, 3, 3]])
        wanted = torch.tensor([[1 / 3, 0.64, 0, 0], [0, 0.25, 0, 0]])
        assert torch.allclose(face_agreement._overlap(a, b), wanted)

    def test_a_lone_face_that_moved_is_compared_all_the_same(self) -> None:
        found = compare_faces(Faces(found_faces((LEFT, [1.0, 0])), found_faces((FAR, [0.0, 2]))), flat(0), flat(0))
        assert found.cosines == (0.0,)

    @pytest.mark.parametrize(
        ("a", "b", "state", "said"),
        [
            ([(LEFT, [1.0, 0])], [], "failed", "There is a face in A and none in B."),
            ([], [(LEFT, [1.0, 0])], "failed", "There is a face in B and none in A."),
            ([], [], "passed", "No face was found in A or B, so the face cosine is not judged."),
            ([(LEFT, [1.0, 0])], [(LEFT, [2.0, 0])], "passed", ""),
            ([(LEFT, [1.0, 0])], [(LEFT, [1.0, 0]), (FAR, [0.0, 1])], "passed", "Faces: 1 in A, 2 in B"),
            ([(LEFT, [1.0, 0]), (RIGHT, [1.0, 0])], [(FAR, [1.0, 0]), (FAR, [1.0, 0])], "failed", "No face of A is at"),
            ([(LEFT, [1.0, 0])], [(LEFT, [1.0, 0.5])], "failed", "The face cosine 0.8944 is below 0.98."),
        ],
    )
    def test_what_faces_say_about_a_pair(self, a: Any, b: Any, state: str, said: str) -> None:
        picture = noise(1)
        pair = compare_pair("x", picture, picture, Thresholds(), Faces(found_faces(*a), found_faces(*b)))
        assert pair.state == state
        assert any(remark.startswith(said) for remark in pair.remarks()) if said else not pair.remarks()
        assert said in describe(Comparison("a", "b", Thresholds(), [pair]))
        shown = page(Comparison("a", "b", Thresholds(), [pair]), [Files()], {})
        assert ("no face in either" in shown) == (not a and not b)

    @pytest.mark.parametrize(("side", "least"), [(64, 10), (1024, 20), (2160, 40)])
    def test_the_caption_grows_with_the_pictures_and_is_whole(
        self, monkeypatch: pytest.MonkeyPatch, side: int, least: int
    ) -> None:
        from PIL import ImageDraw

        drawn = []
        monkeypatch.setattr(
            ImageDraw.ImageDraw, "text", lambda ink, at, text, font, **_: drawn.append((text, font.size))
        )
        agreement = face_agreement.FaceAgreement(1, 1, (0.5,))
        limits = Thresholds(0.99, 0.98, 0.1)
        failures = ("SSIM 0.9135 is below 0.99.", "LPIPS 0.3300 is above 0.1.", "The face cosine 0.5000 is below 0.98.")
        a = torch.zeros(32, side, 3)
        pair = dataclasses.replace(
            compare_pair("picture 0", a, a, limits), lpips=0.33, faces=agreement, failures=failures
        )
        side_by_side(pair)
        assert min(size for _, size in drawn) >= least
        said = [text for text, _ in drawn]
        side_by_side(pair, "a.json", "a.json, HotpathInstantID.patch_mode=" + "x" * (side // 8) + "fast")
        assert drawn[6][0] == "a.json" and drawn[7][0].startswith("...") and drawn[7][0].endswith("fast")
        assert said[2:] == ["difference x8", "failed: picture 0", pair.numbers(), "  ".join(failures)]


@pytest.mark.parametrize("mode", ["16 bits", "float"])
def test_grey_of_more_than_eight_bits_keeps_its_values(tmp_path: Path, mode: str) -> None:
    grey = np.random.default_rng(0).random((16, 20), np.float32)
    path = tmp_path / ("x.png" if mode == "16 bits" else "x.tif")
    Image.fromarray((grey * 65535).astype(np.uint16) if mode == "16 bits" else grey).save(path)
    read = read_picture(path)
    assert read.shape == (16, 20, 3)
    np.testing.assert_allclose(read.numpy(), np.repeat(grey[..., None], 3, -1), atol=1 / 65535)


def test_an_embedding_that_is_not_finite_is_nobodys() -> None:
    class Face:
        boxes, embeddings = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.full((1, 4), float("nan"))

        def __len__(self) -> int:
            return 1

    class Finder:
        def analyse(self, images: torch.Tensor, *, embed: bool = True) -> list[Face]:
            return [Face()]

    pair = compare_pair("x", noise(1), noise(1), Thresholds(), Finder())
    assert pair.state == "failed" and pair.cosine == -1.0
    json.dumps(values(pair), allow_nan=False)


def test_lpips_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-00000000.pth").write_bytes(b"cut off")
    measured, why = load_perceptual()
    assert measured is None and why.startswith("LPIPS is not measured: it cannot be loaded")


def test_lpips_is_measured_only_from_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    measured, why = load_perceptual()
    assert measured is None and "alexnet-owt-*.pth) is not in" in why and "nothing is downloaded" in why
    # An AlexNet of random weights, saved as torchvision's would be: the sum must be lpips' own over the same weights.
    generator = torch.Generator().manual_seed(0)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()  # its own heads, from its own file
    trunk = {}
    for name, parameter in reference.net.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5
        trunk["features." + name.split(".", 1)[1]] = parameter.data
    (tmp_path / "checkpoints").mkdir()
    torch.save(trunk, tmp_path / "checkpoints" / "alexnet-owt-00000000.pth")
    before = torch.random.get_rng_state()
    measured, why = load_perceptual()
    assert measured is not None and why.startswith("LPIPS: AlexNet")
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b = noise(1, 70, 66), noise(2, 70, 66)
    with torch.no_grad():
        expected = reference(*(p.movedim(-1, 0)[None] for p in (a, b)), normalize=True)
    assert measured(a, b) == pytest.approx(float(expected), rel=1e-4) and measured(a, a) == 0
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load_perceptual() == (None, "LPIPS is not measured: the package lpips is not installed (pip install lpips)")
