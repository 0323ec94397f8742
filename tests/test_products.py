"""Products with weights in oneDNN's order against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from hotpath.products import linear as products
from torch import nn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48), (1, 1, 48), (0, 48)])
@torch.inference_mode()
def test_a_packed_layer_is_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(48, 60, bias=bias)
    packed = products.PackedLinear(layer, (40, 12, 8))
    x = torch.randn(shape)
    torch.testing.assert_close(packed(x), layer(x))
    for start, stop in ((0, 40), (40, 52), (52, 60), (3, 50), (40, 60)):
        torch.testing.assert_close(packed.rows(x, start, stop), layer(x)[..., start:stop])
    assert packed.weight.dtype == torch.float32 and packed.in_features == 48 and packed.out_features == 60
    assert sum(held.nbytes for held in packed.buffers()) == layer.weight.nbytes
    assert packed.to("cpu") is packed
    packed.forget()
    assert not sum(held.nbytes for held in packed.buffers())


@needs_onednn
@pytest.mark.parametrize("how", ["wrong", "slower", "missing", "faster"])
def test_it_is_used_only_where_it_is_right_and_faster(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(products, "TRIED_SIDE", 64)
    real = products.product

    def product(x: torch.Tensor, order: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if how == "missing":
            raise RuntimeError("bf16 path needs the cpu support\nmore")
        return real(x, order, bias) * (1.5 if how == "wrong" else 1.0)

    times = iter((1.0, 1.1, 1.0, 1.1) if how == "slower" else (1.1, 1.0, 1.1, 1.0))
    monkeypatch.setattr(products, "product", product)
    monkeypatch.setattr(products, "fastest", lambda work: next(times))
    reason = products.why_not.__wrapped__(torch.float32)
    expected = {"wrong": "wrong here", "slower": "no faster", "missing": "needs the cpu support", "faster": ""}[how]
    assert expected in reason and bool(reason) == bool(expected) and "more" not in reason
    assert "not asked" in products.why_not.__wrapped__(torch.float16)


def test_the_fastest_of_some_rounds_counts() -> None:
    calls: list[int] = []
    assert products.fastest(lambda: calls.append(1)) >= 0
    assert len(calls) == products.ROUNDS


@needs_onednn
def test_an_ordered_layer_is_the_layer_compiled_trained_copied_and_changed() -> None:
    layer = nn.Linear(48, 60)
    ordered = products.OrderedLinear(layer)
    assert set(ordered.state_dict()) == {"weight", "bias"} and ordered.weight is layer.weight
    x = torch.randn(2, 3, 48)
    seen: list[torch.Tensor] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(inputs)
        return graph

    with torch.inference_mode():
        torch.testing.assert_close(ordered(x), layer(x))
        torch.testing.assert_close(torch.compile(ordered, backend=backend, fullgraph=True)(x), layer(x))
        assert seen and all(one.layout == torch.strided for one in seen), "no compiler takes the other order"
        copied = copy.deepcopy(ordered)
        torch.testing.assert_close(copied(x), layer(x))
        torch.testing.assert_close(ordered.double()(x.double()), layer(x.double()))
    trained = products.OrderedLinear(nn.Linear(48, 60))
    trained(x).sum().backward()
    assert trained.weight.grad is not None
