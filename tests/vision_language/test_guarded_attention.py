"""Where torch's kernels answer wrongly: masks on Metal and of shared keys (emulated), single queries and large masks on NVIDIA,
few keys on Intel."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath.attention import token_attention, torch_backends
from hotpath.attention.metal import FEW_QUERIES, readable_mask
from hotpath.attention.reference import attention_reference
from hotpath.attention.torch_backends import sdpa
from hotpath.demo.captioner_model import write_folder
from hotpath.vision_language import decode_attention, guarded_attention
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
    guarded_attention.take_over(model.network, guarded_attention.on_metal)
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


@pytest.mark.parametrize(
    ("capability", "guarded"), [((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_cudnn_serves_no_single_query_where_it_is_wrong(load, monkeypatch, capability, guarded):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    torch_backends.misled_by_cudnn.cache_clear()
    try:
        attend, note = guarded_attention.guard(card)
        assert attend is (guarded_attention.without_cudnn if guarded else None) and ("cuDNN" in note) == guarded
        monkeypatch.setattr(decode_attention, "why_not", lambda *_: "no kernel")
        plain = decode_attention.EFFICIENT if guarded else decode_attention.TORCH
        assert decode_attention.choose((1, 2, 4, 16), 512, card, torch.float32) == (plain, "no kernel")
    finally:
        torch_backends.misled_by_cudnn.cache_clear()
    assert guarded_attention.guard(torch.device("mps")) == (guarded_attention.on_metal, "")
    if attend is None:
        return
    model, options = load("qwen3_vl"), AnswerOptions(8, decode="plain")
    wanted = [made.raw for made in answer(model, QUESTIONS, GREEDY, options)]
    allowed: list[bool] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, *others: Any, **settings: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return inner(query, *others, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    guarded_attention.take_over(model.network, attend)
    assert [made.raw for made in answer(model, QUESTIONS, GREEDY, options)] == wanted
    assert True in allowed and False in allowed and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def memory_efficient_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVIDIA's cards take for masks: of heads that are one in memory, a query that is alone in its block reads past its
    mask; and 32 bits count the mask's numbers."""
    plain: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        if attn_mask is None:
            return plain(query, key, value, **settings)
        rows, keys = query.shape[2], key.shape[2]
        mask = attn_mask.expand(*query.shape[:-1], keys).clone()
        if key.shape[1] > 1 and key.stride(1) == 0 and rows % 32 == 1:
            mask[:, 1:, -1] = True if mask.dtype == torch.bool else 0
        read = torch.arange(rows) % max(1, torch_backends.LARGEST_MASK // keys)
        return plain(query, key, value, attn_mask=mask[:, :, read], **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("queries", [1, 32, 33, 40])
@pytest.mark.parametrize("numbers", [False, True])
def test_masks_of_keys_that_all_heads_share(memory_efficient_kernel, queries, numbers):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 1, 48, 8), torch.randn(2, 1, 48, 8)
    seen = torch.rand(2, 1, queries, 48) < 0.5
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if numbers else seen
    wanted = attention_reference(q, k, v, mask, 0.4)
    spread = k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)
    torch.testing.assert_close(sdpa(q, *spread, mask, 0.4), wanted)
    for attend in (guarded_attention.with_one_key_head, guarded_attention.without_cudnn):
        module = SimpleNamespace(num_key_value_groups=4, is_causal=True)
        made, _ = attend(module, q, k, v, mask, scaling=0.4)
        torch.testing.assert_close(made.transpose(1, 2), wanted)
        made, _ = attend(module, q, *spread, None, scaling=0.4, is_causal=False)
        torch.testing.assert_close(made.transpose(1, 2), attention_reference(q, k, v, None, 0.4))


@pytest.mark.parametrize("heads", [1, 2])
def test_networks_whose_heads_share_a_key_are_guarded(llm, load, memory_efficient_kernel, monkeypatch, heads):
    write_folder(llm / "shared", "qwen2", num_key_value_heads=heads)
    card, options = torch.device("cuda", 0), AnswerOptions(8, decode="plain")
    monkeypatch.setattr(guarded_attention, "misled_by_cudnn", lambda device: False)
    model = load("shared")
    attend, note = guarded_attention.guard(card, guarded_attention.one_key_head(model.network))
    assert attend is (guarded_attention.with_one_key_head if heads == 1 else None) and not note
    assert guarded_attention.guard(torch.device("cpu"), True) == (None, "")
    if attend is None:
        return
    singles = [answer(model, [question], GREEDY, options)[0].raw for question in QUESTIONS]
    shared: list[bool] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *others: Any, **settings: Any) -> Tensor:
        shared.append(settings.get("attn_mask") is not None and key.shape[1] > 1 and key.stride(1) == 0)
        return inner(query, key, *others, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    answer(model, QUESTIONS, GREEDY, options)
    assert True in shared, "the library alone spreads the key head"
    shared.clear()
    guarded_attention.take_over(model.network, attend)
    assert [made.raw for made in answer(model, QUESTIONS, GREEDY, options)] == singles and not any(shared)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 30, 20), (2, 3, 30, 20), (1, 1, 1, 20), (2, 1, 4, 20)])
def test_masks_that_32_bits_do_not_count_are_cut(memory_efficient_kernel, monkeypatch, shape, numbers):
    monkeypatch.setattr(torch_backends, "LARGEST_MASK", 320)
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, shape[2] if shape[2] > 1 else 7, 8), torch.randn(2, 3, 20, 8)
    seen = torch.rand(shape) < 0.5
    mask = torch.zeros(shape).masked_fill(~seen, -torch.inf) if numbers else seen
    torch.testing.assert_close(sdpa(q, k, k, mask, None), attention_reference(q, k, k, mask, None))


def test_a_mask_has_the_dtype_of_its_queries(monkeypatch):
    """cuDNN reads others as if they had."""
    given: list[torch.dtype] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **settings: Any) -> Tensor:
        given.append(attn_mask.dtype)
        return plain(query, key, value, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    mask = torch.zeros(1, 1, 3, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        q, k = torch.randn(1, 2, 3, 8, dtype=dtype), torch.randn(1, 2, 5, 8, dtype=dtype)
        assert torch.equal(sdpa(q, k, k, mask, None), plain(q, k, k, attn_mask=mask.to(dtype)))
    assert given == [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_few_keys_by_products_are_torchs_attention(dtype):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 50, 24, dtype=dtype),
        torch.randn(2, 16, 24, dtype=dtype),
        torch.randn(2, 16, 24, dtype=dtype),
    )
    made, wanted = (attend(q, k, v, 3) for attend in (token_attention.by_products, token_attention.scaled_dot_product))
    torch.testing.assert_close(made, wanted, atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=1e-3)
