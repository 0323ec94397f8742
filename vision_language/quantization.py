"""Weight-only quantisation of the decoder's linear layers: int8 per row, int4 in groups, float8 per row.

Written in plain torch, so that a quantised model moves between devices, compiles, and needs no extra package; torchao's
tensors cannot be cut into the rows of a merged matrix, nor moved by the host. The vision tower, the embeddings and, but on
a CPU, the output head stay in full precision. bitsandbytes is offered beside it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import host
from ..products.int8 import two_byte_linear
from ..products.linear import why_not
from ..products.rerouting import linear
from . import cpu_kernels
from .packed_matrix import PackedMatrix, bytes_of
from .packed_products import few_rows_product, unpacked
from .projections import replace

INT4_GROUP = 64  # inputs that share one scale and one zero point
NEAR_BYTES, LEAST_ROWS = 4 << 20, 64  # of a matrix that is unpacked on a CPU
SMALLEST_SCALE = 1e-7  # less would be 0 in float16, and weights over it no number

PACKED = ("int8", "int4", "float8")  # by this module, decoder only
AS_STORED = "gguf"  # weights as a GGUF file has them
OURS = ("none", *PACKED, AS_STORED)  # plain tensors all, and the tower in full precision
RATES = ("a", "b", "ab", "ba")  # after in_proj_, of linear attention
QUANTIZATIONS = ("none", *PACKED, "bitsandbytes 8-bit", "bitsandbytes 4-bit")


@dataclass(frozen=True)
class QuantizationPlan:
    """What was asked for and what will be done about it; `note` is for the report."""

    method: str
    note: str


def plan(asked: str, device: torch.device) -> QuantizationPlan:
    """The method for `asked`, one of QUANTIZATIONS or a word of an older node ("4bit", "8-bit (Balanced)", ...).

    Raises ValueError for a word that is not known, and for bitsandbytes where it cannot run.
    """
    word = asked.strip().lower()
    if word in ("none", "", "none (fp16)"):
        return QuantizationPlan("none", "weights as stored")
    if word.startswith(("8bit", "8-bit")):
        return QuantizationPlan("int8", f"{asked}: int8 weights, one scale a row{cpu_kernels.told('int8', device)}")
    if word.startswith(("4bit", "4-bit")):
        if device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
            return QuantizationPlan("bitsandbytes 4-bit", f"{asked}: bitsandbytes NF4; decode cannot use CUDA graphs")
        note = f"{asked}: int4 weights in groups of {INT4_GROUP} (bitsandbytes is not usable)"
        return QuantizationPlan("int4", note + cpu_kernels.told("int4", device))
    if word not in QUANTIZATIONS:
        raise ValueError(f"{asked!r} is no quantization: choose one of {', '.join(QUANTIZATIONS)}.")
    if word.startswith("bitsandbytes"):
        if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"{asked} needs the bitsandbytes package and an NVIDIA device: choose int4 or int8, which need neither."
            )
        return QuantizationPlan(word, f"{asked}: saves memory; decode cannot use CUDA graphs")
    if word == "float8" and device.type == "mps":
        return QuantizationPlan("int8", f"{asked}: int8 weights instead, because Metal has no 8 bit floats")
    notes = {
        "int8": "int8 weights, one scale a row",
        "int4": f"int4 weights in groups of {INT4_GROUP}",
        "float8": "float8 (e4m3) weights, one scale a row",
    }
    return QuantizationPlan(word, notes[word] + cpu_kernels.told(word, device))


def plan_for_gguf(asked: str, device: torch.device) -> QuantizationPlan:
    """The method for weights that a file has in types of its own: what it has in as many bits stays as it is.

    Other packages do not read such files. Raises ValueError for a word that is not known.
    """
    word = asked.strip().lower()
    bits = next(
        (bits for bits in ("8", "4") if word.startswith((f"{bits}bit", f"{bits}-bit", f"bitsandbytes {bits}"))), ""
    )
    found = plan(f"int{bits}" if bits else asked, device)
    if found.method == "none":
        return found
    named = "" if asked == found.method else f"{asked}: "
    return QuantizationPlan(found.method, f"{named}{found.method} for what the file has in other types")


class ScaledLinear(nn.Module):
    """int8 or float8 weights [out, in] with one scale per output: y = (x W^T) * scale + bias."""

    kernel_reads = True
    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        dense = linear.weight.detach().float()
        top = 127.0 if dtype == torch.int8 else float(torch.finfo(dtype).max)
        # As it is kept: rounded after the codes were made, it would shift a whole row.
        scale = (dense.abs().amax(dim=1, keepdim=True) / top).clamp_min(SMALLEST_SCALE).to(linear.weight.dtype).float()
        packed = dense / scale
        packed = packed.round().clamp(-127, 127) if dtype == torch.int8 else packed
        self.register_buffer("weight", packed.to(dtype))
        self.register_buffer("scale", scale.squeeze(1).to(linear.weight.dtype))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        if (made := few_rows_product(self, x, start, stop)) is not None:
            return made
        if self.weight.dtype == torch.int8 and cpu_kernels.serves(x):
            y = (cpu_kernels.int8_product(x, self.weight[start:stop]) * self.scale[start:stop]).to(x.dtype)
        elif self.weight.dtype == torch.int8 and cpu_kernels.serves_bytes(x):
            y = two_byte_linear(x, self.weight[start:stop], self.scale[start:stop]).to(x.dtype)
        else:
            y = in_parts(self._unpacked, x, start, stop, self.in_features)
        return y if self.bias is None else y + self.bias[start:stop]

    def some(self, rows: Tensor | slice) -> Tensor:
        """The weights of `rows`, float32."""
        return self.matrix.take(rows).dense()

    @property
    def matrix(self) -> PackedMatrix:
        """For kernels that unpack while they multiply."""
        floats = self.weight.dtype != torch.int8
        return PackedMatrix(bytes_of(self.weight), self.scale, self.out_features, self.in_features, floats=floats)

    def _unpacked(self, x: Tensor, start: int, stop: int) -> Tensor:
        weight, scale = self.weight[start:stop].to(x.dtype), self.scale[start:stop].to(x.dtype)
        if x.dtype == torch.float16:
            # Weights are a thousandth of their codes, whose products run over its range.
            return F.linear(x, weight * scale.unsqueeze(1))
        # Scaling the outputs instead of the weights keeps the weights' traffic at one byte each once this is compiled.
        return product(x, weight) * scale


class Int4Linear(nn.Module):
    """4-bit weights, two to a byte, with a scale and a smallest value for each group of inputs of each output."""

    kernel_reads = True
    weight: Tensor
    scale: Tensor
    low: Tensor

    def __init__(self, linear: nn.Linear, group: int = INT4_GROUP) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.group = group
        dense = F.pad(linear.weight.detach().float(), (0, -self.in_features % group))
        dense = dense.view(self.out_features, -1, group)
        low, high = dense.amin(dim=2, keepdim=True), dense.amax(dim=2, keepdim=True)
        low = low.to(linear.weight.dtype).float()
        scale = ((high - low) / 15).clamp_min(SMALLEST_SCALE).to(linear.weight.dtype).float()
        codes = ((dense - low) / scale).round().clamp(0, 15).to(torch.uint8).view(self.out_features, -1)
        self.register_buffer("weight", codes[:, 0::2] | (codes[:, 1::2] << 4))
        self.register_buffer("scale", scale.squeeze(2).to(linear.weight.dtype))
        self.register_buffer("low", low.squeeze(2).to(linear.weight.dtype))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        if (made := few_rows_product(self, x, start, stop)) is not None:
            return made
        y = in_parts(self._unpacked, x, start, stop, self.in_features)
        return y if self.bias is None else y + self.bias[start:stop]

    @property
    def matrix(self) -> PackedMatrix:
        """For kernels that unpack while they multiply."""
        return PackedMatrix(
            self.weight, self.scale, self.out_features, self.in_features, self.group, low=self.low, plane=4
        )

    def some(self, rows: Tensor | slice) -> Tensor:
        """The weights of `rows`, float32."""
        return self.matrix.take(rows).dense()

    def _unpacked(self, x: Tensor, start: int, stop: int) -> Tensor:
        return product(x, unpacked(self, start, stop, x.dtype))


class Int4OnCpu(nn.Module):
    """An `Int4Linear` kept only as torch's kernel for CPUs reads it: on the CPU for good."""

    weight: Tensor
    groups: Tensor

    def __init__(self, layer: Any, codes: Tensor, scale: Tensor, low: Tensor) -> None:
        """layer: an `Int4Linear`, or one like it; codes: 0 to 15, of all its weights; scale and low: its own."""
        super().__init__()
        self.out_features, self.in_features, self.group = layer.out_features, layer.in_features, layer.group
        packed, groups = cpu_kernels.int4_layout(codes, scale, low)
        self.register_buffer("weight", packed)
        self.register_buffer("groups", groups)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        y = cpu_kernels.int4_product(x, self.weight, self.groups, self.group, start, stop).to(x.dtype)
        return y if self.bias is None else y + self.bias[start:stop]


