"""Deep Exemplar against the original's numbers, argmax first, and what its session promises."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.colorization import colour_space
from hotpath.colorization.checkpoint_file import WrongCheckpoint, load_network
from hotpath.colorization.deep_exemplar import checkpoint, framing
from hotpath.colorization.deep_exemplar.framing import cover_and_crop
from hotpath.colorization.deep_exemplar.networks import DeepExemplar
from hotpath.colorization.deep_exemplar.session import DeepExemplarSession
from hotpath.colorization.deep_exemplar.warp import legal_size
from hotpath.colorization.networks import laid_out
from tiny_colorizers import deep_exemplar_parts
from torch import Tensor
from torch.nn import functional as F

DATA = Path(__file__).parent / "data" / "colorization"


def filled(net: str) -> dict[str, Tensor]:
    fill = runpy.run_path(str(DATA / "fill.py"))["fill"]
    arrays = fill(json.loads((DATA / f"deepex_{net}_keys.json").read_text()), f"a:deepex_{net}")
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


@pytest.fixture(scope="module")
def networks() -> DeepExemplar:
    """As on a CPU, where weights of wide layers are kept in another order."""
    built = DeepExemplar(
        checkpoint.build_vgg(filled("vgg19_conv")),
        checkpoint.build_warp(filled("nonlocal_net")),
        checkpoint.build_color_net(filled("colornet")),
    )
    laid_out(built)
    return built


@pytest.fixture(scope="module")
def tiny() -> DeepExemplar:
    return DeepExemplar(*deep_exemplar_parts()).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread_no_gradients() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def halved_lab(pictures: np.ndarray[Any, Any], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    framed = cover_and_crop(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), *size)
    lab = colour_space.rgb_to_lab(framed / 255)
    return lab, F.interpolate(lab, scale_factor=0.5, mode="bilinear")


@pytest.mark.parametrize("name", ["d1_image", "d2_propagate", "d3_firstframe_centerpad"])
def test_equals_the_original(networks: DeepExemplar, name: str) -> None:
    golden = np.load(DATA / f"deepex_{name}.npz")
    size = (int(golden["size"][0]), int(golden["size"][1]))
    lab, half = halved_lab(golden["frames"], size)
    reference = halved_lab(golden["ref"][None], size)[1][0]
    session = DeepExemplarSession(networks, *half.shape[-2:], reference, last=reference if "first" in name else None)
    if "argmax" in golden:
        frame = int(golden["argmax_frame"])
        found = session.match(half[frame : frame + 1, :1]).index[0]
        assert torch.equal(found, torch.from_numpy(golden["argmax"]).long()), "an argmax flipped: look there first"
    out = session.colorize(half[:, :1]).chroma
    worst = (out[..., ::2, 1::2] - torch.from_numpy(golden["ab_half"])).abs().amax((1, 2, 3))
    assert worst[0] <= 5e-3 and worst.max() <= 5e-2, worst
    chroma = F.interpolate(out, scale_factor=2, mode="bilinear") * 1.25
    rgb = (colour_space.with_luminance(lab[:, :1], chroma) * 255).to(torch.uint8).movedim(1, -1)
    different = rgb[:, 1::3, 2::3].int() - torch.from_numpy(golden["rgb"]).int()
    assert different.abs().max() <= 1 and (different != 0).float().mean() < 0.01


def test_cover_and_crop_equals_scikit_image() -> None:
    transform = pytest.importorskip("skimage.transform")
    random = np.random.default_rng(0)
    sizes = ((90, 160, 64, 64), (50, 40, 80, 96), (33, 77, 48, 32), (200, 300, 40, 40))
    for rows, columns, height, width, flat in (*((*size, False) for size in sizes), (*sizes[0], True)):
        picture = random.integers(0, 256, (rows, columns, 3), np.uint8)
        if flat:
            picture[:] = (255, 51, 102)
        wide = rows / columns > height / width
        size = [int(n * (width / columns if wide else height / rows) + 1e-9) for n in (rows, columns)]
        resized = transform.resize(picture, size, mode="reflect", preserve_range=True, clip=False, anti_aliasing=True)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        expected = resized[top : top + height, left : left + width].astype(np.uint8)
        out = cover_and_crop(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), height, width)
        different = out[0].permute(1, 2, 0).numpy() - expected.astype(np.float32)
        # Whole numbers may fall to either side when they are truncated.
        assert np.abs(different).max() <= 1 and (different != 0).mean() < 1e-3, (rows, columns)


def test_framing_costs_what_its_taps_cost() -> None:
    """Not a product with the whole axis for every pixel."""
    for inputs, outputs in ((3840, 768), (2160, 432), (96, 192)):
        parts = framing.products(inputs, outputs, 0, outputs, torch.device("cpu"))
        assert sum(len(part.matrix) for part in parts) == outputs
        reach = inputs / outputs
        assert max(part.matrix.shape[1] for part in parts) <= reach * (framing.TOGETHER + 5) + 4
        for part in parts:
            torch.testing.assert_close(part.matrix.sum(1), torch.ones(len(part.matrix), dtype=torch.float64))


def test_published_keys_load_strictly(networks: DeepExemplar) -> None:
    for part, net in ((networks.vgg, "vgg19_conv"), (networks.warp, "nonlocal_net"), (networks.color_net, "colornet")):
        keys = [key for key, _, _ in json.loads((DATA / f"deepex_{net}_keys.json").read_text())]
        assert set(part.state_dict()) == set(keys)


def clip(frames: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(frames, 1, 5, 6, generator=torch.Generator().manual_seed(1)) * 100
    return F.interpolate(coarse, (height, width), mode="bilinear")


def picture(height: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.cat((torch.rand(1, height, width, generator=random) * 100, torch.randn(2, height, width) * 20))


@pytest.mark.parametrize("size", [(32, 32), (40, 48), (37, 53), (1, 1), (2, 130)])
@pytest.mark.parametrize("reference", [(36, 50), (64, 32), (1, 1)])
def test_any_size_of_frame_and_reference(tiny: DeepExemplar, size: tuple[int, int], reference: tuple[int, int]) -> None:
    out = DeepExemplarSession(tiny, *size, picture(*reference)).colorize(clip(2, *size))
    assert out.chroma.shape == (2, 2, *size) and out.chroma.isfinite().all()
    assert out.confidence.shape == (2, 1, *size) and out.confidence.min() >= 0 and out.confidence.max() <= 1.0001


def test_padding_leaves_legal_sizes_alone() -> None:
    assert legal_size(216, 384) == (216, 384)
    assert legal_size(72, 96) == (72, 96)
    assert legal_size(50, 71) == (56, 80)


@pytest.mark.long
def test_portions_batches_and_state_change_nothing(networks: DeepExemplar) -> None:
    # The golden clip: its best matches are clear of one another, so rounding flips none.
    golden = np.load(DATA / "deepex_d2_propagate.npz")
    luminance = halved_lab(golden["frames"], (144, 192))[1][:, :1]
    reference = halved_lab(golden["ref"][None], (144, 192))[1][0]

    def session(batch: int = 8) -> DeepExemplarSession:
        return DeepExemplarSession(networks, 72, 96, reference, batch=batch)

    whole = session().colorize(luminance).chroma
    torch.testing.assert_close(session(batch=1).colorize(luminance).chroma, whole, atol=0.05, rtol=0)
    first, second = session(), session()
    first.colorize(luminance[:2])
    second.load(first.state())
    torch.testing.assert_close(second.colorize(luminance[2:]).chroma, whole[2:], atol=0.05, rtol=0)


def test_without_propagation_frames_do_not_meet(tiny: DeepExemplar) -> None:
    luminance, reference = clip(3, 32, 32), picture(32, 32)
    together = DeepExemplarSession(tiny, 32, 32, reference, propagate=False).colorize(luminance).chroma
    alone = DeepExemplarSession(tiny, 32, 32, reference).colorize(luminance[2:]).chroma
    torch.testing.assert_close(together[2:], alone, atol=0.01, rtol=0)
    fed = DeepExemplarSession(tiny, 32, 32, reference).colorize(luminance).chroma
    assert (fed[2] - together[2]).abs().max() > 1e-3, "propagation must matter, or this proves nothing"


def test_tiny_checkpoints_round_trip(tiny: DeepExemplar, tmp_path: Path) -> None:
    builders = {"vgg": checkpoint.build_vgg, "warp": checkpoint.build_warp, "color_net": checkpoint.build_color_net}
    for name, build in builders.items():
        part = getattr(tiny, name)
        torch.save(part.state_dict(), tmp_path / f"{name}.pth")
        again = load_network(tmp_path / f"{name}.pth", name, build)
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in part.state_dict().items()}
    with pytest.raises(WrongCheckpoint, match=r"vgg.pth is not the colornet: it has no 'conv1_1.0.weight'"):
        load_network(tmp_path / "vgg.pth", "the colornet", checkpoint.build_color_net)
    kinds = [checkpoint.kind_of(set(part.state_dict())) for part in (tiny.vgg, tiny.warp, tiny.color_net)]
    assert kinds == ["vgg", "nonlocal_net", "colornet"]
    assert checkpoint.kind_of({"weight"}) is None
