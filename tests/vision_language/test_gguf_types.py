"""What the numbers of GGUF files mean, and the layers that keep them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from gguf_files import BLOCKS as KINDS
from gguf_files import random_blocks
from hotpath.vision_language import cpu_kernels, quantization
from hotpath.vision_language.gguf import codebooks, linears
from hotpath.vision_language.gguf.matrix import Matrix
from hotpath.vision_language.gguf.packing import BLOCKS, GROUPED, KERNEL, ROWS, Packer
from hotpath.vision_language.gguf.types import TYPES, dense
from hotpath.vision_language.quantization import Int4Linear, ScaledLinear

CPU, CARD = torch.device("cpu"), torch.device("cuda")
NAMES = {kind: TYPES[kind].name for kind in KINDS}
# MD5 of the numbers that llama.cpp and its library `gguf` 0.19 read from the random blocks of 8 rows of 512, as float32.
BY_LLAMA_CPP = {
    "Q4_0": "faf9f578da1d248c1fccb7f142314569",
    "Q4_1": "7dffe68d8ee810acbdd0cfe9fc190fa7",
    "Q5_0": "52c407a8197ece00308f44c0b60b0aa8",
    "Q5_1": "a1f7b8c863d5e9244a549345b54fca17",
    "Q8_0": "45aed4249e2aa18813b721ff0feb8e64",
    "Q2_K": "1df4f0c693b81ccd1a0b9da0fc28944f",
    "Q3_K": "ff9fdbe9ca2170005b206a57fc090243",
    "Q4_K": "9709a09cdd9c308e76770a8d221e6cb1",
    "Q5_K": "0a76af712d651d1923798ead40c9eea3",
    "Q6_K": "41e88a674a7f1d55bf91a1e638941353",
    "IQ2_XXS": "d567d8cfe9a43293d4cd4ea0649c7f53",
    "IQ2_XS": "f5780f148c71abbef7e02f7dacade26f",
    "IQ3_XXS": "1cdc0c29d4951f0b76829ead0477b5bf",
    "IQ1_S": "46bfd3f2515caded4995bad0635a99e6",
    "IQ4_NL": "ab8958ec5008c2bee8836176169be4c8",
    "IQ3_S": "ac5edaac65926545039994565cbfd4e8",
    "IQ2_S": "5058444774eb0c45e0582c1438eb06bc",
    "IQ4_XS": "df76cb76d0c2c9e176146d5a102eee25",
    "IQ1_M": "5030a9fad8372bc9485f7ade681d40c2",
    "TQ1_0": "3d67b2002cf32eb32c28afc4f2289149",
    "TQ2_0": "84e95a452d9859755638a77a4602a363",
    "MXFP4": "cb731fc7db957384651aa818a08e0430",
    "NVFP4": "0dc9cab3c7aaa78831f6468a4796c11f",
    "Q1_0": "3a415f81146949d8a54408574ae47d3f",
    "Q2_0": "157d8999a1133c61c3e19d284b8b3b13",
}


def matrix(kind: int, outputs: int = 128, inputs: int = 512, seed: int = 0) -> Matrix:
    return Matrix(TYPES[kind], random_blocks(kind, outputs, inputs, seed), outputs, inputs)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_numbers_are_those_of_llama_cpp(kind):
    made = dense(TYPES[kind], random_blocks(kind, 8, 512))
    assert made.isfinite().all() and made.dtype == torch.float32
    assert hashlib.md5((made + 0.0).numpy().tobytes()).hexdigest() == BY_LLAMA_CPP[NAMES[kind]]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_the_library_agrees_where_it_is_installed(kind):
    quants = pytest.importorskip("gguf.quants")
    if kind not in iter(quants.GGMLQuantizationType) or NAMES[kind] in ("Q1_0", "Q2_0"):
        pytest.skip("which it does not read")
    blocks = random_blocks(kind, 64, 512, seed=1)
    wanted = quants.dequantize(blocks.numpy(), quants.GGMLQuantizationType(kind))
    assert (dense(TYPES[kind], blocks).numpy().reshape(-1) == wanted.reshape(-1)).all()


def test_the_codebooks_are_those_of_llama_cpp():
    """MD5 of all words of each, as int8; what is in IQ1 is in eighths."""
    found = {name: hashlib.md5(book.numpy().tobytes()).hexdigest()[:8] for name, book in codebooks.books().items()}
    assert found == {
        "IQ2_XXS": "fff55639",
        "IQ2_XS": "431a3707",
        "IQ2_S": "23f6f821",
        "IQ1": "a6b6ca88",
        "IQ3_XXS": "0ee1848d",
        "IQ3_S": "2364193f",
    }


@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_layers_keep_what_the_file_has(kind):
    """As any device but a CPU has them: every number is the file's, and they take the file's bytes, or a few more."""
    packer, stored = Packer("none", CARD, torch.float32), matrix(kind)
    layer = packer.layer([stored], [torch.ones(128)])
    meant = stored.dense(torch.float32)
    bits = TYPES[kind].bits
    assert {kept for _, kept in packer.kinds} == {GROUPED if bits else BLOCKS} and packer.packs
    assert packer.deviation.share == 0 and torch.equal(layer.some(torch.arange(128)), meant)
    kept = sum(part.nbytes for name, part in layer.named_buffers() if name != "table")
    assert kept <= stored.blocks.nbytes * (1.12 if NAMES[kind] in ("NVFP4", "IQ1_S") else 1.07)
    assert layer.weight.dtype == (torch.uint8 if bits < 8 else torch.int8)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    wanted = x @ meant.T + 1
    assert torch.allclose(layer(x), wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
    assert torch.allclose(layer.rows(x, 5, 77), layer(x)[:, 5:77], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [(2, KERNEL), (3, KERNEL), (12, KERNEL), (8, ROWS), (10, ROWS), (14, ROWS), (20, ROWS), (19, ROWS)],
    ids=str,
)
def test_a_cpu_takes_what_its_kernels_read(kind, kept):
    if cpu_kernels.why_not("int4") or cpu_kernels.why_not("int8"):
        pytest.skip("torch has no such kernels here")
    packer, stored = Packer("none", CPU, torch.float32), matrix(kind)
    with torch.no_grad():
        layer = packer.layer([stored])
        x = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
        wanted = x @ stored.dense(torch.float32).T
        off = float((layer(x) - wanted).norm() / wanted.norm())
    assert packer.kinds == {(NAMES[kind], kept): stored.blocks.numel()}
    assert 0 < packer.deviation.share < 0.02 and off < 0.03


@pytest.mark.parametrize(("kind", "runs"), [(1, 8), (8, 8), (12, 8), (14, 16), (35, 8), (22, 16), (8, 32)])
def test_outputs_and_inputs_in_another_order(kind, runs):
    """Runs of 64 and 32 inputs, and of 16, in which a group of 32 does not fit."""
    halves = torch.randn(64, 512).half().view(torch.uint8).view(-1, 2)
    stored = Matrix(TYPES[1], halves, 64, 512) if kind == 1 else matrix(kind, 64)
    outputs, order = torch.randperm(64), torch.randperm(runs)
    columns = (order.unsqueeze(1) * (512 // runs) + torch.arange(512 // runs)).flatten()
    moved = stored.rows(outputs).columns(order)
    wanted = stored.dense(torch.float32)[outputs][:, columns]
    assert torch.equal(moved.dense(torch.float32), wanted)
    assert (moved.kind is stored.kind) == (runs < 32)
    assert torch.equal(moved.dense(torch.float32, 3, None, 7), wanted[3::7])
    layer = Packer("none", CARD, torch.float32).layer([moved])
    kept = layer.weight if moved.kind.plain else layer.some(torch.arange(64))
    assert (kept - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("device", [CARD, CPU], ids=str)
def test_what_the_numbers_are_multiplied_by(device):
    """A number for each expert, as files have it of NVFP4."""
    factor = torch.linspace(1, 3, 8).repeat_interleave(16)
    stored = matrix(40)
    numbers = stored.dense(torch.float32) * factor.unsqueeze(1)
    stored = replace(stored, factor=factor)
    assert torch.equal(stored.dense(torch.float32), numbers)
    assert torch.equal(stored.dense(torch.float32, 3, None, 7), numbers[3::7])
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = Packer("none", device, torch.float32).layer([stored]).rows(x, 5, 77)
    assert (made - x @ numbers[5:77].T).norm() <= 0.03 * made.norm()


def test_a_device_unpacks_some_rows_at_a_time(monkeypatch):
    layer = Packer("none", CARD, torch.float32).layer([matrix(35, 256)], [torch.ones(256)])
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    seen, whole, read = [], layer(x), type(layer)._dense
    monkeypatch.setattr(linears, "AT_ONCE", 100 * 512)
    monkeypatch.setattr(quantization, "NEAR_BYTES", 4 * 100 * 512)
    monkeypatch.setattr(type(layer), "_dense", lambda self, rows, f: (seen.append(len(rows)), read(self, rows, f))[1])
    assert torch.allclose(layer(x), whole, atol=1e-4) and seen == [100, 100, 56]


def test_small_scales_stay_whole():
    stored = matrix(8)
    stored.blocks[:, :2] = 0
    stored.blocks[:, 0] = 1  # the smallest number of float16
    packer = Packer("none", CARD, torch.float32)
    assert packer.layer([stored]).scale.dtype == torch.float32 and packer.deviation.share == 0


def test_projections_of_several_types_are_one_layer():
    """Q4_K_M has values in Q6_K beside queries and keys in Q4_K."""
    parts = [matrix(12, 128), matrix(12, 64, seed=1), matrix(14, 64)]
    biases = [torch.full((part.outputs,), float(number)) for number, part in enumerate(parts)]
    layer = Packer("none", CARD, torch.float32).layer(parts, biases)
    assert (layer.out_features, layer.in_features) == (256, 512)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    wanted = x @ torch.cat([part.dense(torch.float32) for part in parts]).T + torch.cat(biases)
    assert torch.allclose(layer(x), wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
    for start, stop in ((0, 128), (128, 192), (192, 256), (100, 200)):
        assert torch.allclose(linears.rows_of(layer, x, start, stop), layer(x)[:, start:stop], atol=1e-4)
    plain = Packer("none", CARD, torch.float32).layer([matrix(12), matrix(12, seed=1)])
    assert isinstance(plain, linears.GroupedLinear) and plain.out_features == 256


@pytest.mark.parametrize(
    ("method", "kind", "becomes"),
    [
        ("int8", 8, linears.GroupedLinear), ("int8", 12, ScaledLinear), ("int4", 12, linears.GroupedLinear),
        ("int4", 14, Int4Linear), ("float8", 8, ScaledLinear), ("none", 12, linears.GroupedLinear),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_packed_anew_unless_the_file_has_it(method, kind, becomes):
    packer = Packer(method, CARD, torch.bfloat16)
    assert type(packer.layer([matrix(kind)])) is becomes
