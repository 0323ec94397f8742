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


def test_wide_layers_are_prepared_and_round_less(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        wide, narrow = Conv3x3(160, 128), Conv3x3(8, 8)
        x = torch.randn(3, 160, 17, 30)
    network = nn.Sequential(wide, narrow)
    before = set(network.state_dict())
    direct = wide(x)
    prepare_convolutions(network)
    assert narrow.transformed is None and wide.transformed is not None
    assert wide.transformed.nbytes * 9 == wide.weight.nbytes * 16 and set(network.state_dict()) == before
    with torch.inference_mode():
        plain = copy.deepcopy(wide)
        plain.transformed = None
        prepared, expected = errors(wide(x), plain, x)
        assert prepared < expected < 2e-5
        # In several pieces, too, and from two halves of the channels.
        monkeypatch.setattr(winograd, "TILES_BYTES", 1)
        torch.testing.assert_close(wide(x), direct, atol=2e-5, rtol=0)
        halves = wide.partial(x[:, :100], 0, True) + wide.partial(x[:, 100:], 100, False)
        torch.testing.assert_close(halves, direct, atol=2e-5, rtol=0)
        # Half precision goes the direct way.
        monkeypatch.setattr(winograd, "winograd", lambda *_: pytest.fail("half precision by Winograd's products"))
        assert wide.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
