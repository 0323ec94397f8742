"""One matrix instead of three: the decoder's query, key and value projections merged, and its gate and up projections; and
one instead of a convolution: the tower's first layer.

Reading one long matrix uses the memory bus better than reading three short ones, and a decode step is nothing but
reading. The merged matrix is the only copy; the old names stay as views of its rows, so that the library's own forward
pass, which prefills, still runs on the same weights. On a CPU each matrix is kept as oneDNN orders it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import host
from ..products.linear import LARGE, PackedLinear, large_linears, why_not


class Rows(nn.Module):
    """Rows start..stop of the linear layer `merged`, which another module owns, as a linear layer of its own."""

    def __init__(self, merged: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.read_from(merged)
        self.start, self.stop = start, stop

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def merged(self) -> Any:
        return self._merged[0]

    def read_from(self, merged: nn.Module) -> None:
        # In a tuple, or its weights would be in the state dict once for each that reads them. The layer and not its owner,
        # which holds this module: weights in a circle stay in memory until Python looks for circles.
        self._merged = (merged,)

    def forward(self, x: Tensor) -> Tensor:
        return rows_of(self.merged, x, self.start, self.stop)


def rows_of(layer: Any, x: Tensor, start: int, stop: int) -> Tensor:
    """The outputs start to stop of `layer`, a linear or a packed one."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight[start:stop], None if layer.bias is None else layer.bias[start:stop])
    made: Tensor = layer.rows(x, start, stop)
    return made


def merge(owner: Any, names: tuple[str, ...], merged_name: str) -> bool:
    """Merge the plain linear layers `names` of `owner` into one; False, and nothing changed, if they are not plain."""
    layers = [getattr(owner, name, None) for name in names]
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len(plain) != len(names) or len({layer.bias is None for layer in plain}) != 1:
        return False
    outputs = [layer.out_features for layer in plain]
    with torch.no_grad():
        merged = nn.Linear(plain[0].in_features, sum(outputs), bias=plain[0].bias is not None, device="meta")
        merged.weight = nn.Parameter(torch.cat([layer.weight for layer in plain]), requires_grad=False)
        if plain[0].bias is not None:
            merged.bias = nn.Parameter(torch.cat([layer.bias for layer in plain]), requires_grad=False)
    share(owner, names, outputs, merged_name, merged)
    return True


def share(owner: Any, names: Sequence[str], outputs: Sequence[int], merged_name: str, merged: nn.Module) -> None:
    """Give `owner` the layer `merged`, and under `names` so many of its outputs each."""
    setattr(owner, merged_name, merged)
    start = 0
    for name, length in zip(names, outputs, strict=True):
        setattr(owner, name, Rows(merged, start, start + length))
        start += length


def replace(owner: nn.Module, name: str, made: nn.Module) -> None:
    """Put `made` in the place of the linear layer `name` of `owner`, also for those that read rows of it."""
    before = getattr(owner, name)
    setattr(owner, name, made)
    for child in owner.children():
        if isinstance(child, Rows) and child.merged is before:
            child.read_from(made)


def merge_decoder(layers: nn.ModuleList, merge: Callable[[Any, tuple[str, ...], str], bool] = merge) -> bool:
    """Merge every decoder layer's projections; True when all of them could be."""
    children: list[Any] = list(layers)
    done = [
        merge(layer.self_attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        and merge(layer.mlp, ("gate_proj", "up_proj"), "gate_up_proj")
        for layer in children
        if hasattr(layer, "self_attn") and hasattr(layer, "mlp")
    ]
    return len(done) == len(layers) and all(done)


def merge_mixed(layers: nn.ModuleList, merge: Callable[[Any, tuple[str, ...], str], bool] = merge) -> None:
    """Merge what can be merged of layers of which some have linear attention or experts."""
    children: list[Any] = list(layers)
    for layer in children:
        for owner, names, merged_name in (
            (getattr(layer, "self_attn", None), ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            (getattr(layer, "linear_attn", None), ("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
            (getattr(layer, "linear_attn", None), ("in_proj_a", "in_proj_b"), "in_proj_ab"),
            (layer.mlp, ("gate_proj", "up_proj"), "gate_up_proj"),
        ):
            if owner is not None:
                merge(owner, names, merged_name)


def pack_products(network: Any) -> int:
    """Keep the large plain linear layers of a network on the CPU as oneDNN orders them, in place; returns how many.

    A head that is also the embedding's matrix becomes a copy, where memory is plenty.
    """
    # None of an embedding that is packed, which no plain head shares.
    embedding = getattr(network.get_input_embeddings(), "weight", None)
    plenty = embedding is None or 4 * embedding.nbytes < host.current().free_memory(embedding.device)
    found = [
        (owner, name)
        for owner, name in large_linears(network)
        if plenty or getattr(owner, name).weight is not embedding
    ]
    for owner, name in host.each(found, "weights") if found else ():
        layer = getattr(owner, name)
        readers = [child for child in owner.children() if isinstance(child, Rows) and child.merged is layer]
        replace(owner, name, PackedLinear(layer, [reader.stop - reader.start for reader in readers]))
    return len(found)


def has_packed(network: nn.Module) -> bool:
    return any(isinstance(part, PackedLinear) for part in network.modules())


def products_note(network: nn.Module) -> str:
    """For a report: whose products those of the large layers on a CPU are, and why; '' where there are none."""
    if has_packed(network):
        return "; products by oneDNN"
    plain = (part.weight for part in network.modules() if type(part) is nn.Linear)
    large = next((weight for weight in plain if weight.device.type == "cpu" and weight.numel() >= LARGE), None)
    reason = "" if large is None else why_not(large.dtype)
    return f"; products by torch itself, because {reason}" if reason else ""


class PatchProduct(nn.Module):
    """A convolution whose kernels cover their input once, as the matrix product that it is; its weights are the layer's.

    cuDNN has had releases without a kernel for it in half precision, where torch then takes the slowest way there is.
    """

    def __init__(self, layer: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, T, H, W] of the kernel's own size to [n, outputs, 1, 1, 1]."""
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def patches_by_product(tower: Any) -> bool:
    """Let the patch embedding of `tower` multiply rather than convolve; False, and nothing changed, if it is another layer."""
    layer = getattr(getattr(tower, "patch_embed", None), "proj", None)
    if type(layer) is not nn.Conv3d or layer.groups != 1 or layer.kernel_size != layer.stride or any(layer.padding):
        return False
    tower.patch_embed.proj = PatchProduct(layer)
    return True
