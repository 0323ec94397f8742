"""Linear attention between a decoder's other layers: a short convolution, the gated delta rule, and a norm with a gate.

The layer's weights are the library's, of any release; what it computes is here, by kernels of ours on a card and by torch
elsewhere: the last inputs of its convolution and its matrices are given, and rewritten in place, so that one token goes
through a CUDA graph, many are prefilled, and more may follow those that a state knows already.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.capabilities import on_device, one_line
from ..products.operators import operator
from .delta_rule import delta_rule, length_one
from .library_cache import states_in

log = logging.getLogger("hotpath.vision_language")

SERVED = ("cuda",)  # types of devices
PARTS = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "A_log", "dt_bias", "norm", "out_proj")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest number

_missing: dict[torch.device, str] = {}  # why torch computed on a card in the last call, for reports

allow_interpreter = False


class Weights(NamedTuple):
    """What a layer has beside its products. kernels: [channels, reach]; a_log, dt_bias: [heads]; norm: [V], with its eps."""

    kernels: Tensor
    bias: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float

    @classmethod
    def of(cls, linear: Any) -> Weights:
        """Those of the library's layer, where they are now."""
        conv, norm = linear.conv1d, linear.norm
        eps = float(norm.variance_epsilon)
        return cls(conv.weight.squeeze(1), conv.bias, linear.A_log, linear.dt_bias, norm.weight, eps)


class LinearAttention(nn.Module):
    """The library's layer of linear attention for one new token of each row, in the place of attention."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def states(self, rows: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what is kept between calls: the last inputs of the convolution, and a matrix for each head."""
        return state_shapes(self.linear, rows, dtype)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, state: Tensor, slot: Tensor, bias: Tensor
    ) -> Tensor:
        """x: [B, hidden]. seen, state: as of `states`, rewritten in place. The others serve layers that attend."""
        return many(self.linear, x.unsqueeze(1), seen, state).squeeze(1)


