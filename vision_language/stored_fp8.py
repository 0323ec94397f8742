"""Folders in float8 with a scale for each block of weights, as Qwen publishes them under names that end in -FP8.

The library multiplies by a kernel whose code it fetches from the hub with the first answer, and that some cards and systems
lack. Here the weights are unpacked as they are read, in plain torch: the numbers are those of the folder, on any device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed_matrix import PackedMatrix, bytes_of
from .packed_products import few_rows_product, unpacked
from .projections import merge as merge_plain
from .projections import share
from .quantization import PACKED

METHOD = "fp8"  # as config.json calls it
FEW_ROWS = 16  # of more the products themselves take most of the time
NOTE = "quantization: weights in float8 as they are stored"
READ = (16, 32, 64, 128, 256)  # inputs that share a scale, of blocks that our kernels read
KERNEL = "kernels"  # the package by which the library fetches code


class BlockScaledLinear(nn.Module):
    """float8 weights [out, in] with one scale per block, all blocks of a size: y = x (W * scale)^T + bias."""

    weight: Tensor
    scale: Tensor  # [blocks of outputs, blocks of inputs] float32

    def __init__(self, weight: Tensor, scale: Tensor, block: tuple[int, int], bias: Tensor | None) -> None:
        """block: outputs and inputs that share a scale."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block = block
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.kernel_reads = block[1] in READ

    @property
    def matrix(self) -> PackedMatrix:
        """For kernels that unpack while they multiply."""
        rows, columns = self.block
        return PackedMatrix(
            bytes_of(self.weight),
            self.scale,
            self.out_features,
            self.in_features,
            columns,
            floats=True,
            scaled_rows=rows,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """start: where a block begins."""
        if (made := few_rows_product(self, x, start, stop)) is not None:
            return made
        rows, columns = self.block
        bias = None if self.bias is None else self.bias[start:stop].to(x.dtype)
        few = x.numel() <= FEW_ROWS * self.in_features
        if few and (stop - start) % rows == 0 and self.in_features % columns == 0:
            made = self.few(x.reshape(-1, self.in_features), start, stop).view(*x.shape[:-1], stop - start)
            return made if bias is None else made + bias
        if self.kernel_reads:
            return F.linear(x, unpacked(self, start, stop, x.dtype), bias)
        return F.linear(x, self.dense(x.dtype, start, stop), bias)

    def few(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [M, in] times the weights: x is scaled for each block of outputs, which is little beside scaling the weights."""
        rows, columns = self.block
        blocks = self.weight[start:stop].to(x.dtype).view(-1, rows, self.in_features)
        scale = self.scale[start // rows : stop // rows, None, :, None]
        scaled = x.view(len(x), -1, columns) * scale  # [output blocks, M, input blocks, columns]
        made = scaled.flatten(2).to(x.dtype) @ blocks.transpose(1, 2)
        return made.transpose(0, 1).reshape(len(x), stop - start)

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """The weights of some rows in `dtype`, rounded once."""
        return self.matrix.rows(start, self.out_features if stop is None else stop).dense().to(dtype)


def of_library(layer: Any) -> BlockScaledLinear:
    """The library's layer as ours, with its weights."""
    scale = layer.weight_scale_inv.detach().float()
    rows, columns = layer.block_size or layer.weight.shape
    scale = scale.view(-(-layer.weight.shape[0] // rows), -(-layer.weight.shape[1] // columns))
    bias = None if layer.bias is None else layer.bias.detach()
    return BlockScaledLinear(layer.weight.detach(), scale, (int(rows), int(columns)), bias)


def merge(owner: Any, names: tuple[str, ...], merged_name: str) -> bool:
    """`projections.merge` for layers of this kind, too; False, and nothing changed, if a block would lie in two of them."""
    layers = [getattr(owner, name, None) for name in names]
    if all(type(layer) is nn.Linear for layer in layers):  # what the folder keeps as it is
        return merge_plain(owner, names, merged_name)
    first: Any = layers[0]
    alike = all(
        isinstance(layer, BlockScaledLinear) and layer.block == first.block and layer.out_features % layer.block[0] == 0
        for layer in layers
    )
    if not alike or len({layer.bias is None for layer in layers}) != 1:  # type: ignore[union-attr]
        return False
    found: list[Any] = layers
    bias = None if first.bias is None else torch.cat([layer.bias for layer in found])
    weight, scale = (torch.cat([getattr(layer, name) for layer in found]) for name in ("weight", "scale"))
    share(
        owner,
        names,
        [layer.out_features for layer in found],
        merged_name,
        BlockScaledLinear(weight, scale, first.block, bias),
    )
    return True


def serves(stored: Mapping[str, Any] | None) -> bool:
    """Whether a folder's quantisation is the one of this module."""
    return stored is not None and stored.get("quant_method") == METHOD


def unpacks(stored: Mapping[str, Any] | None, packing: str) -> bool:
    """Whether the weights are unpacked while they are read, to be packed anew by the method `packing`."""
    return serves(stored) and packing in PACKED


def settings(stored: Mapping[str, Any] | None, packing: str) -> dict[str, Any]:
    """What the library is to be told so that it unpacks what is packed anew."""
    if stored is None or not unpacks(stored, packing):
        return {}
    from transformers import FineGrainedFP8Config

    kept = stored.get("modules_to_not_convert")
    return {"quantization_config": FineGrainedFP8Config(dequantize=True, modules_to_not_convert=kept)}


def let_dense_ones_load() -> None:
    """transformers 5.16 asks how a model's experts are split between cards, and fails where it has none (its #48346)."""
    from transformers.integrations import finegrained_fp8

    by_kind = getattr(getattr(finegrained_fp8, "FP8Experts", None), "_impl_tp_layer_overrides", None)
    if isinstance(by_kind, dict):
        by_kind.setdefault(None, {})


def take_over(network: nn.Module) -> bool:
    """Put layers of ours in the place of the library's, in place; False where there are none, so that all weights are dense.

    Raises ValueError for what only the library can multiply, where it cannot.
    """
    from transformers.integrations import finegrained_fp8

    found = [
        (owner, name)
        for owner in network.modules()
        for name, child in owner.named_children()
        if isinstance(child, finegrained_fp8.FP8Linear) and child.weight.element_size() == 1
    ]
    for owner, name in found:
        setattr(owner, name, of_library(getattr(owner, name)))
    experts = getattr(finegrained_fp8, "FP8Experts", ())
    if any(isinstance(part, experts) for part in network.modules()) and importlib.util.find_spec(KERNEL) is None:
        raise ValueError(f"its experts are in float8, which need code that the package {KERNEL!r} fetches from the hub")
    return bool(found)
