"""What is compiled for a film is compiled for every network and size, or says that it is not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hotpath.colorization.compilation import MaybeCompiled
from torch import nn

LIMIT = getattr(torch._dynamo.config, "recompile_limit", None) or torch._dynamo.config.cache_size_limit


class Counting:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_every_network_is_compiled_however_many_came_before():
    for width in range(1, LIMIT + 4):
        backend, layer = Counting(), Layer(width)
        part = MaybeCompiled(layer, True, "part", backend)
        x = torch.rand(3, width)
        assert torch.equal(part(x), layer(x)) and torch.equal(part(x), layer(x))
        assert (backend.graphs, part.status) == (1, "compiled")


def test_a_network_that_nobody_holds_is_freed():
    layer = Layer(4)
    part = MaybeCompiled(layer, True, "part", Counting())
    part(torch.rand(2, 4))
    held = weakref.ref(layer), weakref.ref(part)
    del layer, part
    gc.collect()
    assert [still() for still in held] == [None, None]


def test_a_size_without_a_graph_is_told():
    backend, layer = Counting(), Layer(4)
    part = MaybeCompiled(layer, True, "part", backend)
    for rows in range(2, LIMIT + 4):
        assert part(torch.rand(rows, 4)).shape == (rows, 2)
    assert backend.graphs == LIMIT
    assert part.status.startswith(f"compiled for {LIMIT} sizes")


def test_a_compiler_that_fails_is_told_once_and_what_the_network_raises_is_raised():
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    part = MaybeCompiled(Layer(4), True, "part", broken)
    assert part(torch.rand(2, 4)).shape == (2, 2)
    assert part.status.startswith("not compiled: ") and "no compiler here" in part.status
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        part(torch.rand(2, 5))


def test_what_is_not_asked_for_is_not_compiled():
    backend = Counting()
    part = MaybeCompiled(Layer(4), False, "part", backend)
    part(torch.rand(2, 4))
    assert backend.graphs == 0 and part.status == "not compiled: not asked for"
