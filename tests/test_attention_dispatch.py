"""The attention dispatcher: the same numbers whatever computes them, what each backend can, and what is told."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from attention_calls import ADA, AUTO, BY_NAME, CPU, HOPPER, TURING, call, flags, masks, qkv
from hotpath.attention.capabilities import (
    BOOL_MASK,
    FLOAT_MASK,
    NO_MASK,
    OTHER_FLOAT_MASK,
    AttentionCall,
    DeviceFacts,
)
from hotpath.attention.dispatch import (
    AttentionDispatcher,
    AttentionPolicy,
    attend,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.reference import PRODUCTS, attention_reference, fault

# --- the same numbers whatever computes them -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "sdpa", "sdpa_math", "sdpa_flash", "flex", "sage", "flash2"])
@pytest.mark.parametrize("mask", [None, "bool", "keys only", "per sample", "per head", "float"])
def test_every_policy_gives_the_definition(policy, mask):
    q, k, v = qkv()
    m = None if mask is None else masks()[mask]
    before = [x.clone() for x in (q, k, v)]
    out = attend(q, k, v, m, policy=AttentionPolicy(policy))
    torch.testing.assert_close(out, attention_reference(q, k, v, m), atol=2e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.float16, torch.float32, torch.float64])
def test_masks_of_another_dtype(dtype, kept):
    q, k, v = qkv(dtype=dtype)
    mask = masks()["float"].to(kept)
    out = attend(q, k, v, mask, policy=AttentionPolicy("sdpa"))
    torch.testing.assert_close(out.float(), attention_reference(q, k, v, mask), atol=2e-5, rtol=0)


@pytest.mark.parametrize("policy", ["auto", "sdpa_math", "flex"])
def test_shared_heads_unequal_widths_scale_and_layout(policy):
    q, k, v = qkv(key_heads=2, value_width=48)
    expected = attention_reference(q, k, v, None, 0.2)
    out = attend(q, k, v, scale=0.2, policy=AttentionPolicy(policy))
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    turned = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.2, layout="NHD", policy=AttentionPolicy(policy)
    )
    torch.testing.assert_close(turned.transpose(1, 2), expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="BHND"):
        attend(q, k, v, layout="BHND", policy=AUTO)
    with pytest.raises(ValueError, match="no attention backend"):
        AttentionPolicy("fastest")


def test_gradients_flow_through_auto():
    q, k, v = (x.requires_grad_() for x in qkv())
    attend(q, k, v, policy=AUTO).square().sum().backward()
    a = q.grad.clone()
    q.grad = None
    attention_reference(q, k, v).square().sum().backward()
    torch.testing.assert_close(a, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", ["auto", "sdpa_flash", "sdpa_math"])
def test_what_one_signature_covers_is_computed_whatever_its_layout(policy):
    """A kernel that ran for one layout in memory may refuse another, and a signature does not tell them apart."""
    q, k, v = qkv()
    mask = masks()["per head"]
    expected, masked = attention_reference(q, k, v), attention_reference(q, k, v, mask[0])
    for layout in (lambda x: x, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        out = attend(*map(layout, (q, k, v)), policy=AttentionPolicy(policy))
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    for shape in (mask[:1], mask[0]):
        out = attend(q, k, v, shape, policy=AttentionPolicy(policy))
        torch.testing.assert_close(out, masked, atol=2e-5, rtol=0)
    half = torch.randn(1, 1, 70, 90).half()
    out = attend(q, k, v, half, policy=AttentionPolicy(policy))
    torch.testing.assert_close(out, attention_reference(q, k, v, half), atol=2e-5, rtol=0)


# --- capability records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "changes", "words"),
    [
        ("sdpa_cudnn", HOPPER, {"width": 256, "value_width": 256}, None),
        ("sdpa_cudnn", ADA, {"width": 256, "value_width": 256}, "ends at 128"),
        ("sdpa_cudnn", HOPPER, {"width": 60, "value_width": 60}, "multiples of 8"),
        ("sdpa_cudnn", TURING, {}, "compute capability 8.0"),
        ("sdpa_flash", HOPPER, {"mask": BOOL_MASK}, "takes no mask"),
        ("sdpa_flash", HOPPER, {"dtype": torch.float32}, "float32"),
        ("sdpa_flash", DeviceFacts("cpu"), {"dtype": torch.float32, "mask": BOOL_MASK}, None),
        ("sdpa_flash", HOPPER, {"value_width": 64}, "equally wide"),
        ("sdpa_efficient", HOPPER, {"value_width": 64}, None),
        ("sdpa_efficient", TURING, {}, "bfloat16 needs"),
        ("sdpa_efficient", HOPPER, {"mask": OTHER_FLOAT_MASK}, "float mask of another dtype"),
        ("sdpa_math", DeviceFacts("mps"), {"mask": OTHER_FLOAT_MASK}, None),
        ("flash3", ADA, {}, "9.0"),
        ("sage3", HOPPER, {}, "12.0"),
        ("sage1", DeviceFacts("hip", "MI300"), {}, "this is hip"),
        ("xformers", DeviceFacts("cpu"), {}, "this is cpu"),
    ],
)
def test_capability_records(name, device, changes, words):
    refusal = BY_NAME[name].refusal(call(**changes), device)
    assert refusal is None if words is None else words in refusal


def test_a_missing_library_is_named_with_its_cure():
    reasons = AttentionDispatcher(device=lambda _: HOPPER).available(CPU)
    assert reasons["sdpa_cudnn"] is None
    for name, cure in (
        ("flash2", "pip install flash-attn"),
        ("flash3", "hopper"),
        ("xformers", "pip install xformers"),
    ):
        if reasons[name] is not None:
            assert cure in reasons[name]


def test_every_kind_of_call_is_in_the_log_once(caplog):
    log = AttentionLog("auto")
    with caplog.at_level(logging.INFO, "hotpath.attention"):
        for _ in range(2):
            log.begin()
            for queries in (5, 6, 5):
                AttentionDispatcher().attend(*qkv(1, 2, queries, 7, 8), policy=AUTO, record=log)
    said = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert len(said) == 2 and said[0].startswith("attention: auto asked for, 1 x 2 heads x 5 by 7")


def test_what_differs_in_a_signature():
    q, k, v = qkv(key_heads=2)
    kinds = [AttentionCall.of(q, k, v, m).mask for m in (None, masks()["bool"], masks()["float"])]
    assert kinds == [NO_MASK, BOOL_MASK, FLOAT_MASK]
    assert AttentionCall.of(q, k, v, masks()["float"].double()).mask == OTHER_FLOAT_MASK
    assert "4 over 2 heads" in AttentionCall.of(q, k, v, None).describe()


@pytest.mark.parametrize("masked", [False, True])
def test_a_check_of_many_tokens_takes_little_memory(masked):
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens = 1 << 16
    q, k, v = qkv(1, 4, tokens, tokens, 8, torch.bfloat16, key_heads=2)
    mask = torch.arange(tokens)[None, None, None] % 3 > 0 if masked else None
    checked = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                storage = out.untyped_storage()
                if all(storage.data_ptr() != x.untyped_storage().data_ptr() for x in (q, k, v, result)):
                    checked.append(storage.nbytes())
            return out

    result = torch.zeros_like(q)
    with Watched():
        assert "cosine" in fault(result, q, k, v, mask, None)
        assert fault(result.fill_(torch.nan), q, k, v, mask, None) == "its result has values that are not finite"
    assert max(checked) <= 4 * PRODUCTS  # float32; whole, q k^T of one head would be 16 GiB


def test_what_a_fault_is():
    q, k, v = qkv()
    mask = masks()["bool"].clone()
    mask[:, :, 5] = False
    out = attention_reference(q, k, v, mask)
    assert fault(out, q, k, v, mask, None) is None
    blind = out.clone()
    blind[:, :, 5] = 3.0
    assert fault(blind, q, k, v, mask, None) is None, "kernels differ where no key takes part"
    blind[:, :, 5] = float("nan")
    assert "not finite" in fault(blind, q, k, v, mask, None), "but NaN would spread"
    blind[:, :, 5] = 0.0
    blind[:, :, 6] = float("inf")
    assert "not finite" in fault(blind, q, k, v, mask, None)
    q[0, 0, 0, 0] = float("nan")
    assert fault(blind, q, k, v, mask, None) is None, "broken inputs prove nothing about a kernel"


def test_kernel_flags_are_restored_when_two_threads_overlap(monkeypatch):
    """The first to ask for a kernel is the first to leave: it would undo the other's, which would then undo to its."""
    before, q = flags(), qkv()
    real, waits = torch.nn.functional.scaled_dot_product_attention, iter((0.05, 0.15))

    def slow(*args, **kwargs):
        time.sleep(next(waits))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow)
    threads = [
        threading.Thread(target=lambda p=policy: attend(*q, policy=AttentionPolicy(p)))
        for policy in ("sdpa_flash", "sdpa_math")
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert flags() == before


def test_a_log_is_bounded_and_readable():
    log = AttentionLog("auto")
    assert "Nothing was sampled yet" in log.report()
    log.begin()
    assert "No call came here" in log.report()
    dispatcher = AttentionDispatcher()
    for queries in range(300):
        dispatcher.attend(*qkv(1, 1, queries + 1, 3, 8), policy=AUTO, record=log)
    assert log.calls == 300 and len(log.events()) == 256 and "44 calls of further sizes" in log.report()
    log.begin()
    assert log.calls == 0
