"""The weights of one layer in one piece of the machine's memory, from which they go to a device in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import pinned_memory

ALIGNMENT = 256  # bytes


class Weights:
    """The weights of one layer in one piece of CPU memory, which is one copy to a device.

    The layer reads them there itself from now on. Tensors of other libraries (torchao's) are taken apart into the plain ones
    that they hold, where they can be; what cannot be taken apart is copied by itself.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.nbytes = 0
        self._slots: list[_Slot] = []
        parts: dict[int, _Part] = {}
        with torch.inference_mode(False), torch.no_grad():
            for module in layer.modules():
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in parts:  # it may be shared
                            parts[id(tensor)] = _part_of(tensor, self.nbytes)
                            self.nbytes = _aligned(self.nbytes + parts[id(tensor)].nbytes)
                        self._slots.append(_Slot(held, name, held is module._parameters, parts[id(tensor)]))
            self.memory = torch.empty(self.nbytes, dtype=torch.uint8)
            for part in parts.values():
                part.write(self.memory)
            for slot, made in zip(self._slots, self.on(self.memory), strict=True):
                if isinstance(slot.part, _Plain):  # the object stays, whoever else holds it
                    slot.held[slot.name].data = made.detach()
                else:
                    slot.held[slot.name] = made
            self._own = [slot.held[slot.name] for slot in self._slots]
        pinned_memory.lock(self.memory)

    def on(self, memory: Tensor) -> list[Tensor]:
        """The weights as views of `memory`: this object's own, or a copy of it elsewhere."""
        with torch.inference_mode(False), torch.no_grad():
            made = {part: part.read(memory) for part in dict.fromkeys(slot.part for slot in self._slots)}
            return [
                nn.Parameter(made[slot.part], requires_grad=False)
                if slot.is_parameter and not isinstance(made[slot.part], nn.Parameter)
                else made[slot.part]
                for slot in self._slots
            ]

    def copied(self, device: torch.device) -> list[Tensor]:
        """The weights on `device`: these themselves if that is where they are."""
        return self._own if device == self.memory.device else self.on(self.memory.to(device, non_blocking=True))

    @contextmanager
    def replaced_by(self, lent: Sequence[Tensor]) -> Iterator[None]:
        """The layer with `lent`, of `on` or `copied`, in the place of its weights."""
        for slot, tensor in zip(self._slots, lent, strict=True):
            slot.held[slot.name] = tensor
        try:
            yield
        finally:
            for slot, tensor in zip(self._slots, self._own, strict=True):
                slot.held[slot.name] = tensor


@dataclass(frozen=True)
class _Slot:
    """Where a weight stands in the layer: in `held`, the parameters or the buffers of one of its modules."""

    held: dict[str, Any]
    name: str
    is_parameter: bool
    part: _Part


class _Plain:
    """A tensor as torch has them, `nbytes` from `offset` on."""

    def __init__(self, tensor: Tensor, offset: int) -> None:
        given = tensor.detach()
        if not _is_dense(given):
            given = given.contiguous()
        self.nbytes = given.nbytes
        self._offset, self._dtype, self._shape, self._stride = offset, given.dtype, given.shape, given.stride()
        self._given: Tensor | None = given  # until it is written

    def write(self, memory: Tensor) -> None:
        assert self._given is not None
        self.read(memory).copy_(self._given)
        self._given = None

    def read(self, memory: Tensor) -> Tensor:
        piece = memory[self._offset : self._offset + self.nbytes].view(self._dtype)
        return piece.as_strided(self._shape, self._stride, piece.storage_offset())


class _Nested:
    """A tensor of another library, which is made anew of the parts that it was taken apart into."""

    def __init__(self, tensor: Any, offset: int) -> None:
        self._kind: Any = type(tensor.data)
        names, self._context = tensor.data.__tensor_flatten__()
        self._shape, self._stride = tensor.shape, tensor.stride()
        self.nbytes = 0
        self._inner: dict[str, _Part] = {}
        for name in names:
            self._inner[name] = _part_of(getattr(tensor.data, name), offset + self.nbytes)
            self.nbytes = _aligned(self.nbytes + self._inner[name].nbytes)

    def write(self, memory: Tensor) -> None:
        for part in self._inner.values():
            part.write(memory)

    def read(self, memory: Tensor) -> Tensor:
        inner = {name: part.read(memory) for name, part in self._inner.items()}
        made: Tensor = self._kind.__tensor_unflatten__(inner, self._context, self._shape, self._stride)
        return made


class _Apart:
    """A tensor that nothing can be made of but a copy: it lies beside the memory."""

    nbytes = 0

    def __init__(self, tensor: Tensor) -> None:
        self._kept = tensor.cpu()

    def write(self, memory: Tensor) -> None:
        pass

    def read(self, memory: Tensor) -> Tensor:
        return self._kept.to(memory.device, non_blocking=True)


_Part = _Plain | _Nested | _Apart


def _part_of(tensor: Tensor, offset: int) -> _Part:
    if type(tensor) in (Tensor, nn.Parameter):
        return _Plain(tensor, offset)
    return _Nested(tensor, offset) if hasattr(tensor, "__tensor_flatten__") else _Apart(tensor)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie side by side, in whatever order."""
    room = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != room:
            return False
        room *= size
    return True
