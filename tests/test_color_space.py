"""Lab as scikit-image computes it, and the chroma filters against OpenCV and their own invariants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.colorization import colour_space, edge_filter, pictures, strips
from hotpath.colorization.chroma_transfer import transfer_chroma
from hotpath.colorization.colour_space import lab_to_rgb, luminance_of, rgb_to_lab
from hotpath.colorization.full_size import frames_of, luminance_of_frames
from torch.nn import functional as F

DATA = Path(__file__).parent / "data" / "colorization"


def test_rgb_to_lab_and_back_equal_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    levels = torch.arange(0, 256, 5)
    rgb = torch.cartesian_prod(levels, levels, levels).to(torch.uint8).view(1, -1, 3)
    expected = torch.from_numpy(color.rgb2lab(rgb.numpy()).astype(np.float32)).permute(2, 0, 1)
    lab = colour_space.rgb_to_lab(rgb.permute(2, 0, 1).float() / 255)
    torch.testing.assert_close(lab, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(colour_space.luminance_of(rgb.permute(2, 0, 1).float() / 255), lab[:1])
    # Far outside sRGB too.
    wild = expected * torch.tensor([1.0, 1.6, 1.6])[:, None, None]
    back = color.lab2rgb(wild.permute(1, 2, 0).numpy().astype(np.float64))
    torch.testing.assert_close(
        colour_space.lab_to_rgb(wild), torch.from_numpy(back).permute(2, 0, 1).float(), atol=2e-5, rtol=0
    )


def test_there_and_back_is_the_same_eight_bits() -> None:
    rgb = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(1))
    back = colour_space.lab_to_rgb(colour_space.rgb_to_lab(rgb.float() / 255))
    assert torch.equal((back * 255).round().long(), rgb)


@pytest.mark.parametrize("floating", [True, False])
def test_luminance_of_black_and_white_frames_is_that_of_frames_in_colour(floating: bool) -> None:
    grey = torch.randint(0, 256, (3, 5, 24, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    frames = grey.repeat(1, 1, 1, 3)
    for place in range(3):
        frames[place, 2, 7, place] ^= 128  # in each channel, so that none of them may be left out
    cpu = torch.device("cpu")
    for given in (frames, grey.expand(-1, -1, -1, 3)):
        given = given.float() / 255 if floating else given
        wanted = colour_space.luminance_of((given if floating else given.float() / 255).permute(0, 3, 1, 2))
        for frame, expected in zip(given.split(1), wanted.split(1), strict=True):
            torch.testing.assert_close(luminance_of_frames(frame, cpu), expected, atol=1e-5, rtol=0)


def test_fast_global_smoother_equals_opencv() -> None:
    golden = np.load(DATA / "fast_global_smoother.npz")
    guide, chroma = torch.from_numpy(golden["guide"]).float()[None, None], torch.from_numpy(golden["chroma"])[None]
    out = edge_filter.fast_global_smoother(guide, chroma, float(golden["smoothness"]), float(golden["sigma"]))
    torch.testing.assert_close(out[0, :, ::2, 1::2], torch.from_numpy(golden["filtered"]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", edge_filter.FILTERS)
def test_filters_keep_flat_chroma_and_stop_at_edges(name: str) -> None:
    guide = torch.zeros(1, 1, 40, 60)
    guide[..., 30:] = 90.0
    flat = torch.full((1, 2, 40, 60), 12.5)
    torch.testing.assert_close(edge_filter.apply_filter(name, guide, flat), flat, atol=1e-3, rtol=0)
    sides = torch.where(guide > 50, 40.0, -40.0).expand(1, 2, 40, 60)
    noisy = sides + torch.randn(sides.shape, generator=torch.Generator().manual_seed(2))
    out = edge_filter.apply_filter(name, guide, noisy)
    assert (out - sides).abs().mean() <= (noisy - sides).abs().mean() + 1e-6
    assert (out - sides).abs()[..., 29:31].max() < 8, "colour crossed the edge"
    if name != "none":
        assert (out - sides).std() < 0.5 * (noisy - sides).std()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 2), (37, 53)])
def test_what_a_cpu_does_equals_what_a_card_does(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = size
    random = torch.Generator().manual_seed(4)
    values = torch.randn(2, 3, height, width, generator=random) * 20
    ties = 500 * torch.exp(-8 * torch.rand(2, 1, height, width - 1, generator=random))
    exact = edge_filter._reduced(ties.double(), values.double()).float()
    lines = values.permute(3, 0, 1, 2).numpy().copy()
    edge_filter._eliminate(ties.permute(3, 0, 1, 2).numpy(), lines)
    torch.testing.assert_close(torch.from_numpy(lines).permute(1, 2, 3, 0), exact, atol=1e-3, rtol=0)
    guide = torch.rand(2, 1, height, width, generator=random)
    for radius in (1, 3, 10):
        side = 2 * radius + 1
        expected = F.avg_pool2d(values, side, 1, radius, count_include_pad=False) if radius <= min(size) else None
        found = edge_filter._box(values, radius)
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert found.isfinite().all() and found.abs().max() <= values.abs().max() + 1e-4
        whole = edge_filter._guided(guide, values, radius, 1e-4)
        smoothed = edge_filter.fast_global_smoother(255 * guide, values)
        monkeypatch.setattr(edge_filter, "TOGETHER", 1)  # strips of 8 radii, single frames
        assert torch.equal(edge_filter.guided_filter(guide, values, radius, 1e-4), whole)
        assert torch.equal(edge_filter.fast_global_smoother(255 * guide, values), smoothed)


def test_a_device_that_cannot_antialias_leaves_it_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.rand(1, 2, 9, 12, generator=torch.Generator().manual_seed(5))
    expected = pictures.resized(picture, 4, 5)
    interpolate, tries = F.interpolate, []

    def once(*args: Any, antialias: bool, **options: Any) -> Any:
        tries.append(antialias)
        if len(tries) == 1:
            raise NotImplementedError("_upsample_bilinear2d_aa.out is not implemented for this device")
        return interpolate(*args, antialias=antialias, **options)

    monkeypatch.setattr(pictures, "_without_antialias", set())
    monkeypatch.setattr(F, "interpolate", once)
    assert torch.equal(pictures.resized(picture, 4, 5), expected) and tries == [True, True]
    assert torch.equal(pictures.resized(picture, 4, 5), expected) and len(tries) == 3


def test_unknown_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="no edge filter 'wls'"):
        edge_filter.apply_filter("wls", torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))


def test_transfer_keeps_luminance_and_takes_chroma() -> None:
    random = torch.Generator().manual_seed(3)
    light = torch.rand(2, 30, 40, 1, generator=random) * 0.5 + 0.25
    colours = torch.tensor([0.7, 0.4, 0.4]).expand(1, 15, 20, 3)
    out = transfer_chroma(light, colours, 1.0, "none", torch.device("cpu"))
    lab, wanted = colour_space.rgb_to_lab(out.permute(0, 3, 1, 2)), colour_space.rgb_to_lab(colours.permute(0, 3, 1, 2))
    grey = colour_space.luminance_of(light.permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
    inside = ((out > 0.001) & (out < 0.999)).all(-1)
    torch.testing.assert_close(lab[:, 0][inside], grey[:, 0][inside], atol=0.02, rtol=0)
    torch.testing.assert_close(lab[:, 1][inside], wanted[:, 1, :1, :1].expand(2, 30, 40)[inside], atol=0.02, rtol=0)
    shared = [
        transfer_chroma(light, c, 0.5, "guided", torch.device("cpu")) for c in (colours, colours.repeat(2, 1, 1, 1))
    ]
    torch.testing.assert_close(*shared, atol=1e-5, rtol=0)
    both = torch.cat([colours, torch.tensor([0.4, 0.4, 0.7]).expand(1, 15, 20, 3)])
    each = transfer_chroma(light, both, 1.0, "none", torch.device("cpu"))
    for i in range(2):
        torch.testing.assert_close(
            each[i], transfer_chroma(light[i : i + 1], both[i : i + 1], 1.0, "none", torch.device("cpu"))[0]
        )
    with pytest.raises(ValueError, match="3 colour pictures for 2"):
        transfer_chroma(light, colours.expand(3, -1, -1, -1), 1.0, "none", torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_strips_are_the_whole(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    frames = torch.randint(0, 256, (2, rows, 19, 3), dtype=torch.uint8)
    chroma, cpu = 40 * torch.randn(2, 2, rows, 19), torch.device("cpu")
    rgb = frames.permute(0, 3, 1, 2).float() / 255

    def made() -> list[torch.Tensor]:
        light = luminance_of_frames(frames, cpu)
        lab = rgb_to_lab(rgb)
        kinds = torch.uint8, torch.float32
        return [light, lab, lab_to_rgb(lab[0]), luminance_of(rgb), *(frames_of(light, chroma, k) for k in kinds)]

    whole = made()
    heights: list[int] = []
    monkeypatch.setattr(strips, "NUMBERS", 2 * 3 * 19 * 4)
    inside = colour_space._lab_to_rgb
    monkeypatch.setattr(colour_space, "_lab_to_rgb", lambda lab: (heights.append(lab.shape[-2]), inside(lab))[1])
    for strip, wanted in zip(made(), whole, strict=True):
        # Which pixels share a vector differs, and with it the last bit of a power.
        assert strip.dtype == wanted.dtype and strip.shape == wanted.shape
        assert float((strip.float() - wanted.float()).abs().max()) <= (1 if strip.dtype == torch.uint8 else 1e-4)
    assert max(heights) <= 8 and sum(heights) == 3 * rows
    inked = rgb.clone().requires_grad_()
    rgb_to_lab(inked).sum().backward()
    assert inked.grad is not None and bool(inked.grad.isfinite().all())
