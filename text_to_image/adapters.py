"""LoRA files on the transformer: added to its weights, and taken away to the last bit.

A file's products are summed in float32 and added to the weights once for a stack of files, so drawing costs
nothing more; the weights as they were wait in CPU memory. Packed weights (float8, int8) cannot be added to: there the
product runs beside the layer.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import host
from ..cache import content_key, file_fingerprint
from ..host.streamed_layers import inside
from .adapter_files import read
from .changes import AdaptedLinear, Change


@dataclass(frozen=True)
class Adapter:
    """A LoRA file and its strength; 1.0 is as trained."""

    path: Path
    strength: float = 1.0

    @property
    def identity(self) -> tuple[str, float]:
        return file_fingerprint(self.path), self.strength


class Adapters:
    """Which LoRA files one transformer has on it now. Used only while the transformer is resident."""

    def __init__(self) -> None:
        self.applied: (
            tuple[tuple[str, float], ...] | None
        ) = ()  # None: weights are in between, and the next call begins anew
        self._originals: dict[str, Tensor] = {}

    @contextmanager
    def on(self, transformer: nn.Module, stack: Sequence[Adapter], device: torch.device | None = None) -> Iterator[int]:
        """The transformer with exactly the files of `stack` while inside; yields how many layers they change.

        Added weights stay afterwards, for the next picture with the same files; another stack, also an empty one,
        begins with the weights as they were loaded. device: where to compute them, None for where each weight lies; some layers
        may be streamed.
        """
        active = [adapter for adapter in stack if adapter.strength != 0.0]
        wanted = tuple(adapter.identity for adapter in active)
        if wanted == self.applied:
            yield len(self._originals)
            return
        products = combined(active, transformer)  # a file that cannot be used changes nothing
        packed = {name for name in products if not is_dense(transformer.get_submodule(name))}
        added = {name: found for name, found in products.items() if name not in packed}
        # What both stacks change is made of the weight that waits here; a strength is turned up and down many times.
        self.restore(transformer, besides=added)
        self._merge(transformer, added, device)
        if not packed:
            self.applied = wanted
            yield len(products)
            return
        try:
            _stand_beside(transformer, {name: products[name] for name in packed}, device)
            yield len(products)
        finally:
            for name in packed:
                layer = transformer.get_submodule(name)
                if isinstance(layer, AdaptedLinear):
                    _replace(transformer, name, layer.base)
            self.restore(transformer)

    def _merge(self, transformer: nn.Module, products: dict[str, list[Change]], device: torch.device | None) -> None:
        self.applied = None
        for name, found in host.each(list(products.items()), "LoRA"):
            weight = transformer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if name not in self._originals:
                self._originals[name] = weight.detach().to("cpu", copy=True)
            here = device or weight.device
            changed = self._originals[name].to(here).float()
            for product in found:
                changed = changed + product.delta(here)
            weight.data.copy_(changed)
        self.applied = ()

    def restore(self, transformer: nn.Module, besides: Container[str] = ()) -> None:
        """Give every changed weight, but those of the layers `besides`, the bits it was loaded with."""
        self.applied = None
        for name in [name for name in self._originals if name not in besides]:
            weight = transformer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.data.copy_(self._originals[name])
            del self._originals[name]
        if not self._originals:
            self.applied = ()


def combined(stack: Sequence[Adapter], transformer: nn.Module) -> dict[str, list[Change]]:
    """The products of all files by layer, strengths multiplied in, in the order of the stack."""
    products: dict[str, list[Change]] = {}
    for adapter in stack:
        for name, product in read(adapter.path, transformer).items():
            products.setdefault(name, []).append(replace(product, scale=product.scale * adapter.strength))
    return products


def is_dense(layer: nn.Module) -> bool:
    """Whether the layer's weight is a plain tensor, which can be added to."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _stand_beside(transformer: nn.Module, products: dict[str, list[Change]], device: torch.device | None) -> None:
    for name, found in products.items():
        layer = transformer.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        dtype = getattr(layer, "computes_in", weight.dtype)
        _replace(transformer, name, AdaptedLinear(layer, found, device or weight.device, dtype))


def _replace(transformer: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(inside(transformer.get_submodule(parent)), last, layer)


def stack_identity(stack: Sequence[Adapter]) -> str:
    """MD5 of the files and strengths that change a picture."""
    return content_key([list(adapter.identity) for adapter in stack if adapter.strength != 0.0])
