"""The experts of a mixture, packed. The library keeps those of a layer in one tensor, which is no linear layer; they are most
of such a model's bytes, and few of them serve a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import host
from ..host.streamed_layers import nbytes
from .packed_matrix import plain_matrix
from .packed_products import chosen_product
from .projections import rows_of
from .quantization import Int4Linear, Int4OnCpu, ScaledLinear, pack

GIVEN = ["self", "hidden_states", "top_k_index", "top_k_weights"]


class PackedExperts(nn.Module):
    """In the place of a layer's experts: act(gate) * up, then down, by the experts that a router chose for each row."""

    def __init__(self, shape: Sequence[int], act_fn: Any, gate_up: Sequence[nn.Module], down: nn.Module) -> None:
        """shape: (experts, hidden, inner). gate_up: a layer of every expert's gate and up rows, or one of the gates and one
        of the ups. In each layer, the outputs of an expert are some of its rows."""
        super().__init__()
        self.count, self.hidden, self.inner = shape
        self.act_fn = act_fn
        self.gate_up, self.down = nn.ModuleList(gate_up), down

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [rows, hidden]; top_k_index, top_k_weights: [rows, chosen]. An index past the last expert is none."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.count:
                continue
            rows, places = torch.where(top_k_index == expert)
            given, width = hidden_states[rows], 2 * self.inner // len(self.gate_up)
            made = [rows_of(layer, given, width * expert, width * (expert + 1)) for layer in self.gate_up]
            gate, up = made if len(made) == 2 else made[0].chunk(2, dim=-1)
            outputs = rows_of(self.down, self.act_fn(gate) * up, self.hidden * expert, self.hidden * (expert + 1))
            result.index_add_(0, rows, (outputs * top_k_weights[rows, places, None]).to(result.dtype))
        return result


def chosen_experts(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What a mixture makes of a few rows, without waiting for the device to say which experts were chosen.

    experts: `PackedExperts`, or the library's where they are `packable`. x: [rows, hidden]; chosen, weights: [rows, any].
    """
    rows, count = chosen.shape
    wanted = chosen.flatten()
    if isinstance(experts, PackedExperts):
        number, gate_up, down = experts.count, list(experts.gate_up), experts.down
    else:
        number, gate_up, down = len(experts.down_proj), [experts.gate_up_proj], experts.down_proj
    if len(gate_up) == 1:
        inner = _chosen(gate_up[0], number, x, wanted, gated=True)
    else:
        gate, up = (_chosen(part, number, x, wanted) for part in gate_up)
        inner = F.silu(gate) * up
    outputs = _chosen(down, number, inner, wanted).view(rows, count, -1)
    return (outputs * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _chosen(stored: Any, number: int, x: Tensor, wanted: Tensor, gated: bool = False) -> Tensor:
    """`packed_products.chosen_product` with a layer, or with the library's tensor [experts, outputs, inputs]."""
    if isinstance(stored, Tensor):
        return chosen_product(plain_matrix(stored.flatten(0, 1)), number, x, wanted, gated)
    if stored.kernel_reads:
        return chosen_product(stored.matrix, number, x, wanted, gated)
    outputs = stored.out_features // number
    rows = (wanted.unsqueeze(1) * outputs + torch.arange(outputs, device=wanted.device)).flatten()
    weights = plain_matrix(stored.some(rows).to(x.dtype))
    return chosen_product(weights, len(wanted), x, torch.arange(len(wanted), device=wanted.device), gated)


def packable(part: nn.Module) -> bool:
    """Whether `part` is a layer's experts as the library computes them: [experts, 2 x inner, hidden] and [experts, hidden,
    inner], no biases, the usual gate. Older releases have another order, and a few models a gate of their own."""
    gate_up, down = getattr(part, "gate_up_proj", None), getattr(part, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.ndim != 3:
        return False
    kind: Any = type(part)
    usual = getattr(kind, "_apply_gate", None)
    return (
        down.ndim == 3
        and gate_up.shape == (len(down), 2 * down.shape[2], down.shape[1])
        and sum(1 for _ in part.parameters()) == 2
        and callable(getattr(part, "act_fn", None))
        and (usual is None or usual.__name__ == "_default_apply_gate")
        and getattr(part, "is_concatenated", True)
        and list(inspect.signature(kind.forward).parameters) == GIVEN
    )


def pack_experts(decoder: nn.Module, method: str, device: torch.device) -> int:
    """Replace all experts below `decoder` that are `packable` by their packed form for `device`, in place; how many layers."""
    found = [(owner, name) for owner in decoder.modules() for name, part in owner.named_children() if packable(part)]
    for owner, name in host.each(found, f"experts, {method}") if found else ():
        experts: Any = getattr(owner, name)
        shape = tuple(experts.down_proj.shape)
        gate_up, down = (_packed(experts, part, method, device) for part in ("gate_up_proj", "down_proj"))
        setattr(owner, name, PackedExperts(shape, experts.act_fn, [gate_up], down))
    return len(found)


def unpacked_experts(layers: Any) -> str:
    """A note on the experts of packed layers that are not `packable` and stay as they are stored; "" where there are none."""
    parts = dict(layers.named_parameters())
    experts = sum(part.nbytes for name, part in parts.items() if part.ndim == 3 and ".experts." in name)
    if not experts:
        return ""
    return f"quantization: not of its experts, which are {experts / nbytes(layers):.0%} of the decoder's bytes"


def _packed(experts: Any, name: str, method: str, device: torch.device) -> ScaledLinear | Int4Linear | Int4OnCpu:
    """All experts' outputs as those of one layer, of which each expert's are some rows."""
    weight = getattr(experts, name).detach().flatten(0, 1)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    delattr(experts, name)
    del weight
    return pack(layer, method, device)
