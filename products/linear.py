"""Linear layers on a CPU, with their weights in the order in which oneDNN multiplies, where that is faster.

torch gives float32 products to MKL. On processors of other makers that uses half of their width, and for a few rows it
reads the weights at a fraction of the memory's speed; oneDNN's own order has neither fault.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 16  # weights of a matrix from which its order matters; a smaller one stays in a core's cache
TRIED_ROWS = (1, 64)  # a token, and a prompt
MANY_ROWS = 64  # from which ordering the weights anew for each product is paid for
TRIED_SIDE = 2048
ROUNDS = 5
CLEARLY = 0.8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest number


@functools.cache
def why_not(dtype: torch.dtype, ordered: bool = True) -> str:
    """Why products of `dtype` go torch's own way; '' where oneDNN's are right here and faster. Tried once, in some 50 ms.

    ordered: of weights that `reordered` made before, and for any number of rows; otherwise of weights as they are, for
    `MANY_ROWS` and more.
    """
    if dtype not in TOLERANCE:
        return f"oneDNN is not asked for {dtype}"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this torch has no oneDNN"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TRIED_SIDE, TRIED_SIDE, generator=generator).to(dtype)
    own, theirs = 0.0, 0.0
    try:
        order = reordered(weight) if ordered else weight
        for rows in TRIED_ROWS if ordered else (MANY_ROWS,):
            x = torch.randn(rows, TRIED_SIDE, generator=generator).to(dtype)
            made, wanted = product(x, order, None), F.linear(x, weight)
            if not torch.allclose(made, wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.abs().max())):
                return "oneDNN's products are wrong here"
            own += fastest(functools.partial(F.linear, x, weight))
            theirs += fastest(functools.partial(product, x, order, None))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"oneDNN cannot multiply so on this CPU ({said(error)})"
    # Clearly, where pictures are drawn: what another process finds must be the same, or theirs are other pictures.
    return "" if theirs < (1.0 if ordered else CLEARLY) * own else "oneDNN is no faster on this CPU"


def said(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds: what else runs on the machine counts least."""
    spent = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def reordered(weight: Tensor) -> Tensor:
    """weight [O, K] as oneDNN reads it, for any number of rows: an opaque tensor, on the CPU for good."""
    order: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return order


def product(x: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times what `reordered` made, transposed: [..., O]. Plain weights [O, K] will do, and are ordered anew."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, order, bias, "none", [], "")
    return made


def large_linears(network: nn.Module, at_least: int = LARGE) -> list[tuple[nn.Module, str]]:
    """(owner, name) of every plain linear layer below `network` whose products are faster and right in oneDNN's order.

    Named and not held: each layer's own weights can be released as soon as they are packed.
    """
    return [
        (owner, name)
        for owner in network.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear
        and layer.weight.numel() >= at_least
        and layer.weight.device.type == "cpu"
        and not why_not(layer.weight.dtype)
    ]


class PackedLinear(nn.Module):
    """A linear layer whose weights exist in oneDNN's order only. For inference on the CPU.

    parts: how many of its outputs `rows` asks for at a time, from the first on; each part is packed by itself.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear, parts: Sequence[int] = ()) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        sizes = list(parts) or [self.out_features]
        self._starts = [0, *accumulate(sizes)]
        # `weight` by its usual name: libraries ask a layer for the dtype of its weights.
        self._names = ["weight", *(f"weight_{index}" for index in range(1, len(sizes)))]
        for name, part in zip(self._names, linear.weight.split(sizes), strict=True):
            self.register_buffer(name, reordered(part))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        made = [self._part(x, index) for index in range(len(self._names))]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs start..stop of x [..., K]."""
        if start in self._starts and self._starts[self._starts.index(start) + 1 :][:1] == [stop]:
            return self._part(x, self._starts.index(start))
        return self(x)[..., start:stop]

    def _part(self, x: Tensor, index: int) -> Tensor:
        first, last = self._starts[index : index + 2]
        bias = None if self.bias is None else self.bias[first:last]
        return product(x, self._buffers[self._names[index]], bias)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Free the weights. Nothing can be multiplied any more."""
        for name in self._names:
            self.register_buffer(name, torch.empty(0, dtype=self.weight.dtype))


class OrderedLinear(nn.Linear):
    """A linear layer with a second copy of its weights in oneDNN's order: compiled, trained and elsewhere it is the layer."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._order: Tensor | None = reordered(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Compilers know nothing of the other order, nor have gradients a way through it.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._order is None:
            return super().forward(x)
        return product(x, self._order, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = self.weight.data_ptr()
        made = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.weight.data_ptr() != before:
            self._order = None
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}  # what oneDNN ordered cannot be copied
