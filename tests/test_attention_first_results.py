"""Kernels whose compiler made wrong code are found by their first result."""

from __future__ import annotations

import functools

import pytest
import torch
from hotpath.attention import first_results, token_attention
from torch import Tensor


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is captured, to be set."""
    capturing = [False]
    monkeypatch.setattr(first_results, "_compared", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    return capturing


def test_what_is_far_from_plain_torch_is_told(nothing_compared: list[bool]) -> None:
    torch.manual_seed(0)
    text, added = torch.randn(2, 30, 16), 0.01 * torch.randn(2, 30, 16)

    def compare(made: Tensor, kind: str, tokens: Tensor = added) -> None:
        first_results.compare(made.half(), (kind,), lambda: (text + tokens, text))

    compare(text + added, "right")
    compare(text * torch.nan, "right")  # what is known to be right is not looked at again
    for wrong in (text, text + 1.5 * added, torch.zeros_like(text), text * torch.nan):
        with pytest.raises(ArithmeticError, match="of its size from plain torch's"):
            compare(wrong, "wrong")
    compare(text, "numbers that say nothing", added * torch.nan)
    compare(text, "nothing added", 0 * added)
    nothing_compared[0] = True
    compare(text * torch.nan, "while a graph is captured, in which nobody may wait")
    assert first_results._compared == {("right",), ("nothing added",)}


def test_memory_that_is_short_for_the_reference_is_no_fault_of_the_kernel() -> None:
    def reference() -> tuple[Tensor, None]:
        raise torch.OutOfMemoryError

    first_results.compare(torch.zeros(1), ("x",), reference)
    assert not first_results._compared


def test_tokens_go_on_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("hotpath.attention.token_attention_kernel", exc_type=ImportError)
    torch.manual_seed(0)
    q, out, keys, values = torch.randn(2, 9, 32), torch.randn(2, 9, 32), torch.randn(3, 4, 32), torch.randn(3, 4, 32)
    rows, weights = torch.tensor([[0, 2]], dtype=torch.int32), torch.ones(1, 2)
    given = (q, out, keys, values, rows, weights, 2)
    wanted = token_attention.attend_tokens_reference(*given)
    monkeypatch.setattr(token_attention, "_failed", {})
    monkeypatch.setattr(token_attention, "why_not_fused", functools.cache(lambda *_: ""))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(
        kernel, "attend_tokens_fused", lambda *given: token_attention.attend_tokens_reference(*given[:8])
    )
    assert torch.equal(token_attention.attend_tokens(*given), wanted) and not token_attention._failed
    monkeypatch.setattr(first_results, "_compared", set())
    monkeypatch.setattr(kernel, "attend_tokens_fused", lambda q, out, *_: out)
    assert torch.equal(token_attention.attend_tokens(*given), wanted)
    assert "from plain torch's" in token_attention._failed[q.device]
