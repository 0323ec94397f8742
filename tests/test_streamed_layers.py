"""Layers that stay in the machine's memory: the same numbers, one copy a layer, and everything as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotpath.host import layer_weights, streamed_layers
from hotpath.host.streamed_layers import PLACES, StreamedLayer
from torch import Tensor, nn


class Block(nn.Module):
    """With what a layer may hold besides plain weights: a bias, buffers, a matrix on its side, one of two owners, none."""

    kind = "full"

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.bare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.bare.weight = nn.Parameter(torch.randn(8, 8).t())
        self.register_buffer("codes", torch.arange(8, dtype=torch.uint8), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.bare(self.two(self.one(x).relu())) * self.codes


@pytest.fixture(autouse=True)
def _own_numbers() -> Any:
    with torch.random.fork_rng():
        yield


def network(count: int = 5) -> Any:
    whole = nn.Module()
    whole.layers = nn.ModuleList(Block(seed) for seed in range(count))
    whole.head = nn.Linear(8, 2)
    return whole


def run(whole: Any, x: Tensor) -> Tensor:
    for layer in whole.layers:
        x = layer(x, scale=0.5)
    return x


def test_streamed_layers_compute_the_same_and_are_nobodys() -> None:
    whole, x = network(), torch.randn(3, 8)
    wanted, size = run(whole, x), streamed_layers.nbytes(whole)
    names = [name for name, _ in whole.named_modules()]
    each = streamed_layers.nbytes(whole.layers[0])
    for count, chosen in ((3, [0, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4]), (1, [4]), (0, [])):
        streamed_layers.stream(whole.layers, count)
        assert [i for i, layer in enumerate(whole.layers) if isinstance(layer, StreamedLayer)] == chosen
        assert torch.equal(run(whole, x), wanted)
        assert streamed_layers.nbytes(whole) == size - count * each and streamed_layers.whole_bytes(whole) == size
        assert [name for name, _ in streamed_layers.named_modules(whole)] == names
        whole.double().float()  # moves what is nobody's no more than `.to`
    assert whole.layers[0].kind == "full"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = whole.layers[0].nothing_of_the_kind


def test_weights_lie_side_by_side_as_they_were() -> None:
    block = Block(0)
    before = {name: tensor.clone() for name, tensor in (*block.named_parameters(), *block.named_buffers())}
    owner, strides = block.one.weight, block.bare.weight.stride()
    weights = layer_weights.Weights(block)
    assert block.two.weight is block.one.weight is owner and block.bare.weight.stride() == strides == (1, 8)
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        assert torch.equal(tensor, before[name])
        assert tensor.untyped_storage().data_ptr() == weights.memory.untyped_storage().data_ptr()
    assert weights.nbytes == 5 * layer_weights.ALIGNMENT  # the shared matrix once


def test_a_layer_runs_where_its_input_is_and_keeps_its_weights_when_it_fails() -> None:
    layer = StreamedLayer(nn.Linear(4, 3))
    weight = layer.layer.weight
    assert layer(torch.ones(2, 4, device="meta")).device.type == "meta" and layer.in_features == 4
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 5, device="meta"))
    assert layer.layer.weight is weight and weight.device.type == "cpu"
    assert not list(layer.parameters())


def test_what_changes_in_the_machines_memory_is_lent_changed() -> None:
    layer = StreamedLayer(nn.Linear(4, 3))
    with torch.inference_mode():
        layer.layer.weight.data.fill_(2.0)
        lent = layer.weights.on(layer.weights.memory.clone())
    assert torch.equal(lent[0], torch.full((3, 4), 2.0)) and not lent[0].is_inference()


def test_packed_tensors_of_another_library_are_taken_apart() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    quantization.quantize_(layers, quantization.Int8WeightOnlyConfig())
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    wanted = layers(x)
    streamed = StreamedLayer(layers)
    assert torch.equal(streamed(x), wanted) and streamed.weights.nbytes < 2.5 * 64 * 64
    with torch.inference_mode():
        lent = streamed.weights.on(streamed.weights.memory.clone())
        with streamed.weights.replaced_by(lent):
            assert torch.equal(layers(x), wanted) and layers[0].weight is lent[0]
    assert type(layers[0].weight.data) is type(lent[0].data)


def test_what_cannot_be_taken_apart_is_copied_by_itself() -> None:
    class Strange(torch.Tensor):
        pass

    layer = nn.Linear(4, 3)
    layer.register_buffer("strange", torch.ones(3).as_subclass(Strange))
    streamed = StreamedLayer(layer)
    lent = streamed.weights.copied(torch.device("meta"))
    assert [tensor.device.type for tensor in lent] == ["meta"] * 3
    assert isinstance(layer.strange, Strange) and streamed.weights.nbytes == 2 * layer_weights.ALIGNMENT


def test_as_many_as_must_be() -> None:
    layers = list(network(8).layers)
    each = streamed_layers.nbytes(layers[0])
    # Two of them are on the device at any time.
    for excess, count in ((0, 0), (-5, 0), (1, PLACES + 1), (each, PLACES + 1), (each + 1, PLACES + 2), (9 * each, 8)):
        assert streamed_layers.how_many(layers, excess) == count
    assert streamed_layers.how_many([], 5) == 0
