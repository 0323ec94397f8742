"""Products with weights in oneDNN's order against torch's own."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hotpath.products import int8, rerouting
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
    for own, theirs, reason in ((1.0, 1.1, "no faster"), (1.1, 1.0, "no faster"), (2.2, 1.0, "")):
        times = iter((own, theirs))
        assert (expected if how in ("wrong", "missing") else reason) in products.why_not.__wrapped__(
            torch.float32, False
        )


def test_an_error_that_says_nothing_is_named_by_its_kind() -> None:
    assert products.said(RuntimeError("")) == "RuntimeError" and products.said(ValueError("\na\nb")) == "a"


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


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was given to oneDNN, which counts as the faster one here; matrices of 64 numbers are large."""
    seen: list[tuple[int, ...]] = []

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return products.product(x, weight, bias)

    monkeypatch.setattr(rerouting, "product", product)
    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "")
    monkeypatch.setattr(rerouting, "LARGE", 64)
    return seen


@needs_onednn
@torch.inference_mode()
def test_rerouted_layers_are_the_layers_and_only_large_products_of_many_rows_go_elsewhere(by_onednn: list[Any]) -> None:
    layer, small = nn.Linear(48, 60), nn.Linear(4, 4)
    given = torch.randn(2, 64, 96)
    for x in (given[..., :48], given[..., ::2], given[:, ::2, :48], given[0, :, :48], given[:, :, None, :48]):
        for bias in (layer.bias, None):
            with rerouting.Rerouting():
                made = nn.functional.linear(weight=layer.weight, input=x, bias=bias)
            torch.testing.assert_close(made, nn.functional.linear(x, layer.weight, bias))
            assert made.is_contiguous()
    assert len(by_onednn) == 10
    with rerouting.Rerouting():
        x, apart = given[..., :48], torch.randn(120)[::2]
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, apart), x @ layer.weight.T + apart)
        for x, one in (
            (given[0, :63, :48], layer),
            (given[0, 0, :48], layer),
            (given[:0, :, :48], layer),
            (given[..., :4], small),
        ):
            torch.testing.assert_close(one(x), x @ one.weight.T + one.bias)
        torch.testing.assert_close(
            layer.double()(given[..., :48].double()), given[..., :48].double() @ layer.weight.T + layer.bias
        )
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            nn.Linear(48, 60)(given)
        elsewhere = threading.Thread(target=torch.inference_mode()(lambda: small(given[..., :4])))
        elsewhere.start()
        elsewhere.join()
    assert len(by_onednn) == 10
    layer.float()(given[..., :48])
    assert len(by_onednn) == 10, "it is over"


@needs_onednn
def test_layers_that_are_trained_are_left_to_torch(by_onednn: list[Any]) -> None:
    layer = nn.Linear(48, 60)
    with rerouting.Rerouting():
        layer(torch.randn(64, 48)).sum().backward()
    assert layer.weight.grad is not None and not by_onednn


@needs_onednn
@torch.inference_mode()
def test_compiled_layers_are_rerouted_inside_their_graph(by_onednn: list[Any]) -> None:
    network = nn.Sequential(nn.Linear(48, 60), nn.GELU(), nn.Linear(60, 48, bias=False), nn.Linear(48, 1))
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        counts.append(rerouting.reroute(graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=True)
    for rows in (80, 96, 70):
        x = torch.randn(2, rows, 48)
        with rerouting.Rerouting():
            torch.testing.assert_close(compiled(x), network(x))
    assert counts == [2] and by_onednn.count((2, 70, 48)) == 2, "once compiled, once as it is"


def test_a_graph_stays_where_torch_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "oneDNN is no faster on this CPU")
    monkeypatch.setattr(rerouting, "LARGE", 64)
    graph = torch.fx.symbolic_trace(nn.Linear(48, 60))
    for node in graph.graph.nodes:
        node.meta["example_value"] = torch.zeros(60, 48)
    assert rerouting.reroute(graph) == 0


@torch.inference_mode()
def test_two_bytes_are_the_number_to_its_fifteenth_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator) * torch.logspace(-8, 8, 9).unsqueeze(1)
    x[3], x[4, 5] = 0.0, 400 * x[4].abs().max()
    x[5, :3] = torch.tensor([-1.0, 1.0, 0.5]) * x[5].abs().max()
    made, scale = int8.two_bytes(x)
    low, high = made.double().view(2, 9, 64)
    assert made.dtype == torch.int8 and made.shape == (18, 64)
    off = ((low + 256 * high) * scale.double() - x.double()).abs().amax(dim=1)
    assert bool((off <= x.abs().amax(dim=1) / 65000).all()) and not made[[3, 12]].any()
    assert torch.equal(int8.two_bytes(x.T.contiguous().T)[0], made)


