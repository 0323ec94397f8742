"""What an adapter file changes of one layer: a product of low rank (LoRA), or a Kronecker product (LoKr)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Product:
    """One layer's change: scale * up @ down (Hu et al., LoRA, 2021). down: [rank, in]; up: [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer that it fits."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self, device: torch.device) -> Tensor:
        """The change as a float32 matrix on `device`."""
        return self.scale * (self.up.to(device, torch.float32) @ self.down.to(device, torch.float32))

    def part(self, rows: slice) -> Product:
        """The change of some of the outputs."""
        return replace(self, up=self.up[rows])


@dataclass(frozen=True)
class Kronecker:
    """One layer's change: rows of scale * left (x) right (Yeh et al., LyCORIS, 2023). left: [a, b]; right: [c, d]; all rows are
    [a * c, b * d]."""

    left: Tensor
    right: Tensor
    scale: float
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer that it fits."""
        outputs = range(self.left.shape[0] * self.right.shape[0])[self.rows]
        return len(outputs), self.left.shape[1] * self.right.shape[1]

    def delta(self, device: torch.device) -> Tensor:
        """The change as a float32 matrix on `device`."""
        left, right = (part.to(device, torch.float32).contiguous() for part in (self.left, self.right))
        return self.scale * torch.kron(left, right)[self.rows]

    def part(self, rows: slice) -> Kronecker:
        """The change of some of the outputs of a whole one."""
        return replace(self, start=rows.start, stop=rows.stop)


Change = Product | Kronecker


class KroneckerProduct(nn.Module):
    """A `Kronecker` that multiplies x without being written out: two small products instead of one as large as the layer."""

    left: Tensor
    right: Tensor

    def __init__(self, change: Kronecker, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = change.rows
        self.register_buffer("left", (change.left.float() * change.scale).to(device, dtype), persistent=False)
        self.register_buffer("right", change.right.to(device, dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x.unflatten(-1, (self.left.shape[1], self.right.shape[1])), self.right)
        return (self.left @ inner).flatten(-2)[..., self.rows]


class AdaptedLinear(nn.Module):
    """A layer with changes beside it: base(x) + the sum of what each makes of x."""

    down: Tensor | None
    up: Tensor | None

    def __init__(self, base: nn.Module, changes: Sequence[Change], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        products = [change for change in changes if isinstance(change, Product)]
        down = up = None
        if products:  # many files are one product of a larger rank
            down = torch.cat([product.down.float() for product in products]).to(device, dtype)
            up = torch.cat([product.up.float() * product.scale for product in products], dim=1).to(device, dtype)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        others = [change for change in changes if isinstance(change, Kronecker)]
        self.others = nn.ModuleList(KroneckerProduct(change, device, dtype) for change in others)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base(x)
        if self.down is not None and self.up is not None:
            made = made + F.linear(F.linear(x, self.down), self.up)
        for other in self.others:
            made = made + other(x)
        return made
