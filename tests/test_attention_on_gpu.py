"""Every attention backend on a real card: those that say they can, can."""

from __future__ import annotations

import pytest
import torch
from attention_calls import AUTO, BY_NAME, compiled_attention, flags, qkv
from hotpath.attention import dispatch
from hotpath.attention.capabilities import (
    AttentionCall,
)
from hotpath.attention.choice import MeasuredChoices
from hotpath.attention.dispatch import (
    AttentionDispatcher,
    AttentionPolicy,
    AttentionUnavailable,
    attend,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.reference import fault

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = {
    "z_image": {"batch": 1, "heads": 30, "queries": 4128, "keys": 4128, "width": 128},
    "sdxl_self": {"batch": 2, "heads": 10, "queries": 4096, "keys": 4096, "width": 64},
    "sdxl_cross": {"batch": 2, "heads": 20, "queries": 1024, "keys": 77, "width": 64},
    "shared": {"batch": 1, "heads": 16, "key_heads": 8, "queries": 1024, "keys": 1000, "width": 128},
    "unequal": {"batch": 1, "heads": 8, "queries": 512, "keys": 512, "width": 64, "value_width": 128},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(BY_NAME))
class TestOnCUDA:
    pytestmark = gpu

    def test_backend(self, name, shape, dtype):
        """Every backend that says it can, can; those that cannot say why, and nobody touches the caller's tensors."""
        device = torch.device("cuda")
        q, k, v = qkv(**SHAPES[shape], dtype=dtype, device=device)
        dispatcher = dispatch.AttentionDispatcher()
        for mask in (None, torch.rand(1, 1, q.shape[2], k.shape[2], device=device) > 0.3):
            before = [x.clone() for x in (q, k, v)]
            refusal = BY_NAME[name].refusal(AttentionCall.of(q, k, v, mask), dispatch.device_facts(device))
            if refusal is not None:
                with pytest.raises(AttentionUnavailable):
                    dispatcher.attend(q, k, v, mask, policy=AttentionPolicy(name, strict=True))
                continue
            out = dispatcher.attend(q, k, v, mask, policy=AttentionPolicy(name, strict=True))
            assert fault(out, q, k, v, mask, None, 0.9999 if BY_NAME[name].exact else 0.999) is None
            assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


class TestAutoOnCUDA:
    pytestmark = gpu

    @pytest.mark.parametrize("shape", SHAPES)
    def test_auto_measures_and_agrees(self, shape, tmp_path):
        q, k, v = qkv(**SHAPES[shape], dtype=torch.bfloat16, device=torch.device("cuda"))
        dispatcher, log = AttentionDispatcher(choices=MeasuredChoices(tmp_path)), AttentionLog()
        before = flags()
        out = dispatcher.attend(q, k, v, policy=AUTO, record=log)
        assert fault(out, q, k, v, None, None, 0.9999) is None and flags() == before
        facts = dispatch.device_facts(q.device)
        able = [n for n in dispatch.AUTO if BY_NAME[n].refusal(AttentionCall.of(q, k, v, None), facts) is None]
        assert len(able) < 2 or dispatcher.choices.get(AttentionCall.of(q, k, v, None), facts) is not None

    def test_in_a_cuda_graph(self):
        q, k, v = qkv(**SHAPES["sdxl_self"], dtype=torch.bfloat16, device=torch.device("cuda"))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            attend(q, k, v, policy=AUTO)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, k, v, policy=AUTO)
        graph.replay()
        torch.cuda.synchronize()
        assert fault(out, q, k, v, None, None, 0.9999) is None

    @pytest.mark.parametrize("policy", ["auto", "sage", "sdpa_cudnn"])
    def test_compiled_by_inductor(self, policy):
        block = compiled_attention(policy, None, "inductor", dynamic=None)
        for queries in (1024, 1100, 1200):
            q, k, v = qkv(1, 8, queries, queries, 128, torch.bfloat16, device=torch.device("cuda"))
            assert fault(block(q, k, v) / 2, q, k, v, None, None) is None


class TestRealSage:
    def test_the_traps_are_still_there(self):
        """What the adapters guard against, in the installed release; no GPU needed to look."""
        import inspect

        sageattention = pytest.importorskip("sageattention")
        parameters = inspect.signature(sageattention.sageattn).parameters
        assert "attn_mask" not in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not hasattr(sageattention, "sageattn_qk_int8_pv_fp16_cuda"):
            assert parameters["smooth_k"].default is True
            source = inspect.getsource(sageattention.sageattn)
            assert "k -= km" in source and "[64, 96, 128]" in source and "torch.float16" in source
            assert BY_NAME["sage1"].library() is None and "generation 1" in BY_NAME["sage2"].library()
