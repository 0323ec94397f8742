"""Lab as scikit-image computes it, and the chroma filters against OpenCV and their own invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hotpath.colorization import colour_space, edge_filter
from hotpath.colorization.chroma_transfer import transfer_chroma

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
    with pytest.raises(ValueError, match="3 colour pictures for 2"):
        transfer_chroma(light, colours.expand(3, -1, -1, -1), 1.0, "none", torch.device("cpu"))
