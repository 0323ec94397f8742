"""Products with packed weights on the CPU, by the kernels that torch has for them: of int4, and of few rows of int8.

Unpacking a matrix to multiply it with one row costs several times the product itself, so a quantised model would decode
slower on a CPU than a whole one. The kernels multiply in bfloat16: their results are rounded to eight bits.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from ..host.errors import first_line
from ..products import int8

FEW_ROWS = 16  # of int8: with more, unpacking once and a plain product is as fast, and exact
FEW_OF_BYTES = 8  # the same where products of more rows need no unpacking
STEP = 64  # torch's int8 kernel reads so many inputs at once, past the end of the weights if need be; int4's, outputs
INNER_TILES = 1


@functools.cache
def why_not(method: str) -> str:
    """Why the kernel for `method` (int8 or int4) does not run here; '' when it does. Tried once, on a small product."""
    old = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    if method == "int8" and old:
        return "torch's int8 kernel is slower than unpacking on a CPU without AVX2"
    try:
        generator = torch.Generator().manual_seed(0)
        x, codes = torch.randn(1, 64, generator=generator), torch.randint(16, (64, 64), generator=generator)
        if method == "int8":
            made = int8_product(x, (codes - 8).to(torch.int8))
        else:
            made = int4_product(x, *int4_layout(codes, torch.ones(64, 1), torch.full((64, 1), -8.0)), 64)
        wanted = x @ (codes - 8).float().T
        if not torch.allclose(made, wanted, rtol=0, atol=0.02 * float(wanted.abs().max())):
            return f"torch's {method} kernel for CPUs is wrong here"
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch has no {method} kernel for this CPU ({first_line(error, 100)})"
    return ""


def told(method: str, device: torch.device) -> str:
    """What a report says of products with weights packed by `method` on a CPU; '' for other devices."""
    if device.type != "cpu":
        return ""
    reason = "torch has no kernel for it" if method == "float8" else why_not(method)
    if method == "int8" and not int8.why_not():
        return "; oneDNN multiplies its bytes" + (
            "" if reason else ", torch's CPU kernel those of few rows, in bfloat16"
        )
    few = "few rows " if method == "int8" else ""
    return f"; unpacked for every product: {reason}" if reason else f"; {few}by torch's CPU kernel, in bfloat16"


def serves(x: Tensor) -> bool:
    """Whether int8's product with `x` [..., K] goes through the kernel. Never in compiled code, which fuses the unpacking."""
    if not _may(x) or x.numel() > FEW_ROWS * x.shape[-1] or x.shape[-1] % STEP or why_not("int8"):
        return False
    return x.numel() <= FEW_OF_BYTES * x.shape[-1] or bool(int8.why_not())


def serves_bytes(x: Tensor) -> bool:
    """Whether int8's product with `x` [..., K] needs no unpacking, of however many rows."""
    return _may(x) and x.shape[-1] > 1 and not int8.why_not()


def _may(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] int8, transposed, without a scale; [..., N] float32."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    ones = torch.ones(len(weight), dtype=torch.bfloat16)
    return torch._weight_int8pack_mm(rows, weight, ones).float().view(*x.shape[:-1], len(weight))


def int4_layout(codes: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """What `int4_product` multiplies with. codes: [N, K] of 0..15; scale, low: [N, K / group]: a weight is code * scale + low."""
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), INNER_TILES)
    middle = low.float() + 8 * scale.float()  # the kernel counts from the middle of the 16 codes
    groups = torch.stack((scale.float(), middle), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return packed, groups


def int4_product(
    x: Tensor, packed: Tensor, groups: Tensor, group: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """The outputs start to stop of x [..., K] times the matrix of `int4_layout`, transposed; float32."""
    first, last = start, groups.shape[1] if stop is None else stop
    if first % STEP == 0 and last % STEP == 0 and (first, last) != (0, groups.shape[1]):
        packed, groups = packed[first:last], groups[:, first:last].contiguous()
        first, last = 0, last - first
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    made = torch._weight_int4pack_mm_for_cpu(rows, packed, group, groups)[:, first:last]
    return made.float().view(*x.shape[:-1], last - first)
