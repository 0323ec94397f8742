"""Lossy attention libraries, with modules that behave as the published ones, and what they may not do."""

from __future__ import annotations

import functools
import logging
import sys

import pytest
import sage_modules
import torch
from attention_calls import BLACKWELL, CPU, HOPPER, biased, cosine, masks, qkv, with_library
from hotpath.attention import dispatch
from hotpath.attention.dispatch import (
    AttentionPolicy,
    AttentionUnavailable,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.quantized_backends import within_float16
from hotpath.attention.reference import attention_reference
from hotpath.attention.torch_backends import sdpa


@pytest.fixture
def sage(monkeypatch):
    return functools.partial(with_library, monkeypatch)


def test_sage_1_leaves_the_keys_alone_and_smooths_them(sage):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = biased()
    before = k.clone()
    out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True), record=log)
    assert torch.equal(k, before)
    expected = attention_reference(q, k, v)
    rough = sys.modules["sageattention"].sageattn(q, k, v, smooth_k=False)
    assert (out - expected).norm() < 0.5 * (rough - expected).norm()
    assert [event.used for event in log.events()] == ["sage1"]
    # The trap itself, as the library has it.
    sys.modules["sageattention"].sageattn(q, k, v)
    assert not torch.equal(k, before)


def test_sage_1_never_gets_a_mask(sage):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    mask = masks()["bool"]
    out = dispatcher.attend(q, k, v, mask, policy=AttentionPolicy("sage1"), record=log)
    assert cosine(out, attention_reference(q, k, v, mask)) > 0.9999
    ((event, _),) = log.events().items()
    assert event.used == "sdpa" and "takes no mask" in event.reason
    swallowed = sys.modules["sageattention"].sageattn(q, k.clone(), v, attn_mask=mask)
    assert cosine(swallowed, attention_reference(q, k, v, mask)) < 0.99
    with pytest.raises(AttentionUnavailable, match=r"sage1 cannot compute.*bool mask"):
        dispatcher.attend(q, k, v, mask, policy=AttentionPolicy("sage1", strict=True))


@pytest.mark.parametrize(("width", "used"), [(64, "sage1"), (96, "sage1"), (128, "sage1"), (72, "sdpa"), (40, "sdpa")])
def test_sage_1_has_three_head_sizes(sage, width, used):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    dispatcher.attend(*qkv(width=width, dtype=torch.float16), policy=AttentionPolicy("sage1"), record=log)
    assert [event.used for event in log.events()] == [used]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_float16_survive_sage_1(sage, dtype):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=dtype)
    v = v * 1e5
    assert not torch.isfinite(sys.modules["sageattention"].sageattn(q, k.clone(), v)).all()
    out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True), record=log)
    assert cosine(out, attention_reference(q, k, v)) > 0.999
    small, factor = within_float16(v / 1e5)
    assert torch.equal(small, v / 1e5) and float(factor) == 1


def test_sage_2_uses_the_kernel_that_takes_masks(sage):
    dispatcher, log = sage(sage_modules.sage2()), AttentionLog()
    q, k, v = qkv(dtype=torch.bfloat16)
    for mask in (None, masks()["bool"], masks(dtype=torch.bfloat16)["float"]):
        out = dispatcher.attend(q, k, v, mask, policy=AttentionPolicy("sage", strict=True), record=log)
        assert cosine(out, attention_reference(q, k, v, mask)) > 0.999
    assert {event.used for event in log.events()} == {"sage2"}
    older = sage(sage_modules.sage2(masks=False))
    with pytest.raises(AttentionUnavailable, match="this release of sageattention takes no mask"):
        older.attend(q, k, v, masks()["bool"], policy=AttentionPolicy("sage2", strict=True))
    newest = sage(sage_modules.sage2(), device=BLACKWELL)
    with pytest.raises(AttentionUnavailable, match="compute capability 12"):
        newest.attend(q, k, v, masks()["bool"], policy=AttentionPolicy("sage2", strict=True))


def test_sage_3_gets_its_own_keys_and_the_scale(sage):
    dispatcher = sage(sage_modules.sage3(), device=BLACKWELL)
    q, k, v = biased()
    before = k.clone()
    out = dispatcher.attend(q, k, v, scale=0.05, policy=AttentionPolicy("sage3", strict=True))
    assert torch.equal(k, before) and cosine(out, attention_reference(q, k, v, None, 0.05)) > 0.999


