"""The window attention's three ways, the memory read and the best match: all equal to their definitions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hotpath.attention import best_match as matching
from hotpath.attention import correlation_sampler, first_results, local_window, topk_memory
from torch import Tensor
from triton_interpreter import interpret

SHAPES = [(2, 8, 5, 7, 20, 5), (1, 64, 9, 20, 40, 15), (3, 16, 17, 33, 24, 15), (1, 4, 1, 1, 6, 15)]


def window_inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    frames, channels, height, width, values, window = shape
    random = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    query, key = noise(frames, channels, height, width), noise(1, channels, height, width)
    bias = noise(frames, window * window, height, width)
    return query, key, noise(1, values, height, width), bias, window


@pytest.mark.parametrize("shape", SHAPES)
def test_banded_equals_definition(shape: tuple[int, ...]) -> None:
    inputs = window_inputs(shape)
    expected = local_window.local_window_reference(*inputs)
    torch.testing.assert_close(local_window.local_window_banded(*inputs), expected, atol=2e-5, rtol=0)


def test_definition_is_attention_over_the_window() -> None:
    query, key, value, bias, window = window_inputs((1, 3, 4, 5, 2, 3))
    out = local_window.local_window_reference(query, key, value, bias, window)
    # Place (0, 4), a corner: four of the nine places exist.
    places = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if 0 <= dy <= 3 and 0 <= 4 + dx <= 4]
    logits = torch.stack(
        [query[0, :, 0, 4] @ key[0, :, dy, 4 + dx] + bias[0, (dy + 1) * 3 + dx + 1, 0, 4] for dy, dx in places]
    )
    expected = sum(w * value[0, :, dy, 4 + dx] for w, (dy, dx) in zip(logits.softmax(0), places, strict=True))
    assert len(places) == 4
    torch.testing.assert_close(out[0, :, 0, 4], expected)


def test_half_precision_values_keep_float32_weights() -> None:
    query, key, value, bias, window = window_inputs((1, 8, 6, 9, 16, 5))
    half = local_window.local_window_banded(query, key, value.bfloat16(), bias, window)
    full = local_window.local_window_banded(query, key, value, bias, window)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0)


def test_gradients_take_the_definition() -> None:
    query, key, value, bias, window = window_inputs((1, 4, 3, 4, 5, 3))
    query.requires_grad_(True)
    local_window.local_window_attention(query, key, value, bias, window).sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0


def test_choice_names_its_reason() -> None:
    _, reason = local_window.select_local_window(torch.device("cpu"))
    assert reason == "banded: the fused kernel needs CUDA, this is cpu"


def test_a_kernel_that_is_compiled_wrong_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_results, "_compared", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    inputs = window_inputs(SHAPES[0])
    wanted = local_window.local_window_reference(*inputs)
    monkeypatch.setattr(local_window, "_failed", {})
    monkeypatch.setattr(local_window, "triton_unavailable", lambda device: None)
    monkeypatch.setattr(local_window, "local_window_triton", local_window.local_window_reference)
    assert torch.equal(local_window.local_window_attention(*inputs), wanted) and not local_window._failed
    monkeypatch.setattr(first_results, "_compared", set())
    monkeypatch.setattr(local_window, "local_window_triton", lambda *given: torch.zeros_like(wanted))
    torch.testing.assert_close(local_window.local_window_attention(*inputs), wanted, atol=2e-5, rtol=0)
    chosen, reason = local_window.select_local_window(inputs[0].device)
    assert chosen is local_window.local_window_banded and "from plain torch's" in reason


def test_a_kernel_that_cannot_be_built_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per device, with its reason; memory that is short is for the caller, who halves the batch."""
    inputs = window_inputs(SHAPES[0])
    tries: list[Exception] = []

    def raises(error: Exception) -> None:
        def kernel(*_: object) -> Tensor:
            tries.append(error)
            raise error

        monkeypatch.setattr(local_window, "local_window_triton", kernel)

    monkeypatch.setattr(local_window, "_failed", {})
    monkeypatch.setattr(local_window, "triton_unavailable", lambda device: None)
    raises(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        local_window.local_window_attention(*inputs)
    raises(RuntimeError("Failed to find C compiler.\nPlease specify via CC"))
    for _ in range(2):
        out = local_window.local_window_attention(*inputs)
        torch.testing.assert_close(out, local_window.local_window_reference(*inputs), atol=2e-5, rtol=0)
    assert len(tries) == 2
    chosen, reason = local_window.select_local_window(torch.device("cpu"))
    assert chosen is local_window.local_window_banded
    assert (
        reason
        == "banded: the fused kernel failed on cpu (RuntimeError: Failed to find C compiler. Please specify via CC)"
    )


class Unfolded:
    """spatial-correlation-sampler's formula, without its kernel."""

    def spatial_correlation_sample(self, query: Tensor, key: Tensor, patch_size: int) -> Tensor:
        frames, channels, height, width = key.shape
        keys = torch.nn.functional.unfold(key, patch_size, padding=patch_size // 2)
        keys = keys.view(frames, channels, patch_size, patch_size, height, width)
        return (query[:, :, None, None] * keys).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("library", ["its formula", "installed"])
def test_sampler_equals_definition(shape: tuple[int, ...], library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "installed":
        pytest.importorskip("spatial_correlation_sampler", reason="optional, and has to be compiled")
    else:
        monkeypatch.setattr(correlation_sampler, "_library", lambda: Unfolded().spatial_correlation_sample)
    query, key, value, bias, window = window_inputs(shape)
    out = local_window.local_window_attention(query, key, value, bias, window, local_window.SAMPLER)
    expected = local_window.local_window_reference(query, key, value, bias, window)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    _, reason = local_window.select_local_window(query.device, query.dtype, local_window.SAMPLER)
    assert reason == "spatial_correlation_sampler: asked for"


def test_sampler_is_kept_from_what_would_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("the library must not be reached")

    monkeypatch.setattr(correlation_sampler, "_library", never)
    cpu = torch.device("cpu")
    for dtype in (torch.float16, torch.bfloat16):
        refusal = correlation_sampler.sampler_unavailable(cpu, dtype)
        assert refusal is not None and "on cpu it computes float32" in refusal
        chosen, reason = local_window.select_local_window(cpu, dtype, local_window.SAMPLER)
        assert chosen is local_window.local_window_banded and "not spatial_correlation_sampler: on cpu" in reason
    assert "this is mps" in str(correlation_sampler.sampler_unavailable(torch.device("mps"), torch.float32))


def test_sampler_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    correlation_sampler._library.cache_clear()
    monkeypatch.setitem(sys.modules, "spatial_correlation_sampler", None)
    chosen, reason = local_window.select_local_window(torch.device("cpu"), backend=local_window.SAMPLER)
    correlation_sampler._library.cache_clear()
    assert chosen is local_window.local_window_banded
    assert "it is not installed; `pip install spatial-correlation-sampler` compiles it" in reason
    with pytest.raises(ValueError, match="no local attention 'cudnn'"):
        local_window.select_local_window(torch.device("cpu"), backend="cudnn")


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
from test_attention_local_window import SHAPES, window_inputs
from hotpath.attention import local_window
for shape in [*SHAPES[:2], (2, 16, 3, 18, 24, 15)]:
    inputs = window_inputs(shape)
    out = local_window.local_window_triton(*inputs)
    worst = (out - local_window.local_window_reference(*inputs)).abs().max().item()
    assert worst < 2e-5, (shape, worst)
    assert out.isfinite().all()
print("equal")
"""


def test_kernel_equals_definition_in_the_interpreter() -> None:
    interpret(INTERPRETED, Path(__file__).parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (5, 64, 28, 49, 1024, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_definition_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, value, bias, window = window_inputs(shape)
    expected = local_window.local_window_reference(query, key, value, bias, window)
    on_gpu = [tensor.cuda() for tensor in (query, key, value.to(dtype), bias)]
    out = local_window.local_window_triton(on_gpu[0], on_gpu[1], on_gpu[2], on_gpu[3], window)
    tolerance = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(out.float().cpu(), expected, atol=tolerance, rtol=0)


def memory_inputs(queries: int, keys: int, channels: int = 16, values: int = 10) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(queries * 1000 + keys)
    query, key = torch.randn(queries, channels, generator=random), torch.randn(keys, channels, generator=random)
    selection = torch.rand(queries, channels, generator=random)
    shrinkage = 1 + torch.rand(keys, generator=random)
    return query, selection, key, shrinkage, torch.randn(keys, values, generator=random)


@pytest.mark.parametrize(("queries", "keys"), [(7, 5000), (130, 64), (33, 20), (1, 1)])
@pytest.mark.parametrize("similarities", [1 << 25, 4000, 1])
def test_tiled_memory_read_equals_definition(queries: int, keys: int, similarities: int) -> None:
    inputs = memory_inputs(queries, keys)
    tiled = topk_memory.read_top_k(*inputs, 30, similarities)
    expected = topk_memory.read_top_k_reference(*inputs, 30)
    torch.testing.assert_close(tiled.readout, expected.readout, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiled.usage, expected.usage, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiled.nearest, expected.nearest, atol=1e-5, rtol=1e-5)
    assert abs(tiled.usage.sum().item() - queries) < 1e-3
    with pytest.MonkeyPatch.context() as patched:
        # As on MPS, which has no embedding bags in older releases of torch.
        patched.setattr(topk_memory, "WITHOUT_BAGS", ("cpu",))
        patched.setattr(topk_memory.F, "embedding_bag", None)
        gathered = topk_memory.read_top_k(*inputs, 30, similarities)
    torch.testing.assert_close(gathered.readout, expected.readout, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [1, 31, 640, 641, 5003])
def test_highest_equals_topk(columns: int) -> None:
    scores = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    count = min(7, columns)
    values, index = topk_memory.highest(scores, count)
    expected = scores.topk(count, dim=1)
    assert torch.equal(values, expected.values) and torch.equal(index, expected.indices)


def test_far_keys_still_weigh_one() -> None:
    query, selection, key, shrinkage, values = memory_inputs(4, 50)
    reading = topk_memory.read_top_k(query, selection, key + 1000, shrinkage, values, 30)
    assert reading.readout.isfinite().all()
    assert abs(reading.usage.sum().item() - 4) < 1e-4


def test_empty_memory_is_refused() -> None:
    query, selection, key, shrinkage, values = memory_inputs(4, 5)
    with pytest.raises(ValueError, match="memory is empty"):
        topk_memory.read_top_k(query, selection, key[:0], shrinkage[:0], values[:0], 30)


def unit_rows(count: int, channels: int, seed: int) -> Tensor:
    rows = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("tiles", [(4096, 8192), (50, 70), (1, 1000)])
def test_tiled_match_equals_definition(tiles: tuple[int, int]) -> None:
    theta, phi = unit_rows(333, 32, 1), unit_rows(777, 32, 2)
    score, index = matching.best_match(theta, phi, *tiles)
    expected_score, expected_index = matching.best_match_reference(theta, phi)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(score, expected_score, atol=1e-6, rtol=0)


def near_ties() -> tuple[Tensor, Tensor]:
    """Products that differ by less than half precision resolves, and by far more than float32 does; rows of each length
    beside the kernels' blocks."""
    theta = unit_rows(70, 64, 3)
    phi = torch.cat([theta + 0.03 * unit_rows(70, 64, seed) for seed in (4, 5, 6)])
    return theta, phi / phi.norm(dim=1, keepdim=True)


def missed(theta: Tensor, phi: Tensor, index: Tensor) -> float:
    """How far the worst match lies under the best one."""
    products = theta.double() @ phi.double().T
    return (products.max(1).values - products.gather(1, index[:, None])[:, 0]).max().item()


def check_fused_match(device: str) -> None:
    """Where half precision alone is wrong, with equal keys of which the first counts, and in several runs of rows."""
    theta, phi = near_ties()
    naive = (theta.half() @ phi.half().T).float().argmax(1)
    assert missed(theta, phi, naive) > 1e-5, "half precision alone must be wrong here, or this proves nothing"
    score, index = (x.cpu() for x in matching.best_match_fused(theta.to(device), phi.to(device)))
    assert missed(theta, phi, index) < 1e-6
    torch.testing.assert_close(score, matching.best_match(theta, phi)[0], atol=2e-6, rtol=0)
    theta = unit_rows(3, 16, 7)
    phi = torch.cat([unit_rows(5, 16, 8), theta[:1].repeat(140, 1)])
    _, index = matching.best_match_fused(theta.to(device), phi.to(device))
    assert index[0] == 5 and torch.equal(index.cpu(), matching.best_match(theta, phi)[1])
    kept, matching.MAXIMA = matching.MAXIMA, 1
    theta, phi = unit_rows(200, 16, 1), unit_rows(130, 16, 2)
    _, index = matching.best_match_fused(theta.to(device), phi.to(device))
    matching.MAXIMA = kept
    assert torch.equal(index.cpu(), matching.best_match(theta, phi)[1])


INTERPRETED_MATCH = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from test_attention_local_window import check_fused_match
check_fused_match("cpu")
print("equal")
"""


def test_fused_match_is_exact_in_the_interpreter() -> None:
    interpret(INTERPRETED_MATCH, Path(__file__).parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fused_match_is_exact_on_the_gpu() -> None:
    check_fused_match("cuda")
    theta, phi = (unit_rows(5184, 256, seed).cuda() for seed in (1, 2))
    _, index = matching.best_match_fused(theta, phi)
    assert missed(theta.cpu(), phi.cpu(), index.cpu()) < 1e-6
    search = matching.MeasuredMatch()
    assert missed(theta.cpu(), phi.cpu(), search(theta, phi)[1].cpu()) < 1e-6
    assert "both exact" in search.status
