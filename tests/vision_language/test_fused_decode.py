"""Our products for one token are torch's numbers, in the interpreter and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_interpreter import interpret

# (outputs, inputs): whole blocks, and not.
SHAPES = [(64, 96), (40, 70), (1, 16)]
KINDS = {
    "plain": {},
    "normed": {"norm": True},
    "gated": {"norm": True, "gated": True},
    "added": {"added": True},
    "biased": {"norm": True, "bias": True},
}


def product_inputs(shape, dtype, norm=False, gated=False, added=False, bias=False):
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(outputs)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    weight = random(2 * outputs if gated else outputs, inputs)
    return {
        "x": random(inputs),
        "weight": weight,
        "bias": random(outputs) if bias else None,
        "norm": random(inputs) if norm else None,
        "eps": 1e-6,
        "added": random(outputs) if added else None,
        "gated": gated,
    }


def expected(given):
    from hotpath.vision_language.decode_products import reference

    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}

    def linear(x):
        return torch.nn.functional.linear(x, wide["weight"], wide["bias"])

    return reference(wide["x"], linear, wide["norm"], wide["eps"], wide["added"], wide["gated"])


TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
sys.path.insert(0, sys.argv[2])
import test_fused_decode as cases
from hotpath.vision_language import fused_decode_kernel as kernel
for dtype in (torch.float32, torch.bfloat16):
    for shape in cases.SHAPES:
        for name, kind in cases.KINDS.items():
            given = cases.product_inputs(shape, dtype, **kind)
            result = torch.full((shape[0],), float("nan"), dtype=dtype)
            kernel.product(result=result, config=(8, 32, 4), **given)
            wanted, limit = cases.expected(given), cases.TOLERANCE[dtype]
            torch.testing.assert_close(result.double(), wanted, atol=limit * float(wanted.abs().max()), rtol=limit)
print("equal")
"""


@pytest.mark.long  # answers on the simulated card go through them, too
def test_kernels_are_torchs_numbers_in_the_interpreter():
    interpret(INTERPRETED, Path(__file__).parents[1], Path(__file__).parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (6144, 2560), (2560, 9728)])
def test_products_are_torchs_on_the_gpu(shape, kind, dtype):
    from hotpath.vision_language import decode_products, fused_decode_kernel

    given = product_inputs(shape, dtype, **KINDS[kind])
    wanted = expected(given)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    for config in decode_products.CONFIGS:
        result = torch.full((shape[0],), float("nan"), dtype=dtype, device="cuda")
        fused_decode_kernel.product(result=result, config=config, **moved)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(result.double().cpu(), wanted, atol=limit * float(wanted.abs().max()), rtol=limit)


@pytest.mark.parametrize(("normed", "gated", "adds"), [(True, False, False), (True, True, False), (False, False, True)])
def test_products_compile_for_cards_that_are_not_here(normed, gated, adds):
    """To machine code by way of Triton's own assembler: loads of 16 bytes, and no spills."""
    triton = pytest.importorskip("triton")
    from hotpath.vision_language import decode_products
    from hotpath.vision_language import fused_decode_kernel as kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("X", "WEIGHT", "BIAS", "NORM", "ADDED", "RESULT")
    types = dict.fromkeys(names, "*bf16") | {"outputs": "i32", "inputs": "i32", "eps": "fp32"}
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(8)}
    for block_n, block_k, warps in decode_products.CONFIGS:
        constants = {
            "NORMED": normed, "GATED": gated, "ADDS": adds, "BIASED": False, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "STEPS": 3,
        }  # fmt: skip
        source = ASTSource(kernel._product, types | dict.fromkeys(constants, "constexpr"), constants, divisible)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert made.asm["cubin"] and "ld.global" in made.asm["ptx"]
        wide = made.asm["ptx"].count(".v4.b32")
        assert wide, (block_n, block_k, warps)
