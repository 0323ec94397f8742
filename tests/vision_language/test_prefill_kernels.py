"""What stands between the products of a prefill: the kernels make torch's numbers, in the interpreter and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hotpath.vision_language import prefill_layers
from triton_interpreter import interpret

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
sys.path.insert(0, sys.argv[2])
from test_prefill_kernels import TOLERANCE
from hotpath.vision_language.prefill_layers import trial
for dtype in (torch.float32, torch.bfloat16):
    for dim in (16, 24):
        for normed in (True, False):
            for found, wanted in trial(torch.device("cpu"), dtype, dim, normed):
                torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
print("equal")
"""


@pytest.mark.long  # answers on the simulated card go through them, too
def test_kernels_are_torchs_numbers_in_the_interpreter():
    interpret(INTERPRETED, Path(__file__).parents[1], Path(__file__).parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("normed", [True, False])
def test_kernels_are_torchs_numbers_on_the_gpu(normed, dim, dtype):
    for found, wanted in prefill_layers.trial(torch.device("cuda"), dtype, dim, normed):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert prefill_layers.kernels_missing(torch.device("cuda", 0), dtype, dim, normed) == ""


def test_elsewhere_it_is_torchs():
    assert "cpu" in prefill_layers.kernels_missing(torch.device("cpu"), torch.float32, 128, True)


def test_kernels_compile_for_cards_that_are_not_here():
    """To machine code by way of Triton's own assembler."""
    triton = pytest.importorskip("triton")
    from hotpath.vision_language import prefill_kernels as kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, constants in (
        (kernels._norm_rows, {"ADDS": True, "PADDED": 4096}),
        (kernels._place_rows, {"DIM": 128, "PADDED_DIM": 128, "NORMED": True}),
        (kernels._gate_rows, {"BLOCK": 1024}),
    ):
        types = {
            name: "constexpr" if name in constants else "*i64" if name == "PLACES" else "*bf16" if name.isupper()
            else "fp32" if name == "eps" else "i32"
            for name in kernel.arg_names
        }  # fmt: skip
        source = ASTSource(kernel, types, constants)
        for capability in (80, 90):
            assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
