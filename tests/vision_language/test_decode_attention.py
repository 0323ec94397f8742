"""Attention of one new token over its cache: the kernel is the definition, and is chosen only where it wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hotpath.vision_language import decode_attention, decoding
from triton_interpreter import interpret

# (rows, key heads, queries of each, D, length, filled)
SHAPES = [(1, 2, 4, 32, 128, 0), (2, 1, 7, 24, 200, 150), (1, 1, 1, 64, 320, 64)]


def decode_inputs(shape, dtype):
    """Rows padded at their left by different lengths; what is not filled holds NaN."""
    rows, heads, groups, dim, length, last = shape
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(rows, heads, groups, dim, generator=generator).to(dtype)
    keys, values = (torch.randn(rows, heads, length, dim, generator=generator).to(dtype) for _ in range(2))
    bias = torch.full((rows, 1, 1, length), float("-inf"), dtype=dtype)
    for row in range(rows):
        bias[row, ..., min(last, 90 * row) : last + 1] = 0
    keys[:, :, last + 1 :] = values[:, :, last + 1 :] = float("nan")
    return q, keys, values, bias, torch.tensor([last])


def decode_expected(q, keys, values, bias, slot):
    wide = [part.double().nan_to_num() for part in (q, keys, values)]
    return decode_attention.attend_reference(*wide, bias.double(), slot)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
sys.path.insert(0, sys.argv[2])
from test_decode_attention import SHAPES, TOLERANCE, decode_expected, decode_inputs
from hotpath.vision_language.decode_attention_kernel import attend_filled
for shape in SHAPES:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, tolerance = decode_inputs(shape, dtype), TOLERANCE[dtype]
        torch.testing.assert_close(attend_filled(*inputs).double(), decode_expected(*inputs), atol=tolerance, rtol=tolerance)
print("equal")
"""


@pytest.mark.long  # answers on the simulated card go through them, too
def test_kernel_over_a_filled_cache_is_attention_in_the_interpreter():
    interpret(INTERPRETED, Path(__file__).parents[1], Path(__file__).parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 4, 128, 1536, 900), (16, 8, 4, 128, 1024, 1023)])
def test_kernel_over_a_filled_cache_is_attention_on_the_gpu(shape, dtype):
    inputs = decode_inputs(shape, dtype)
    made = decode_attention.attend_in_parts(*(part.cuda() for part in inputs))
    torch.testing.assert_close(
        made.double().cpu(), decode_expected(*inputs), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_choice_is_measured_and_told():
    name, why = decode_attention.choose((1, 8, 4, 128), 1536, torch.device("cuda"), torch.bfloat16)
    assert name in decode_attention.ATTEND and "fastest of 2" in why, why


def test_kernel_compiles_for_cards_that_are_not_here():
    """To machine code by way of Triton's own assembler; what it does there is for the tests on a card."""
    triton = pytest.importorskip("triton")
    from hotpath.vision_language import decode_attention_kernel as kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "GROUPS": 4,
        "PADDED_GROUPS": 16,
        "DIM": 128,
        "PADDED_DIM": 128,
        "BLOCK": 64,
        "STEPS": 2,
        "WIDEN": False,
    }
    types = dict.fromkeys(("Q", "KEYS", "VALUES", "BIAS"), "*bf16") | {"SLOT": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("SUMS", "MAXIMA", "SHARES"), "*fp32") | dict.fromkeys(("heads", "length", "parts"), "i32")
    source = ASTSource(kernel._attend_part, types | dict.fromkeys(constants, "constexpr"), constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "num_stages": 2})
    assert made.asm["cubin"] and "mma.sync" in made.asm["ptx"]
    assert made.metadata.shared < 99 << 10  # what every card since has


def test_elsewhere_it_is_torchs():
    assert decode_attention.choose((1, 8, 4, 128), 1536, torch.device("cpu"), torch.float32) == ("torch", "")
    assert "256" in decode_attention.why_not(torch.float32, 4, 512)
    assert "float64" in decode_attention.why_not(torch.float64, 4, 64)


def test_a_cache_is_cut_for_the_whole_card_and_no_finer_than_a_block():
    from hotpath.vision_language.decode_attention_kernel import BLOCK, MAX_PARTS, parts_of

    assert parts_of(1, 8, 1536) == 16
    assert parts_of(16, 8, 1536) == 2
    assert parts_of(64, 8, 1536) == 1
    assert parts_of(1, 1, 262144) == MAX_PARTS
    assert parts_of(1, 8, BLOCK) == 1


def test_the_step_keeps_one_graph_whichever_attention_it_has(load, monkeypatch):
    from hotpath.vision_language import decode_attention_kernel as kernel

    calls = []

    def stand_in(*tensors):
        calls.append(1)
        return decode_attention.attend_reference(*tensors)

    monkeypatch.setattr(kernel, "attend_filled", stand_in)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    network = load("qwen3_vl").network
    steps = [
        decoding.DecodeStep(network, lambda part: torch.compile(part, backend=backend, fullgraph=True), name)
        for name in (decode_attention.TORCH, decode_attention.PARTS)
    ]
    logits = []
    for step in steps:
        space = decoding.Workspace(step, 2, 512, torch.device("cpu"), torch.float32)
        space.bias[..., 0] = 0.0
        space.slot.fill_(1)
        with torch.no_grad():
            logits.append([space.run(torch.tensor([5, 77])) for _ in range(3)])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert len(calls) == 3 * len(steps[0].layers)
    assert len(graphs) == 3  # the layer with each attention, and the head
    assert sum("attend_filled" in target for graph in graphs for target in graph) == 1