@pytest.mark.parametrize("name", ["sage1", "sage2", "sage3"])
def test_sage_runs_on_the_device_of_its_tensors_and_leaves_the_callers(sage, monkeypatch, name):
    """Triton launches on the current device, and SageAttention 2 sets it."""
    from contextlib import contextmanager

    current = ["the caller's"]

    @contextmanager
    def on_device(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr("hotpath.attention.quantized_backends.on_device", on_device)
    module = getattr(sage_modules, name)()
    dispatcher = sage(module, device=BLACKWELL if name == "sage3" else HOPPER)
    called = next(key for key in ("sageattn", "sageattn3_blackwell") if hasattr(module, key))
    real, seen = getattr(module, called), []

    def library(q, *args, **kwargs):
        seen.append(current[0])
        current[0] = "left behind"
        return real(q, *args, **kwargs)

    monkeypatch.setattr(module, called, library)
    dispatcher.attend(*qkv(dtype=torch.float16), policy=AttentionPolicy(name, strict=True))
    assert seen == [CPU] and current == ["the caller's"]


def test_the_order_of_sage(sage, monkeypatch):
    q, k, v = qkv(dtype=torch.bfloat16)
    policy = AttentionPolicy("sage")

    def used(dispatcher):
        log = AttentionLog()
        dispatcher.attend(q, k, v, policy=policy, record=log)
        ((event, _),) = log.events().items()
        return event.used, event.reason

    assert used(sage(sage_modules.sage2()))[0] == "sage2"
    name, reason = used(sage(sage_modules.sage1()))
    assert name == "sage1" and "sage2: the installed sageattention is generation 1" in reason
    assert "comfy_kitchen_int8" in reason
    kitchen = sage_modules.sage1()
    kitchen.__name__ = "comfy_kitchen"
    kitchen.int8_attention_is_available = lambda: True
    kitchen.int8_attention = lambda q, k, v, scale, attn_mask: sdpa(q, k, v, attn_mask, scale)
    dispatcher = sage(sage_modules.sage1())
    monkeypatch.setitem(sys.modules, "comfy_kitchen", kitchen)
    assert used(dispatcher)[0] == "comfy_kitchen_int8"
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    name, reason = used(sage(None))
    assert name == "sdpa" and reason.count("is not installed") == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda out: out * float("nan"), "not finite"), (lambda out: out.roll(1, 2), "cosine"), (torch.neg, "cosine")],
)
def test_a_lossy_kernel_that_is_wrong_is_off_with_one_message(sage, monkeypatch, caplog, damage, words):
    module = sage_modules.sage1()
    good = module.sageattn
    module.sageattn = lambda *a, **k: damage(good(*a, **k))
    dispatcher, log = sage(module), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1"), record=log)
    assert cosine(out, attention_reference(q, k, v)) > 0.9999
    assert (
        len(caplog.records) == 1 and words in caplog.text and "sage1 is off for 2 x 4 heads x 70 by 90" in caplog.text
    )
    ((event, count),) = log.events().items()
    assert (event.used, count) == ("sdpa", 3) and words in event.reason
    with pytest.raises(AttentionUnavailable, match=words):
        dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True))


def test_a_lossy_kernel_is_checked_once_per_signature(sage, monkeypatch):
    checks = []
    monkeypatch.setattr(dispatch, "fault", lambda *a: checks.append(a[0].shape))
    dispatcher = sage(sage_modules.sage1())
    for queries in (70, 70, 71, 70):
        dispatcher.attend(*qkv(queries=queries, dtype=torch.float16), policy=AttentionPolicy("sage1"))
    assert [shape[2] for shape in checks] == [70, 71]


def test_a_check_without_memory_does_not_cost_the_result(sage, monkeypatch, caplog):
    answers = [torch.OutOfMemoryError("no room for the check"), torch.OutOfMemoryError("still none"), None]

    def fault(*_):
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(dispatch, "fault", fault)
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    with caplog.at_level(logging.INFO):
        for _ in range(4):  # checked as soon as there is memory, and then no more
            out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True), record=log)
            assert cosine(out, attention_reference(q, k, v)) > 0.999
    assert not answers and [event.used for event in log.events()] == ["sage1"]
    assert caplog.text.count("sage1 was not checked for 2 x 4 heads x 70 by 90") == 2


def test_a_call_that_needs_full_precision_gets_it(sage):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    dispatcher.attend(q, k, v, policy=AttentionPolicy("sage", strict=True), record=log, exact=True)
    ((event, _),) = log.events().items()
    assert event.used == "sdpa" and "full precision" in event.reason
