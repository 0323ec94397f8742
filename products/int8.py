"""Linear layers of 8 bit integers on a CPU: weights by row, activations by row as they come, products in whole numbers.

Activations are rounded to one byte, or to two, which are multiplied like two rows: then only the weights' own rounding
tells.

With VNNI (Intel from 2019 on, in laptops from 2021 on; AMD from Zen 4 on) a processor multiplies four such numbers where it
multiplies one of float32. Without it oneDNN's sums of two products overflow and nobody is told, so they are tried first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import CLEARLY, MANY_ROWS, TRIED_SIDE, fastest, said
from .operators import operator

LARGEST = 127.0
NEAR_BYTES = 4 << 20
LEAST_ROWS = 512
LARGEST_OF_TWO = 32512.0  # of what two bytes hold, so that the upper one, rounded, is 127 at most
NEAR_SUMS, LEAST_WEIGHTS = 2 << 20, 256


@functools.cache
def why_not() -> str:
    """Why products of 8 bits are made in float32; '' where they are right here and clearly faster. Tried once, in some 50 ms."""
    generator = torch.Generator().manual_seed(0)

    def numbers(rows: int) -> Tensor:
        return torch.randint(-127, 128, (rows, TRIED_SIDE), generator=generator, dtype=torch.int8)

    rows, weight = numbers(MANY_ROWS), numbers(TRIED_SIDE)
    try:
        made = torch._int_mm(rows, weight.t())
        if not torch.equal(made.double(), rows.double() @ weight.t().double()):
            return "products of 8 bits overflow on this CPU, which has no VNNI"
        x, whole = rows.float(), weight.float()
        own = fastest(functools.partial(F.linear, x, whole))
        theirs = fastest(functools.partial(torch._int_mm, rows, weight.t()))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch cannot multiply 8 bits on this CPU ({said(error)})"
    return "" if theirs < CLEARLY * own else "products of 8 bits are no faster on this CPU"


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [M, K] as whole numbers from -127 to 127, int8, and the float32 scale of each row, [M, 1]."""
    rows = rows.float()
    scale = (rows.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(1e-30)
    return (rows / scale).round_().to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K], int8 with its scale, float32 of one number or one a row; bias [N]. In x's dtype.

    x is rounded to 8 bits row by row. Where `why_not` has a reason the rounded numbers are multiplied in float32, which is
    slow and gives the same to float32's precision.
    """
    rows, row_scale = rounded(x.reshape(-1, x.shape[-1]))
    out = torch.empty(len(rows), len(weight), dtype=torch.float32)
    scale = scale.float().reshape(1, -1)
    fast = x.shape[-1] > 1 and not why_not()  # of one column torch's product is not its numbers
    # What is written once and read four times stays near; each part orders the weights anew, so not too few rows.
    step = max(LEAST_ROWS, NEAR_BYTES // (4 * max(1, len(weight))))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        some = torch._int_mm(rows[part], weight.t()) if fast else rows[part].float() @ weight.t().float()
        made = out[part].copy_(some).mul_(row_scale[part]).mul_(scale)
        if bias is not None:
            made.add_(bias)
    return out.to(x.dtype).reshape(*x.shape[:-1], len(weight))


def two_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [M, K] as whole numbers of two bytes, int8 [2 M, K], all the lower ones first: row m is
    (made[m] + 256 * made[M + m]) * scale[m], with a float32 scale, [M, 1]."""
    rows = rows.float().contiguous()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-30).div_(LARGEST_OF_TWO)
    # Both bytes are read with a sign. Half of the lower one's range more, and that half turned over, carries it up.
    whole = (rows / scale).round_().to(torch.int16).add_(128).bitwise_xor_(128)
    return whole.view(torch.int8).view(*rows.shape, 2).permute(2, 0, 1).reshape(-1, rows.shape[1]), scale


def two_byte_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] times weight [N, K], int8 with a scale [N], in float32: x is rounded to two bytes, row by row.

    For many rows where `why_not` has no reason against it, and more than one column. A number that is none, or infinite,
    leaves none in its row.
    """
    rows, row_scale = two_bytes(x.reshape(-1, x.shape[-1]))
    count = len(row_scale)
    out = torch.empty(count, len(weight), dtype=torch.float32)
    # What is written once and read twice stays near.
    step = max(LEAST_WEIGHTS, NEAR_SUMS // (8 * max(1, count)))
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        low, high = torch._int_mm(rows, weight[part].t()).tensor_split(2)
        out[:, part].copy_(high).mul_(256.0).add_(low).mul_(row_scale).mul_(scale[part].float())
    return out.view(*x.shape[:-1], len(weight))


class Int8Linear(nn.Linear):
    """A linear layer whose weights are int8, a quarter of float32's: for inference on a CPU."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight, scale = rounded(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.computes_in = linear.weight.dtype
        _operator()  # a compiler that traces `forward` may meet it there, but may not see it made

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.hotpath.int8_linear.default(x, self.weight, self.scale, self.bias)
        return made


def replace_linears(network: nn.Module, chosen: Callable[[nn.Module, str], bool]) -> int:
    """Put an `Int8Linear` in the place of each linear layer below `network` that is `chosen`, by it and its name; how many."""
    found = [
        (owner, last, layer)
        for path, owner in network.named_modules()
        for last, layer in owner.named_children()
        if type(layer) is nn.Linear and chosen(layer, f"{path}.{last}".lstrip("."))
    ]
    for owner, last, layer in found:
        setattr(owner, last, Int8Linear(layer))
    return len(found)


def _operator() -> Any:
    """`int8_linear` for graphs."""
    return operator("int8_linear", "Tensor x, Tensor weight, Tensor scale, Tensor? bias", int8_linear, _result)


def _result(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
