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

from .quantization import PACKED

METHOD = "fp8"  # as config.json calls it
FEW_ROWS = 16  # of more the products themselves take most of the time
NOTE = "quantization: weights in float8 as they are stored, unpacked for every product: quantization float8 or int8 writes faster"
KERNEL = "kernels"  # the package by which the library fetches code


class BlockScaledLinear(nn.Module):
    """float8 weights [out, in] with one scale per block, all blocks of a size: y = x (W * scale)^T + bias."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("weight", layer.weight.detach())
        scale = layer.weight_scale_inv.detach().float()
        rows, columns = layer.block_size or layer.weight.shape
        self.block = (int(rows), int(columns))
        self.register_buffer("scale", scale.view(-(-self.out_features // rows), -(-self.in_features // columns)))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.block
        few = x.numel() <= FEW_ROWS * self.in_features
        if few and self.out_features % rows == 0 and self.in_features % columns == 0:
            made = self.few(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
            return made if self.bias is None else made + self.bias.to(x.dtype)
        return F.linear(x, self.dense(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def few(self, x: Tensor) -> Tensor:
        """x [M, in] times the weights: x is scaled for each block of outputs, which is little beside scaling the weights."""
        rows, columns = self.block
        blocks = self.weight.to(x.dtype).view(-1, rows, self.in_features)
        scaled = x.view(len(x), -1, columns) * self.scale[:, None, :, None]  # [output blocks, M, input blocks, columns]
        made = scaled.flatten(2).to(x.dtype) @ blocks.transpose(1, 2)
        return made.transpose(0, 1).reshape(len(x), self.out_features)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights in `dtype`, rounded once."""
        rows, columns = self.block
        scale = self.scale.repeat_interleave(rows, dim=0)[: self.out_features]
        codes = F.pad(self.weight.float(), (0, -self.in_features % columns)).unflatten(1, (-1, columns))
        return (codes * scale.unsqueeze(2)).to(dtype).flatten(1)[:, : self.in_features]


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
        setattr(owner, name, BlockScaledLinear(getattr(owner, name)))
    experts = getattr(finegrained_fp8, "FP8Experts", ())
    if any(isinstance(part, experts) for part in network.modules()) and importlib.util.find_spec(KERNEL) is None:
        raise ValueError(f"its experts are in float8, which need code that the package {KERNEL!r} fetches from the hub")
    return bool(found)