@torch.inference_mode()
def test_products_of_two_bytes_are_those_of_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    if int8.why_not():
        pytest.skip(f"this CPU is not asked: {int8.why_not()}")
    monkeypatch.setattr(int8, "NEAR_SUMS", 1)
    monkeypatch.setattr(int8, "LEAST_WEIGHTS", 7)
    generator = torch.Generator().manual_seed(0)
    weight, scale = int8.rounded(torch.randn(24, 80, generator=generator))
    scale = scale.squeeze(1)
    for shape in ((1, 80), (3, 5, 80), (70, 80), (0, 80)):
        x = torch.randn(shape, generator=generator)
        x[..., 11] *= 50
        made = int8.two_byte_linear(x.bfloat16() if len(shape) == 3 else x, weight, scale.to(torch.bfloat16))
        given = x.bfloat16() if len(shape) == 3 else x
        wanted = given.double() @ weight.double().T * scale.to(torch.bfloat16).double()
        near = 3e-4 * float(wanted.abs().max()) if wanted.numel() else 0.0
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), wanted, atol=near, rtol=0)
    x = torch.randn(12, 80, generator=generator)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    made = int8.two_byte_linear(x, weight, scale)
    assert not made[1:3].isfinite().any() and made[3:].isfinite().all() and made[0].isfinite().all()


def exact_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The formula with sums in float64: x rounded row by row to 127 steps, whole products, scales, bias."""
    step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    made = (x.float() / step).round().double() @ weight.double().T * step.double() * scale.double().flatten()
    return made if bias is None else made + bias.double()


@pytest.mark.parametrize("why", ["", "products of 8 bits overflow"])
@torch.inference_mode()
def test_8_bit_products_are_the_formula(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if not why and int8.why_not():
        pytest.skip(f"this CPU is not asked: {int8.why_not()}")
    monkeypatch.setattr(int8, "why_not", lambda: why)
    monkeypatch.setattr(int8, "LEAST_ROWS", 3)
    monkeypatch.setattr(int8, "NEAR_BYTES", 1)
    whole = torch.randn(40, 48)
    weight, scale = int8.rounded(whole)
    assert weight.dtype == torch.int8 and weight.abs().amax() == 127
    assert (weight * scale - whole).abs().max() <= scale.max() / 1.99
    given = torch.randn(2, 7, 96) * torch.logspace(-3, 3, 7)[:, None]
    given[0, 0] = 0
    for x in (given[..., :48], given[..., ::2], given[0, 0, :48], given[:0, :, :48]):
        for bias, its in ((torch.randn(40), scale), (None, torch.tensor(0.02))):
            made = int8.int8_linear(x, weight, its, bias)
            torch.testing.assert_close(made.double(), exact_int8(x, weight, its, bias), rtol=1e-4, atol=1e-5)
    column = int8.int8_linear(given[..., :1], *int8.rounded(whole[:, :1]))
    expected = exact_int8(given[..., :1], *int8.rounded(whole[:, :1]), None)
    torch.testing.assert_close(column.double(), expected, rtol=1e-4, atol=1e-5)
    half = int8.int8_linear(given[..., :48].bfloat16(), weight, scale)
    assert half.dtype == torch.bfloat16
    expected = exact_int8(given[..., :48].bfloat16(), weight, scale, None)
    torch.testing.assert_close(half.double(), expected, rtol=1e-2, atol=1e-3)
    wanted = int8.int8_linear(given[..., :48], weight, scale)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(int8.int8_linear(given[..., :48], weight, scale), wanted), "whatever the default is"
    finally:
        torch.set_default_dtype(torch.float32)
    broken = given[..., :48].clone()
    broken[1, 2, 3] = torch.nan
    made = int8.int8_linear(broken, weight, scale)
    assert made[1, 2].isnan().all() and made.isfinite().all(-1).sum() == 13, "a row that is broken shows, and no other"


def test_an_8_bit_layers_operator_is_there_before_a_compiler_reads_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is made while a graph is traced breaks it."""
    made: list[Any] = [int8._operator()]
    monkeypatch.setattr(int8, "_operator", lambda: made.append(None))
    layer = int8.Int8Linear(nn.Linear(16, 16))
    assert len(made) == 2
    layer(torch.ones(1, 16))
    assert len(made) == 2


@pytest.mark.parametrize("how", ["overflows", "slower", "missing", "faster"])
def test_8_bits_are_used_only_where_they_are_right_and_faster(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if how == "missing":
            raise RuntimeError("not implemented\nfor this")
        pairs = (rows.float()[:, None, :] * weight.T.float()[None]).unflatten(-1, (-1, 2)).sum(-1)
        return (pairs.clamp(-20000, 20000) if how == "overflows" else pairs).sum(-1).int()

    monkeypatch.setattr(int8, "TRIED_SIDE", 64)
    monkeypatch.setattr(torch, "_int_mm", multiply)
    times = iter((1.0, 0.9) if how == "slower" else (1.0, 0.3))
    monkeypatch.setattr(int8, "fastest", lambda work: next(times))
    reason = int8.why_not.__wrapped__()
    expected = {"overflows": "overflow", "slower": "no faster", "missing": "(not implemented)", "faster": ""}[how]
    assert expected in reason and bool(reason) == bool(expected)