def in_parts(
    multiply: Callable[[Tensor, int, int], Tensor], x: Tensor, start: int, stop: int, inputs: int, most: int = 0
) -> Tensor:
    """multiply(x, start, stop), made on a CPU of some rows of the weights at a time: unpacked, they stay in its caches.

    most: how many weights are unpacked at a time on other devices; 0 for all.
    """
    near = NEAR_BYTES // 4 if x.device.type == "cpu" else most
    step = max(LEAST_ROWS, near // inputs) if near else stop - start
    if torch.compiler.is_compiling() or stop - start <= step:
        return multiply(x, start, stop)
    return torch.cat([multiply(x, first, min(stop, first + step)) for first in range(start, stop, step)], dim=-1)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x times an unpacked matrix, transposed; of many rows on a CPU by oneDNN, where that is clearly faster."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not why_not(torch.float32, ordered=False):
        return linear(x, weight)
    return F.linear(x, weight)


def pack(linear: nn.Linear, method: str, device: torch.device) -> ScaledLinear | Int4Linear | Int4OnCpu:
    """The packed form of one layer for `device`; `method` is int8, int4 or float8."""
    if method != "int4":
        return ScaledLinear(linear, torch.int8 if method == "int8" else torch.float8_e4m3fn)
    packed = Int4Linear(linear)
    fits = packed.out_features % cpu_kernels.STEP == 0 and packed.in_features % packed.group == 0
    if device.type == "cpu" and fits and not cpu_kernels.why_not("int4"):
        return Int4OnCpu(packed, packed.matrix.whole(), packed.scale, packed.low)
    return packed


def pack_head(network: Any, method: str, device: torch.device) -> bool:
    """Pack the output head, too, where a kernel reads it as it is; False, and nothing changed, elsewhere."""
    head = getattr(network, "lm_head", None)
    read = device.type == "cpu" and method in ("int8", "int4") and not cpu_kernels.why_not("int8")
    if not read or type(head) is not nn.Linear or head.in_features % cpu_kernels.STEP:
        return False
    network.lm_head = ScaledLinear(head, torch.int8)
    return True


def decides(owner: nn.Module, name: str) -> bool:
    """Whether the layer `name` of `owner` is small, and what is rounded there grows: a mixture's router chooses, and the rates of
    linear attention say how much of a state is left after thousands of tokens."""
    return (name.endswith("gate") and hasattr(owner, "experts")) or (name.startswith("in_proj_") and name[8:] in RATES)


def quantize(decoder: nn.Module, method: str, device: torch.device) -> int:
    """Replace every nn.Linear below `decoder`, but those that decide, by its packed form for `device`, in place; returns how
    many."""
    # Named and not held: each layer's own weights are released as soon as they are packed.
    dense = [
        (parent, name)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and not decides(parent, name)
    ]
    for parent, name in host.each(dense, method):
        replace(parent, name, pack(getattr(parent, name), method, device))
    return len(dense)
