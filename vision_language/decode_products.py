"""The products of a decode step for one row: which kernel makes each, with sizes of blocks that are measured, and checked.

The sizes depend on the card and on the matrix, so they are measured once for each matrix of a layer, on the weights of one
layer after the other as they will be read, and kept. Numbers that differ from torch's are refused.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import decode_attention
from .decoding import rms_norm
from .gguf.linears import StackedLinear, UnpackedLinear
from .packed_matrix import PackedMatrix
from .packed_products import CONFIGS, configs, layer_by_torch

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest number
Config = tuple[int, int, int]

_chosen: dict[tuple[Any, ...], tuple[Config, float]] = {}  # by device and matrix: the config and its milliseconds


class Unfit(RuntimeError):
    """The kernels do not serve here."""


class Part:
    """One matrix of a projection: by a kernel of ours, or by its layer where no kernel reads its weights."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.plain = type(layer) is nn.Linear and layer.weight.is_contiguous()
        self.served = self.plain or getattr(layer, "kernel_reads", False)
        self.config: Config = CONFIGS[0]

    @property
    def matrix(self) -> PackedMatrix:
        """The packed weights where they are now."""
        found: PackedMatrix = self.layer.matrix
        return found

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has the same config."""
        return tuple(self.layer.weight.shape) if self.plain else self.matrix.kind

    @property
    def nbytes(self) -> int:
        read: int = self.layer.weight.nbytes if self.plain else self.matrix.nbytes
        return read

    @property
    def configs(self) -> Sequence[Config]:
        return CONFIGS if self.plain else configs(self.matrix)

    def __call__(
        self,
        x: Tensor,
        result: Tensor,
        norm: Tensor | None = None,
        eps: float = 0.0,
        added: Tensor | None = None,
        gated: bool = False,
    ) -> None:
        """Write to `result` what `fused_decode_kernel.product` says."""
        if self.plain:
            from .fused_decode_kernel import product

            product(x, self.layer.weight, result, self.config, self.layer.bias, norm, eps, added, gated)
        elif self.served:
            from .packed_decode_kernel import packed_product

            packed_product(x, self.matrix, result, self.config, self.layer.bias, norm, eps, added, gated)
        else:
            result.copy_(reference(x, self.layer, norm, eps, added, gated))


class Product:
    """One projection of a decode step. layer: a linear layer, plain or packed, or several that stand one after the other.

    gated: the first half of its outputs gates the second.
    """

    def __init__(self, layer: Any, gated: bool = False) -> None:
        self.outputs = int(layer.out_features)
        self.parts = [Part(part) for part in (layer.layers if isinstance(layer, StackedLinear) else (layer,))]
        self.gated = gated
        # One launch makes both halves only of one matrix, and adds no bias to the second.
        self.gates = gated and len(self.parts) == 1 and self.parts[0].served and self.parts[0].layer.bias is None

    def why_not(self) -> str:
        """Why the step cannot be recorded with it; '' when it can."""
        known = all(part.served or isinstance(part.layer, UnpackedLinear) for part in self.parts)
        return "" if known else f"there is no kernel for a {type(self.parts[0].layer).__name__}"

    def __call__(self, x: Tensor, norm: Any = None, eps: float = 0.0, added: Tensor | None = None) -> Tensor:
        """added + f(norm(x) weight^T + bias), [outputs], half of them where they are gated. x: [inputs]; norm: a module."""
        weight = None if norm is None else norm.weight
        made = x.new_empty(self.outputs // 2 if self.gates else self.outputs)
        if self.gates:
            self.parts[0](x, made, weight, eps, gated=True)
            return made
        start = 0
        for part in self.parts:
            stop = start + int(part.layer.out_features)
            part(x, made[start:stop], weight, eps, None if added is None else added[start:stop])
            start = stop
        if not self.gated:
            return made
        from .prefill_kernels import gate_rows

        return gate_rows(made.unsqueeze(0))[0]


def tuned(
    parts: Sequence[Part], norms: Sequence[Any], gated: bool, eps: float, dtype: torch.dtype
) -> tuple[float, float]:
    """Give parts of one kind the fastest config: (its milliseconds, those of torch's product where they are plain). Waits."""
    layer = parts[0].layer
    outputs, inputs = int(layer.out_features), int(layer.in_features)
    made = outputs // 2 if gated else outputs
    device = layer.weight.device
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(inputs, generator=generator, device=device, dtype=dtype)
    added = None if norms else torch.randn(made, generator=generator, device=device, dtype=dtype)
    result = torch.empty(made, device=device, dtype=dtype)

    def run(config: Config, index: int) -> None:
        parts[index].config = config
        parts[index](x, result, norms[index].weight if norms else None, eps, added, gated)

    def in_turns(call: Callable[[int], Any]) -> float:
        turn = itertools.cycle(range(len(parts)))  # or they would lie in the card's cache
        return decode_attention.milliseconds(lambda: call(next(turn)), device)

    key = (torch.cuda.get_device_name(device), dtype, *parts[0].kind, gated, bool(norms), len(parts) > 1)
    theirs_key = (*key, "torch")
    wanted = reference(x, layer, norms[0].weight if norms else None, eps, added, gated)
    if key not in _chosen:
        best: tuple[Config, float] | None = None
        for config in parts[0].configs:
            run(config, 0)
            check(result, wanted)
            spent = in_turns(functools.partial(run, config))
            if best is None or spent < best[1]:
                best = config, spent
        assert best is not None
        _chosen[key] = best
        if parts[0].plain:
            row = x.unsqueeze(0)
            _chosen[theirs_key] = best[0], in_turns(lambda index: F.linear(row, parts[index].layer.weight))
    else:
        run(_chosen[key][0], 0)
        check(result, wanted)
    config, spent = _chosen[key]
    for part in parts:
        part.config = config
    return spent, _chosen[theirs_key][1] if parts[0].plain else 0.0


def reference(x: Tensor, layer: Any, norm: Tensor | None, eps: float, added: Tensor | None, gated: bool) -> Tensor:
    """What `fused_decode_kernel.product` computes, by torch."""
    given = (x if norm is None else rms_norm(x, norm, eps)).unsqueeze(0)
    # A layer that kernels read would multiply by the kernel that is to be checked.
    made: Tensor = (layer_by_torch(layer, given) if getattr(layer, "kernel_reads", False) else layer(given))[0]
    if gated:
        gate, up = made.chunk(2, dim=-1)
        made = F.silu(gate) * up
    return made if added is None else added + made


def check(found: Tensor, wanted: Tensor) -> None:
    largest = float(wanted.abs().max())
    worst = float((found.float() - wanted.float()).abs().max())
    if not worst <= TOLERANCE[wanted.dtype] * max(largest, 1e-3):
        raise Unfit(f"a product of our kernels is off by {worst:.2g}, where the largest number is {largest:.2g}")
