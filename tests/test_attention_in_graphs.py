"""Attention in compiled code: which kernels a graph holds, and what decides when it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sage_modules
import torch
from attention_calls import (
    AUTO,
    BY_NAME,
    HOPPER,
    biased,
    call,
    compiled_attention,
    cosine,
    masks,
    measured,
    qkv,
    with_library,
)
from hotpath.attention import compiled, dispatch
from hotpath.attention.capabilities import (
    BOOL_MASK,
)
from hotpath.attention.choice import Choice
from hotpath.attention.dispatch import (
    AttentionPolicy,
    AttentionUnavailable,
    attend,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.reference import attention_reference
from hotpath.attention.torch_backends import TORCH_BACKENDS, kernels_in_graphs

traces_kernels = pytest.mark.skipif(not kernels_in_graphs(), reason="torch 2.5 cannot trace the choice of a kernel")


def test_kernels_that_torch_cannot_trace_are_in_no_graph(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backends: None)  # as in torch 2.5
    assert not kernels_in_graphs()


@traces_kernels
@pytest.mark.parametrize("policy", ["auto", "sdpa_flash", "sdpa_math"])
def test_kernels_of_torch_stay_in_the_graph(policy):
    log = AttentionLog(policy)
    compiled.number_of(log)
    block = compiled_attention(policy, log)
    for mask in (None, masks()["bool"]):
        q, k, v = qkv()
        torch.testing.assert_close(block(q, k, v, mask), 2 * attention_reference(q, k, v, mask), atol=4e-5, rtol=0)
    assert log.calls == 0 and "compiled into a graph" in log.report()


def test_everything_else_is_one_operator_that_decides_when_it_runs(monkeypatch):
    dispatcher = with_library(monkeypatch, sage_modules.sage1())
    monkeypatch.setattr(dispatch, "dispatcher", lambda: dispatcher)
    log = AttentionLog("sage1")
    compiled.number_of(log)
    block = compiled_attention("sage1", log, dynamic=True)
    for queries in (70, 80, 96):
        q, k, v = biased(queries=queries)
        before = k.clone()
        out = block(q, k, v)
        assert torch.equal(k, before) and cosine(out, attention_reference(q, k, v)) > 0.999
    assert [event.used for event in log.events()] == ["sage1"] * 3, "counted when it runs, with the real sizes"


def test_no_graph_for_a_cpu_holds_flex():
    """Inductor's C++ of it does not compile where sizes are open, and with it the whole block would not."""
    log = AttentionLog("flex")
    number = compiled.number_of(log)
    asked = ("cpu", torch.float32, 0, 64, 64, "no mask", "flex")
    assert compiled.choose(*asked, False, True, number) == "sdpa"
    assert "flex: torch cannot compile it for a CPU where sizes are open" in log.report()
    assert compiled.choose(*asked, True, True, number) == "", "strict: the operator, which is flex or nothing"


def test_strict_in_a_graph_says_the_same_as_outside():
    block = compiled_attention("flash2", None)
    log = AttentionLog("flash2")

    def strict(q, k, v):
        return attend(q, k, v, policy=AttentionPolicy("flash2", strict=True), record=log)

    block = torch.compile(strict, backend="aot_eager", fullgraph=True)
    with pytest.raises(AttentionUnavailable, match="flash2 cannot compute"):
        block(*qkv())


@traces_kernels
def test_a_graph_takes_what_was_measured_before(monkeypatch):
    dispatcher, _ = measured(backends=list(TORCH_BACKENDS[1:]), device=HOPPER)
    dispatcher.choices.put(call(width=64, value_width=64), HOPPER, Choice("sdpa_cudnn", {"sdpa_cudnn": 1.0}))
    dispatcher.choices.put(
        call(width=64, value_width=64, queries=77, keys=77), HOPPER, Choice("sdpa_efficient", {"sdpa_efficient": 1.0})
    )
    asked = call(width=64, value_width=64, queries=16, keys=16)
    assert dispatcher.traced(asked, AUTO, False)[0] == "sdpa_cudnn"
    assert dispatcher.traced(replace(asked, mask=BOOL_MASK), AUTO, False) == (
        "sdpa",
        "nothing was measured before compiling, torch picks",
    )
    assert dispatcher.traced(asked, AttentionPolicy("sdpa_math"), False) == ("sdpa_math", "")


@traces_kernels
def test_a_graph_takes_the_fastest_that_it_can_hold():
    dispatcher, _ = measured(backends=[*TORCH_BACKENDS[1:]], device=HOPPER)
    times = {"sdpa_cudnn": 2.0, "sdpa_flash": 1.5, "flash3": 1.0}
    dispatcher.choices.put(call(), HOPPER, Choice("flash3", times))
    name, reason = dispatcher.traced(call(queries=16, keys=16), AUTO, False)
    assert name == "sdpa_flash" and "fastest of 2 that a graph can hold" in reason


@traces_kernels
def test_what_failed_at_one_size_is_in_no_graph_for_all_sizes():
    dispatcher, _ = measured(backends=[*TORCH_BACKENDS[1:]], device=HOPPER)
    dispatcher.choices.put(call(), HOPPER, Choice("sdpa_cudnn", {"sdpa_cudnn": 1.0, "sdpa_flash": 2.0}))
    asked = call(queries=16, keys=16)
    assert dispatcher.traced(asked, AUTO, False)[0] == "sdpa_cudnn"
    dispatcher._switch_off(BY_NAME["sdpa_cudnn"], call(keys=77), "it fails: no execution plan")
    assert dispatcher.traced(asked, AUTO, False)[0] == "sdpa_flash"
    name, reason = dispatcher.traced(asked, AttentionPolicy("sdpa_cudnn"), False)
    assert name == "sdpa_flash" and "no execution plan" in reason
    assert (
        dispatcher.traced(replace(asked, dtype=torch.float16), AttentionPolicy("sdpa_cudnn"), False)[0] == "sdpa_cudnn"
    )
