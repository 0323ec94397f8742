"""Our products of one token with packed weights are what their layers compute, in the interpreter and compiled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gguf_files import random_blocks
from torch import nn
from triton_interpreter import interpret

FLOATS, WHOLE, FOUR, SQUARES = "float8 rows", "int8 rows", "int4 groups", "float8 blocks"
FILES = {
    10: "Q2_K",
    11: "Q3_K",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
TABLES = {20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4", 40: "NVFP4"}
LYING = "numbers"
BOOKS = {16: "IQ2_XXS", 17: "IQ2_XS", 22: "IQ2_S", 18: "IQ3_XXS", 21: "IQ3_S", 19: "IQ1_S", 29: "IQ1_M"}
FORMS = [LYING, FLOATS, WHOLE, FOUR, SQUARES, *FILES, *TABLES, *BOOKS]
AROUND = {
    "plain": {},
    "normed": {"norm": True, "bias": True},
    "gated": {"norm": True, "gated": True},
    "added": {"added": True},
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Lying(nn.Module):
    """Weights that are not packed, as experts may have them."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.bias = linear, None
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, x):
        return self.linear(x)

    @property
    def matrix(self):
        from hotpath.vision_language.packed_matrix import plain_matrix

        return plain_matrix(self.linear.weight)


def packed_layer(form, outputs=40, inputs=512):
    """A layer as a card has it. Inputs, and outputs, of the first four forms do not fill their last group or block."""
    from hotpath.vision_language.gguf.matrix import Matrix
    from hotpath.vision_language.gguf.packing import Packer
    from hotpath.vision_language.gguf.types import TYPES
    from hotpath.vision_language.quantization import Int4Linear, ScaledLinear
    from hotpath.vision_language.stored_fp8 import BlockScaledLinear

    if form in FILES or form in TABLES or form in BOOKS:
        stored = Matrix(TYPES[form], random_blocks(form, outputs, inputs), outputs, inputs)
        return Packer("none", torch.device("cuda"), torch.float32).layer([stored])
    if form == SQUARES:
        codes = torch.randn(outputs, inputs - 56, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
        return BlockScaledLinear(codes, torch.rand(-(-outputs // 16), -(-inputs // 128)) + 0.5, (16, 128), None)
    plain = nn.Linear(inputs - 56, outputs, bias=False)
    with torch.no_grad():
        plain.weight.normal_(generator=torch.Generator().manual_seed(1))
        if form == LYING:
            return Lying(plain)
        if form == FOUR:
            return Int4Linear(plain)
        return ScaledLinear(plain, torch.int8 if form == WHOLE else torch.float8_e4m3fn)


def case(layer, dtype, norm=False, bias=False, gated=False, added=False, device="cpu"):
    """(what the kernel is given, what it should make in float64)."""
    from hotpath.vision_language.decode_products import reference

    generator = torch.Generator().manual_seed(3)
    outputs = layer.out_features // 2 if gated else layer.out_features

    def random(there, size):
        return torch.randn(size, generator=generator).to(dtype) if there else None

    given = {
        "x": random(True, layer.in_features), "bias": random(bias, outputs), "norm": random(norm, layer.in_features),
        "added": random(added, outputs),
    }  # fmt: skip
    wide = {name: None if part is None else part.double() for name, part in given.items()}
    dense = layer(torch.eye(layer.in_features)).T.double()

    def linear(x):
        return nn.functional.linear(x, dense, wide["bias"])

    wanted = reference(wide["x"], linear, wide["norm"], 1e-6, wide["added"], gated)
    moved = {name: None if part is None else part.to(device) for name, part in given.items()}
    return moved | {"eps": 1e-6, "gated": gated}, wanted


def compare(layer, dtype, around, config, device="cpu"):
    from hotpath.vision_language.packed_decode_kernel import packed_product

    given, wanted = case(layer, dtype, device=device, **AROUND[around])
    result = torch.full((len(wanted),), float("nan"), dtype=dtype, device=device)
    matrix = layer.to(device).matrix
    packed_product(result=result, matrix=matrix, config=config, **given)
    layer.to("cpu")
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(result.double().cpu(), wanted, atol=limit * float(wanted.abs().max()), rtol=limit)


def compare_unpacked(layer, dtype, device="cpu"):
    from hotpath.vision_language.packed_decode_kernel import unpack

    dense = layer(torch.eye(layer.in_features)).T
    layer.to(device)
    for start, stop in ((0, layer.out_features), (16, 32)):
        made = unpack(layer.matrix.rows(start, stop), dtype).cpu()
        torch.testing.assert_close(made, dense[start:stop].to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    layer.to("cpu")


def compare_chosen(layer, dtype, device="cpu"):
    """Three rows with the same weights; and the outputs of a layer as those of four experts, of which rows chose two, or one."""
    from hotpath.vision_language.packed_decode_kernel import packed_product
    from hotpath.vision_language.packed_products import by_torch

    whole = layer.matrix
    of_one, chosen = whole._replace(outputs=whole.outputs // 4), torch.tensor([2, 0, 1, 2, 3, 0])
    moved = layer.to(device).matrix._replace(outputs=of_one.outputs)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, whole.inputs, generator=generator).to(dtype)
    made = torch.full((3, whole.outputs), float("nan"), dtype=dtype, device=device)
    packed_product(x.to(device), layer.matrix, made, (16, 256, 4))
    wanted = by_torch(x.double(), whole, None, None, False)
    limit = TOLERANCE[dtype] * float(wanted.abs().max())
    torch.testing.assert_close(made.double().cpu(), wanted, atol=limit, rtol=TOLERANCE[dtype])
    for rows, gated in ((3, False), (3, True), (6, False)):
        x = torch.randn(rows, whole.inputs, generator=generator).to(dtype)
        made = torch.full((6, of_one.outputs // (2 if gated else 1)), float("nan"), dtype=dtype, device=device)
        packed_product(x.to(device), moved, made, (16, 256, 4), gated=gated, chosen=chosen.to(device))
        wanted = by_torch(x.double(), of_one, chosen, None, gated)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(made.double().cpu(), wanted, atol=limit * float(wanted.abs().max()), rtol=limit)
    layer.to("cpu")


INTERPRETED = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/support", sys.argv[2]]
import conftest, torch
import test_packed_decode as cases
with torch.no_grad():
    for form in cases.FORMS:
        layer = cases.packed_layer(form)
        for around in cases.AROUND:
            cases.compare(layer, torch.float32, around, (16, 256, 4))
        cases.compare(layer, torch.bfloat16, "gated", (64, 512, 4))
        if layer.matrix.group:
            cases.compare_unpacked(layer, torch.float32)
            cases.compare_unpacked(layer, torch.bfloat16)
        if form != cases.SQUARES:
            cases.compare_chosen(layer, torch.float32)
print("equal")
"""


def test_kernels_are_the_layers_numbers_in_the_interpreter():
    interpret(INTERPRETED, Path(__file__).parents[1], Path(__file__).parent)


@pytest.mark.parametrize("form", [WHOLE, FOUR, SQUARES, 10, 14, 23], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_compiled_layers_multiply_few_rows_by_one_operator(form, rows, monkeypatch):
    """As on a card: nothing of what is packed is in their graph. More rows have the unpacking in it."""
    from hotpath.vision_language import packed_products

    torch.compiler.reset()  # a method is compiled for so many kinds of layers only
    monkeypatch.setattr(packed_products, "SERVED", ("cpu",))
    layer, graphs = packed_layer(form), []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)(x)
        assert len(graphs) == 1 and (packed_products.PACKED_PRODUCT in graphs[0]) == (rows < 5)
        assert rows > 5 or len(graphs[0]) < 5
        monkeypatch.undo()
        wanted = x @ layer.matrix.dense().T
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


RARE = [pytest.param(form, marks=pytest.mark.long) for form in FORMS if form in (3, 6, 7, 16, 17, 18, 20, 29, 39, 40)]


def test_where_triton_is_missing_it_is_looked_for_once(monkeypatch):
    from hotpath.vision_language import packed_products

    packed_products._triton.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, f"{packed_products.__package__}.packed_decode_kernel", None)
        first = packed_products.why_not(torch.device("cuda"))
    try:
        assert "Triton does not serve" in first and packed_products.why_not(torch.device("cuda")) == first
    finally:
        packed_products._triton.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "form", [*(form for form in FORMS if form not in (3, 6, 7, 16, 17, 18, 20, 29, 39, 40)), *RARE], ids=str
)
def test_products_are_the_layers_on_the_gpu(form):
    """Every kernel that is compiled takes a second: not all that could be combined is."""
    from hotpath.vision_language import packed_products

    with torch.no_grad():
        layer = packed_layer(form, 6144, 2560)
        first, *others = packed_products.configs(layer.matrix)
        for around in AROUND:
            compare(layer, torch.bfloat16, around, first, "cuda")
        for config in others:
            compare(layer, torch.bfloat16, "plain", config, "cuda")
        for dtype in (torch.float16, torch.float32):
            compare(layer, dtype, "normed", first, "cuda")
        if layer.matrix.group:
            compare_unpacked(layer, torch.bfloat16, "cuda")
        if form != SQUARES:
            compare_chosen(layer, torch.bfloat16, "cuda")


@pytest.mark.parametrize("form", [WHOLE, FLOATS, FOUR, SQUARES, 8, 10, 11, 12, 13, 14, 23, 22, 21, 19], ids=str)
def test_products_compile_for_cards_that_are_not_here(form):
    """To machine code by way of Triton's own assembler: codes are read 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from hotpath.vision_language import packed_decode_kernel as kernel
    from hotpath.vision_language import packed_products
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    matrix = packed_layer(form).matrix
    constants = kernel.form_of(matrix) | {
        "NORMED": True,
        "GATED": form == 12,
        "ADDS": False,
        "BIASED": False,
        "STEPS": 3,
    }
    pointers = dict.fromkeys(("X", "BIAS", "NORM", "ADDED", "RESULT", "UNIT", "LOW_UNIT"), "*bf16") | {"CHOSEN": "*i64"}
    pointers |= {
        "CODES": "*i8" if matrix.codes.dtype == torch.int8 else "*u8",
        "HIGH": "*u8",
        "TABLE": "*i8",
        "SIGNS": "*u8",
    }
    pointers |= dict.fromkeys(
        ("SCALE", "LOW"), ("*u8" if matrix.word else "*i8") if matrix.unit is not None else "*fp16"
    )
    sizes = dict.fromkeys(("outputs", "inputs", "stride", "high_stride", "groups", "slots", "sharing"), "i32")
    types = pointers | sizes | {"eps": "fp32", "factor": "fp32"}
    names = kernel._packed_product.arg_names
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers | sizes}
    signature = {name: types.get(name, "constexpr") for name in names}
    block_n, block_k, warps = packed_products.configs(matrix)[0]
    constants |= {"BLOCK_N": block_n, "BLOCK_G": block_k // constants["GROUP"]}
    for card in (80, 90):
        source = ASTSource(kernel._packed_product, signature, constants, divisible)
        made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
        assert made.asm["cubin"] and "ld.global" in made.asm["ptx"]
        assert form in BOOKS or made.asm["ptx"].count(".v4.b32"), (form, card)