def state_shapes(linear: Any, rows: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """As `LinearAttention.states` of the library's layer `linear`."""
    key, value, heads = int(linear.head_k_dim), int(linear.head_v_dim), int(linear.num_v_heads)
    channels = 2 * int(linear.num_k_heads) * key + heads * value
    return [((rows, channels, int(linear.conv_kernel_size)), dtype), ((rows, heads, key, value), torch.float32)]


def many(
    linear: Any, x: Tensor, seen: Tensor, state: Tensor, mask: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """[B, n, hidden] of x [B, n, hidden] through the library's layer `linear`.

    seen, state: what it keeps, as of `state_shapes`, zeros before the first token; rewritten in place. mask: [B, n], 0 where a
    row is padded at its left. count: [1], how many tokens of each row are real where they are padded at their right.
    """
    if mask is not None:
        x = (x * mask.unsqueeze(-1)).to(x.dtype)
    given = projected(linear, x)
    weights = Weights.of(linear)
    if x.device.type in SERVED:
        made = LINEAR_ATTENTION(*given, *weights, seen, state, count)
    else:
        made = by_torch(*given, weights, seen, state, count)
    result: Tensor = linear.out_proj(made)
    return result


def projected(linear: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the convolution is given, the gate, and a and b of x [B, n, hidden]; by two products where they are merged."""
    layers = linear.in_proj_qkv, linear.in_proj_z, linear.in_proj_a, linear.in_proj_b
    if x.shape[1] > 1:  # their products take long enough, and what they make lies in one piece
        inputs, gate, a, b = (layer(x) for layer in layers)
        return inputs, gate, a, b
    made: list[Tensor] = []
    for name, pair in (("in_proj_qkvz", layers[:2]), ("in_proj_ab", layers[2:])):
        merged = getattr(linear, name, None)
        if merged is None:
            made += [layer(x) for layer in pair]
        else:
            made += merged(x).split([int(layer.out_features) for layer in pair], dim=-1)
    inputs, gate, a, b = made
    return inputs, gate, a, b


def by_torch(
    inputs: Tensor, gate: Tensor, a: Tensor, b: Tensor, weights: Weights, seen: Tensor, state: Tensor, count: Tensor | None
) -> Tensor:  # fmt: skip
    """[B, n, heads * V]: what stands between the products of a layer, whose results are given, all [B, n, ...]."""
    rows, heads, key, value = state.shape
    n = inputs.shape[1]
    keys = (inputs.shape[2] - heads * value) // (2 * key)
    whole = torch.cat((seen.to(inputs.dtype), inputs.transpose(1, 2)), dim=-1)
    mixed = F.silu(convolved(whole[..., 1:], weights.kernels, weights.bias)).transpose(1, 2).float()
    q, k, v = mixed.split((keys * key, keys * key, heads * value), dim=-1)
    q, k = (length_one(part.reshape(rows, n, keys, key)).transpose(1, 2) for part in (q, k))
    v = v.reshape(rows, n, heads, value).transpose(1, 2)
    rate = b.sigmoid().float()
    decay = -weights.a_log.float().exp() * F.softplus(a.float() + weights.dt_bias.float())
    if count is not None:
        real = torch.arange(n, device=inputs.device).view(1, n, 1) < count
        rate, decay = rate * real, decay * real
    seen.copy_(last_of(whole, seen.shape[-1], count))
    read = delta_rule(q * key**-0.5, k, v, decay.transpose(1, 2), rate.transpose(1, 2), state)
    read = read.transpose(1, 2).to(inputs.dtype)
    return gated_norm(read, gate.reshape(rows, n, heads, value), weights.norm, weights.eps).reshape(rows, n, -1)


def last_of(whole: Tensor, reach: int, count: Tensor | None) -> Tensor:
    """[B, channels, reach], the last real columns of `whole` [B, channels, reach + n], which begins with those before."""
    if count is None:
        return whole[..., -reach:]
    return whole.index_select(2, count + torch.arange(reach, device=whole.device))


def convolved(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """[B, channels, n] of x [B, channels, n + reach - 1], each channel by its own kernel."""
    if x.shape[-1] > kernels.shape[1]:
        return F.conv1d(x, kernels.unsqueeze(1).to(x.dtype), bias, groups=x.shape[1])
    made = (x.float() * kernels.float()).sum(-1, keepdim=True)  # of one place it is a sum, which compilers fuse
    return (made if bias is None else made + bias.float().unsqueeze(-1)).to(x.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of x [..., V] times `weight`, times SiLU of `gate`, rounded where the library rounds."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * wide.to(x.dtype) * F.silu(gate.float())).to(x.dtype)


def by_kernels(
    inputs: Tensor, gate: Tensor, a: Tensor, b: Tensor, weights: Weights, seen: Tensor, state: Tensor, count: Tensor | None
) -> Tensor:  # fmt: skip
    """`by_torch` by kernels of ours."""
    from .linear_attention_kernel import gated, mixed, read_many, read_one

    rows, heads, _, value = state.shape
    n, reach = inputs.shape[1], seen.shape[-1]
    inputs, gate, a, b = (part.contiguous() for part in (inputs, gate, a, b))
    of_tokens = (a, b, weights.a_log, weights.dt_bias)
    made = mixed(inputs, seen, weights.kernels, weights.bias, step=n == 1 and count is None)
    if n == 1 and count is None:
        return read_one(made, gate, *of_tokens, weights.norm, weights.eps, state).view(rows, 1, heads * value)
    read = read_many(made, *of_tokens, state, count)
    # Those of the last `reach` tokens, where there are so many.
    place = (n if count is None else count) - torch.arange(reach, 0, -1, device=inputs.device)
    fresh = inputs.index_select(1, place.clamp_min(0)).transpose(1, 2)
    seen.copy_(torch.where(place >= 0, fresh, seen.index_select(2, (place + reach).clamp_max(reach - 1))))
    return gated(read, gate.view(rows, n, heads, value), weights.norm, weights.eps).view(rows, n, heads * value)


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype, keys: int, heads: int, key: int, value: int, reach: int) -> str:
    """Why torch computes layers of these sizes; '' where our kernels do. Tried once, against torch. Waits."""
    if device.type != "cuda" or dtype not in TOLERANCE:
        return f"there are no kernels for {dtype} on {device.type}"
    try:
        from .linear_attention_kernel import INTERPRETED

        if INTERPRETED and not allow_interpreter:
            return "Triton interprets, which is for tests"
        with on_device(device):
            for found, wanted in trial(device, dtype, keys, heads, key, value, reach):
                off = (found.float() - wanted.float()).abs().max()
                if not off <= TOLERANCE[dtype] * wanted.float().abs().max():
                    return f"a kernel is {float(off):.2g} off on {device}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # not installed, no compiler, a card that Triton does not know
        log.warning("linear attention: torch's operators, because our kernels failed", exc_info=True)
        return one_line(error)
    return ""


def trial(
    device: torch.device, dtype: torch.dtype, keys: int, heads: int, key: int, value: int, reach: int
) -> list[tuple[Tensor, Tensor]]:
    """What the kernels make of some numbers, and torch: many tokens after none, more behind them that are padded, and one."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    channels, rows = 2 * keys * key + heads * value, 1
    weights = Weights(random(channels, reach), None, random(heads), random(heads), 1 + 0.1 * random(value), 1e-6)
    kept = [
        (
            torch.zeros(rows, channels, reach, device=device, dtype=dtype),
            torch.zeros(rows, heads, key, value, device=device),
        )
        for _ in range(2)
    ]
    results: list[tuple[Tensor, Tensor]] = []
    for n, count in ((70, None), (40, 37), (1, None)):
        real = None if count is None else torch.full((1,), count, device=device)
        inputs, gate, a, b = (random(rows, n, width) for width in (channels, heads * value, heads, heads))
        both = [
            way(inputs, gate, a, b, weights, *states, real)[:, :count] for way, states in zip(WAYS, kept, strict=True)
        ]
        results += [(both[0], both[1]), *((ours.clone(), theirs.clone()) for ours, theirs in zip(*kept, strict=True))]
    return results


WAYS = (by_kernels, by_torch)


def note(device: torch.device) -> str:
    """For a report: why torch's operators ran on a card; '' where our kernels did, or nothing ran."""
    reason = _missing.get(device, "")
    return f"linear attention: torch's operators, because {reason}" if reason else ""


def take_over(layers: Iterable[Any]) -> int:
    """Let the library's layers of linear attention compute what they do here; returns how many.

    Releases before 5.12 forget what they know when several tokens come after others.
    """
    found = [layer.linear_attn for layer in layers if known(getattr(layer, "linear_attn", None))]
    for linear in found:
        linear.forward = MethodType(_as_the_library, linear)
    return len(found)


def known(linear: Any) -> bool:
    """Whether a layer has the parts that are asked of it here."""
    return all(getattr(linear, name, None) is not None for name in PARTS) and hasattr(linear.norm, "variance_epsilon")


def _as_the_library(
    self: Any, hidden_states: Tensor, *_: Any, attention_mask: Tensor | None = None, **given: Any
) -> Tensor:
    """The layer's own `forward`. Its name for the cache is another one every few releases."""
    cache = next((given[name] for name in ("cache", "cache_params", "past_key_values") if name in given), None)
    shapes = state_shapes(self, len(hidden_states), hidden_states.dtype)
    if cache is None:
        seen, state = (torch.zeros(size, device=hidden_states.device, dtype=kind) for size, kind in shapes)
    else:
        seen, state = states_in(cache, int(self.layer_idx), shapes, hidden_states.device)
    mask = None if attention_mask is None else attention_mask[:, -hidden_states.shape[1] :]
    return many(self, hidden_states, seen, state, mask)


def _run(
    inputs: Tensor, gate: Tensor, a: Tensor, b: Tensor, kernels: Tensor, bias: Tensor | None, a_log: Tensor,
    dt_bias: Tensor, norm: Tensor, eps: float, seen: Tensor, state: Tensor, count: Tensor | None,
) -> Tensor:  # fmt: skip
    weights = Weights(kernels, bias, a_log, dt_bias, norm, eps)
    _, heads, key, value = state.shape
    keys = (inputs.shape[2] - heads * value) // (2 * key)
    missing = why_not(inputs.device, inputs.dtype, keys, heads, key, value, seen.shape[-1])
    _missing[inputs.device] = missing
    way = by_torch if missing else by_kernels
    with on_device(inputs.device):
        return way(inputs, gate, a, b, weights, seen, state, count)


def _shape_of_result(inputs: Tensor, gate: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gate)


LINEAR_ATTENTION = operator(
    "linear_attention",
    "Tensor inputs, Tensor gate, Tensor a, Tensor b, Tensor kernels, Tensor? bias, Tensor a_log, Tensor dt_bias, Tensor norm, "
    "float eps, Tensor(a!) seen, Tensor(b!) state, Tensor? count",
    _run,
    _shape_of_result,
)
