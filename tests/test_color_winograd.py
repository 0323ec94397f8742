"""3x3 convolutions by Winograd's products against the direct ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hotpath.colorization import winograd
from hotpath.colorization.winograd import Conv3x3, prepare_convolutions
from torch import nn

SIZES = [(14, 21), (1, 1), (1, 8), (5, 2), (9, 16), (40, 30)]


def errors(found: torch.Tensor, layer: Conv3x3, x: torch.Tensor) -> tuple[float, float]:
    """The largest difference from float64, of `found` and of the direct way."""
    exact = copy.deepcopy(layer).double()(x.double())
    assert found.shape == exact.shape
    return tuple((result - exact).abs().max().item() for result in (found, layer(x)))  # type: ignore[return-value]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_equals_the_direct_convolution(size: tuple[int, int], dilation: int, order: torch.memory_format) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Conv3x3(24, 12, dilation)
        x = torch.randn(2, 24, *size).to(memory_format=order)
    with torch.no_grad():
        weights = winograd.transform_weights(layer.weight)
        found = winograd.winograd(x, weights, layer.bias, dilation, dilation)
        assert max(errors(found, layer, x)) < 3e-6
        # A network that pads by itself.
        if min(size) > 2 * dilation:
            layer.padding = (0, 0)
            inner = winograd.winograd(x, weights, None, 0, dilation) + layer.get_parameter("bias")[:, None, None]
            assert max(errors(inner, layer, x)) < 3e-6


@pytest.mark.parametrize("direct", [False, True], ids=["winograd", "direct"])
def test_wide_layers_are_prepared(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    monkeypatch.setattr(winograd, "direct_is_faster", lambda: direct)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        wide, narrow = Conv3x3(160, 128), Conv3x3(8, 8)
        x = torch.randn(3, 160, 17, 30)
    network = nn.Sequential(wide, narrow)
    before = set(network.state_dict())
    plain = copy.deepcopy(wide)
    prepare_convolutions(network)
    assert winograd.convolutions_status(network).startswith("oneDNN" if direct else "Winograd")
    assert winograd.convolutions_status(narrow) == winograd.convolutions_status(plain) == "torch's own"
    assert not narrow.packs and narrow.transformed is None and set(network.state_dict()) == before
    if direct:
        assert wide.packs and wide.transformed is None
    else:
        assert wide.transformed is not None and wide.transformed.nbytes * 9 == wide.weight.nbytes * 16
    with torch.inference_mode():
        first = wide(x)
        assert max(errors(first, plain, x)) < 2e-5
        # In several pieces, too, and from two halves of the channels.
        monkeypatch.setattr(winograd, "TILES_BYTES", 1)
        torch.testing.assert_close(wide(x), first, atol=2e-5, rtol=0)
        halves = wide.partial(x[:, :100], 0, True) + wide.partial(x[:, 100:], 100, False)
        torch.testing.assert_close(halves, first, atol=2e-5, rtol=0)
        # Half precision goes torch's own way.
        for way in ("winograd", "PackedConvolution"):
            monkeypatch.setattr(winograd, way, lambda *_: pytest.fail("half precision prepared"))
        assert wide.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_packed_weights_are_kept_for_a_size_that_comes_again_and_follow_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "direct_is_faster", lambda: True)
    made: list[torch.Size] = []
    original = winograd.PackedConvolution

    class Counted(original):  # type: ignore[misc,valid-type]
        def __init__(self, weight: torch.Tensor, size: torch.Size, *rest: object) -> None:
            made.append(size)
            super().__init__(weight, size, *rest)

    monkeypatch.setattr(winograd, "PackedConvolution", Counted)
    layer = Conv3x3(128, 128)
    layer.prepare()
    film, odd = torch.rand(2, 128, 6, 6), torch.rand(1, 128, 6, 6)
    with torch.inference_mode():
        first = layer(film)
        assert all(torch.equal(layer(film), first) for _ in range(3)) and len(made) == 2
        layer(odd)
        layer(film)
        assert len(made) == 3, "a size that comes once takes nobody's place"
        for clone in (copy.deepcopy(layer), layer):
            clone.weight.data = clone.weight.data * 2
            clone._apply(lambda tensor: tensor.clone())
            torch.testing.assert_close(clone(film) - clone.bias[:, None, None], 2 * (first - layer.bias[:, None, None]))
        layer(film)
        layer(film)
    trained = Conv3x3(128, 128)
    trained.prepare()
    trained(torch.rand(2, 128, 6, 6)).sum().backward()
    assert trained.weight.grad is not None
