"""Without a card: the Triton kernels down to the machine code of several generations, and what that code asks of a card."""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hotpath.attention import best_match, local_window
from hotpath.attention.capabilities import FUSES, padded

triton = pytest.importorskip("triton")
from hotpath.attention import best_match_kernel, local_window_kernel, token_attention_kernel  # noqa: E402
from hotpath.patches.compilation import group_norm_kernel  # noqa: E402
from hotpath.vision_language import linear_attention_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm86": (GPUTarget("cuda", 86, 32), "tf32x3"),
    "sm90": (GPUTarget("cuda", 90, 32), "tf32x3"),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), "ieee"),
}
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
SHARED = 99 << 10  # what a program may have on consumer cards of NVIDIA; AMD's have 64 KiB


def compiled(kernel: Any, pointers: dict[str, str], form: dict[str, Any], target: str) -> Any:
    """`kernel` for `target`. pointers: types of what they point to. Arguments that are neither are sizes."""
    where, _ = TARGETS[target]
    backend = {"cuda": "nvidia", "hip": "amd"}[where.backend]
    if backend not in triton.backends.backends:
        pytest.skip(f"this Triton does not compile for {backend}")
    options = {name: form.pop(name) for name in ("num_warps", "num_stages")} | FUSES
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in form else f"*{pointers[name]}" if name in pointers
        else "fp32" if name in ("scale", "eps", "norm_eps") else "i32" for name in names
    }  # fmt: skip
    # As at a launch: torch aligns what it allocates, and sizes are mostly multiples of 16.
    even = (
        "channels", "value_channels", "q_query", "out_query", "q_sample", "out_sample", "places", "x_sample", "x_channel",
        "x_place",
    )  # fmt: skip
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in form and (name in pointers or name in even)
    }
    return triton.compile(ASTSource(kernel, signature, form, aligned), target=where, options=options)


def spilled(made: Any) -> int:
    """What the machine code keeps in memory for want of registers: bytes per thread of NVIDIA, registers of AMD."""
    if "amdgcn" in made.asm:
        return int(re.search(r"\.vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"])[1])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_window_attention_stays_in_registers(kind: str, target: str) -> None:
    form = local_window.kernel_form(BYTES[kind], TARGETS[target][1], 64, 1024, 15)
    pointers = {
        "q_pointer": "fp32",
        "k_pointer": "fp32",
        "bias_pointer": "fp32",
        "v_pointer": kind,
        "out_pointer": kind,
    }
    made = compiled(local_window_kernel.local_window_kernel, pointers, form, target)
    assert spilled(made) == 0 and made.metadata.shared <= SHARED


@pytest.mark.parametrize(
    ("kind", "dim", "tokens", "target", "text"),
    [
        ("fp16", 64, 16, "sm86", False),
        ("bf16", 64, 16, "sm90", False),
        ("fp32", 64, 16, "sm90", False),
        ("fp16", 160, 64, "sm86", False),
        ("fp32", 160, 64, "sm86", False),
        ("fp16", 64, 16, "gfx1100", False),
        ("fp16", 64, 16, "sm90", True),
        ("bf16", 64, 16, "sm86", True),
        ("fp16", 40, 16, "gfx1100", True),
    ],
)
def test_token_attention_stays_in_registers(kind: str, dim: int, tokens: int, target: str, text: bool) -> None:
    kernel = token_attention_kernel
    configs = kernel.configs_for(dim, BYTES[kind], TARGETS[target][1])
    assert configs
    form = {
        "IDENTITIES": 2, "TOKENS": tokens, "PADDED_TOKENS": padded(tokens),
        "TOKEN_BLOCK": kernel.token_block(tokens, dim, BYTES[kind]), "DIM": dim, "PADDED_DIM": padded(dim),
        "HAS_MASK": True, "HAS_STATS": True, "WIDEN": False, "TEXT_BLOCK": kernel.TEXT_BLOCK if text else 0,
        "PRECISION": TARGETS[target][1], "BLOCK": configs[0][0], "num_warps": configs[0][1], "num_stages": 1,
    }  # fmt: skip
    pointers = {name: kind for name in ("Q", "OUT", "RESULT", "KEYS", "VALUES", "TEXT_KEYS", "TEXT_VALUES")}
    pointers |= {"ROWS": "i32", "WEIGHTS": "fp32", "MASK": "fp32", "STATS": "fp32"}
    made = compiled(kernel._attend_tokens, pointers, form, target)
    # Wide heads in float32 do not quite fit; what spills is read once per block of tokens.
    assert spilled(made) <= (512 if (kind, dim) == ("fp32", 160) else 0) and made.metadata.shared <= SHARED


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("last", [True, False])
def test_norms_of_pictures_read_sixteen_bytes_at_once(last: bool, target: str) -> None:
    kernel = group_norm_kernel
    tile = {"PLACES": 32, "CHANNELS": 64} if last else {"PLACES": 1024, "CHANNELS": 2}
    launch = {"num_warps": 4, "num_stages": 1}
    order = {"x_channel": 1} if last else {"x_place": 1}
    half = dict.fromkeys(("X", "Y", "OUT", "WEIGHT", "BIAS", "ADDED", "OFFSETS", "MORE"), "fp16")
    pointers = half | dict.fromkeys(("MEANS", "SQUARES", "FACTORS", "SHIFTS"), "fp32")
    made = [
        compiled(kernel._moments, pointers, {**order, **tile, **launch, "STEPS": 8}, target),
        compiled(kernel._apply, pointers, {**order, **tile, **launch, "SILU": True}, target),
        compiled(kernel._add, pointers, {**order, **tile, **launch, "OFFSET": True, "MORE_OFFSET": True}, target),
    ]
    factors = {
        **launch,
        "num_warps": kernel.FACTOR_WARPS,
        "ADDS": True,
        "OFFSET": True,
        "STRETCHES": kernel.STRETCHES,
        "WIDTH": 128,
    }
    assert not any(spilled(one) for one in [*made, compiled(kernel._factors, pointers, {**factors}, target)])
    # Triton takes a size of 1 for a constant, which has no methods.
    one = {"places": 1, "stretches": 1}
    assert compiled(kernel._factors, pointers, {**factors, **one}, target)
    assert compiled(kernel._moments, pointers, {**order, **tile, **launch, "STEPS": 1, "places": 1}, target)
    if target.startswith("sm"):
        assert all("ld.global.v4.b32" in one.asm["ptx"] for one in made)


