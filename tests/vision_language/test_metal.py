"""Batches on Metal: with torch's kernels as its releases have them there, emulated on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotpath.attention.metal import FEW_QUERIES, readable_mask
from hotpath.attention.reference import attention_reference
from hotpath.attention.torch_backends import sdpa
from hotpath.vision_language import metal_attention
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from torch import Tensor

GREEDY = Sampling(sample=False)
QUESTIONS = [
    Question("Name every colour that you see in it, and where it is."),
    Question("Why?"),
    Question("Is this longer?", "Be brief."),
]


@pytest.fixture
def kernels_of_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few queries: a mask is walked over by its heads. Of others: a query that sees nothing is NaN."""
    plain: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        if attn_mask is None:
            return plain(query, key, value, **settings)
        mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        if query.shape[-2] > FEW_QUERIES:
            made = plain(query, key, value, attn_mask=mask, **settings)
            seen = mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask.isfinite().any(-1, keepdim=True)
            return made.masked_fill(~seen, torch.nan)
        step = mask.stride(1) if mask.shape[1] > 1 else 0
        rows = mask.shape[0] * mask.shape[1]
        within, at = mask[0, 0], mask.storage_offset()
        walked = mask.as_strided((rows, *within.shape), (step, *within.stride()), at).view(mask.shape)
        return plain(query, key, value, attn_mask=walked, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2"])
def test_a_padded_batch_is_its_questions_one_by_one(load, kernels_of_metal, kind):
    model = load(kind)
    options = AnswerOptions(8, decode="plain")
    singles = [answer(model, [question], GREEDY, options)[0].raw for question in QUESTIONS]

    def together() -> list[str]:
        return [made.raw for made in answer(model, QUESTIONS, GREEDY, options)]

    assert together() != singles, "torch alone misreads it"
    metal_attention.take_over(model.network)
    assert together() == singles
    assert [answer(model, [question], GREEDY, options)[0].raw for question in QUESTIONS] == singles


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, FEW_QUERIES, 20])
def test_masks_mean_what_they_meant(queries, heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, queries, 8), torch.randn(3, heads, 24, 8), torch.randn(3, heads, 24, 8)
    mask = torch.rand(3, 1, queries, 24) < 0.5
    mask[..., 0] = True
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), mask[:1], None):
        read = readable_mask(q, given)
        torch.testing.assert_close(sdpa(q, k, v, read, None), attention_reference(q, k, v, given, None))
    mask[1, :, 0] = False
    assert readable_mask(q, mask).any(-1).all() and readable_mask(q, mask[:, 0]) is not None
