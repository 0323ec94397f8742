"""What the tensors of a GGUF file are taken as: matrices that stay packed, or numbers; and that each of them is taken."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..unusable import UnusableModel
from .file import Gguf
from .matrix import Matrix
from .types import dense


class Taken:
    """A file's tensors, and which of them were used.

    raised: by how much the weights of norms are more than the library's.
    """

    def __init__(self, file: Gguf, dtype: torch.dtype, raised: float = 0.0) -> None:
        self.file, self.dtype, self.raised = file, dtype, raised
        self.used: set[str] = set()

    def matrix(self, name: str) -> Matrix:
        stored = self.file.stored(name)
        self.used.add(name)
        if not stored.kind.known:
            raise UnusableModel(
                f"{self.file.path} is quantised as {stored.kind.name} ({name}), which is not read here: take another file of "
                "the model, such as Q4_K_M, Q5_K_M or Q8_0."
            )
        if len(stored.shape) < 2:
            raise UnusableModel(f"{self.file.path}: {name} has the shape {stored.shape} and should be a matrix.")
        outputs = math.prod(stored.shape[:-1])
        return Matrix(
            stored.kind, self.file.blocks(name), outputs, stored.shape[-1], factor=self._factor(name, outputs)
        )

    def _factor(self, name: str, outputs: int) -> Tensor | None:
        """By what the numbers of a matrix are to be multiplied, for each output, where a tensor beside it says so (NVFP4)."""
        scale = f"{name.removesuffix('weight')}scale"
        if scale not in self.file:
            return None
        # What the inputs are rounded by, where products are made of them in as few bits.
        self.pass_over(f"{name.removesuffix('weight')}input_scale")
        found = self.numbers(scale).flatten()
        if outputs % len(found):
            raise UnusableModel(f"{scale} has {len(found)} numbers for {outputs} outputs, which does not fit.")
        return found.repeat_interleave(outputs // len(found))

    def experts(self, name: str, shape: tuple[int, ...]) -> Matrix:
        """A matrix for each expert, their rows one after the other. Raises UnusableModel for another shape."""
        if self.file.stored(name).shape != shape:
            raise UnusableModel(f"{name} has the shape {self.file.stored(name).shape} and should have {shape}.")
        return self.matrix(name)

    def tensor(self, name: str, order: Tensor | None = None) -> Tensor:
        """The numbers of `name` in the dtype of the network. order: of its rows, where the library has another."""
        shape = self.file.stored(name).shape
        if order is not None and len(order) != shape[0]:
            raise UnusableModel(f"{name} has the shape {shape}, and should have {len(order)} rows.")
        if len(shape) == 2:
            rows = self.matrix(name)
            return (rows if order is None else rows.rows(order)).dense(self.dtype)
        found = self.numbers(name)
        return (found if order is None else found[order]).to(self.dtype)

    def norm(self, name: str) -> Tensor:
        """The weights of a norm, in the dtype of the network."""
        return (self.numbers(name) - self.raised).to(self.dtype)

    def numbers(self, name: str) -> Tensor:
        """The numbers of a small tensor, float32."""
        stored = self.file.stored(name)
        self.used.add(name)
        if not stored.kind.known:
            raise UnusableModel(f"{self.file.path}: {name} is stored as {stored.kind.name}, which is not read here.")
        return dense(stored.kind, self.file.blocks(name)).view(stored.shape)

    def pass_over(self, prefix: str) -> None:
        """Tensors that nobody takes, and that are none of another kind of model."""
        self.used.update(name for name in self.file.tensors if name.startswith(prefix))

    def close(self) -> None:
        """Raises UnusableModel when something was left over: the file is of another kind of model."""
        if others := sorted(set(self.file.tensors) - self.used):
            raise UnusableModel(
                f"{self.file.path} has {len(others)} tensors that a model of its kind has not, such as {others[0]}: take "
                "another GGUF of the model."
            )


def put(owner: Any, name: str, tensor: Tensor, called: str) -> None:
    """Make `tensor` the parameter `name` of `owner`. Raises UnusableModel for another shape."""
    wanted = getattr(owner, name).shape
    if tensor.shape != wanted:
        raise UnusableModel(f"{called} has the shape {tuple(tensor.shape)} and should have {tuple(wanted)}.")
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False))


def fitting(layer: Any, matrix: Matrix, called: str) -> Matrix:
    wanted = tuple(layer.weight.shape)
    if (matrix.outputs, matrix.inputs) != wanted:
        raise UnusableModel(f"{called} has the shape {(matrix.outputs, matrix.inputs)} and should have {wanted}.")
    return matrix