@pytest.mark.parametrize(("target", "shared"), [("sm86", SHARED), ("sm90", 227 << 10), ("gfx1100", 64 << 10)])
def test_best_match_stays_in_registers(target: str, shared: int) -> None:
    features = {"theta_pointer": "fp16", "phi_pointer": "fp16", "maxima_pointer": "fp32"}
    form = best_match.maxima_form(256, shared) | {"STEPS": 64}
    search = compiled(best_match_kernel.group_maxima, features, form, target)
    features = {"theta_pointer": "fp32", "phi_pointer": "fp32", "order_pointer": "i32", "count_pointer": "i32"}
    features |= {"score_pointer": "fp32", "index_pointer": "i64"}
    decision = compiled(best_match_kernel.settle, features, best_match.settle_form(256, TARGETS[target][1]), target)
    # Triton 3.9 keeps two numbers in memory from before the decision's loop until behind it.
    for made, few in ((search, 0), (decision, 8)):
        assert spilled(made) <= few and made.metadata.shared <= shared


@pytest.mark.parametrize("head_dim", [1, 40, 64, 96, 160, 256])
@pytest.mark.parametrize(("size", "precision"), [(2, "ieee"), (2, "tf32x3"), (4, "tf32x3"), (4, "ieee")])
def test_every_head_size_has_a_way_to_run(head_dim: int, size: int, precision: str) -> None:
    assert token_attention_kernel.configs_for(head_dim, size, precision)


def test_every_launch_says_that_products_fuse_with_sums() -> None:
    root, launches = Path(best_match.__file__).parents[1], []
    for file in (*root.glob("attention/*.py"), *root.glob("patches/**/*.py"), *root.glob("vision_language/*.py")):
        if "import triton" in (text := file.read_text(encoding="utf-8")):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.keywords]
            launches += [call for call in calls if isinstance(call.func, ast.Subscript)]
    assert len(launches) >= 14
    assert [text for text in map(ast.unparse, launches) if "**FUSES" not in text] == []


@pytest.mark.parametrize(
    "target", ["sm86", *(pytest.param(target, marks=pytest.mark.long) for target in TARGETS if target != "sm86")]
)
@pytest.mark.parametrize("part", ["prepare", "scan", "rewrite"])
def test_linear_attention_stays_in_registers(part: str, target: str) -> None:
    """With Qwen3.5's heads, in bfloat16. What spills while chunks are prepared is some addresses, once for 32 tokens."""
    kernels, exact = linear_attention_kernel, TARGETS[target][1]
    form = kernels.form_of(BYTES["bf16"], exact) | {"KEY": 128, "PADDED_KEY": 128, "VALUE": 128, "CHUNK": kernels.CHUNK}
    columns = form.pop("COLUMNS")
    if part == "prepare":
        levels = kernels.CHUNK.bit_length() - 1
        form |= {"COUNTED": True, "PADDED_VALUE": 128, "LEVELS": levels, "EXACT": exact}
    elif part == "scan":
        form |= {"COLUMNS": columns}
    else:
        form = {"KEY": 128, "PADDED_KEY": 128, "VALUE": 128, "PADDED_VALUE": 128, "num_warps": 8, "num_stages": 1}
    halves = ("MIXED", "GATE", "A", "B", "A_LOG", "DT_BIAS", "WEIGHT", "RESULT")
    pointers = dict.fromkeys(halves, "bf16") | {"COUNT": "i64"}
    pointers |= dict.fromkeys(("WRITTEN", "TAKING", "SEES", "TOTALS", "STATE"), "fp32")
    made = compiled(getattr(kernels, f"_{part}"), pointers, form, target)
    # AMD's consumer cards multiply float32 without tensor cores.
    most = {"prepare": 64, "scan": 0, "rewrite": 0} if exact != "ieee" else {"prepare": 256, "scan": 128, "rewrite": 0}
    assert spilled(made) <= most[part] and made.metadata.shared <= 64 << 10
