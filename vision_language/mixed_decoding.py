"""The decode step of decoders that are not dense: with experts, and with layers of linear attention between the others.

Layers of linear attention have states where the others have keys and values. The library's own parts are used for all that
stands around attention: norms, projections, feed-forward parts and routers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host.streamed_layers import StreamedLayer
from . import decode_attention, decoding
from .decoding import DecodeStep, rotate, text_decoder
from .experts import PackedExperts, chosen_experts, packable
from .linear_attention import LinearAttention, known

EXPERTS = ("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text")
MIXED_MODELS = ("qwen3_5", "qwen3_5_text", *EXPERTS)
LOOKS = ("cpu",)  # devices whose host may look which experts were chosen


def unsupported(network: Any) -> str:
    """Why `network` cannot take the static decode step, its own or the dense one; '' when it can."""
    if network.config.model_type not in MIXED_MODELS:
        return decoding.unsupported(network)
    decoder = text_decoder(network)
    config = decoder.config
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}"
    if any(isinstance(layer, StreamedLayer) for layer in decoder.layers):
        return "some of its layers are streamed from CPU memory"
    if decoding.has_windows(network):
        return "some of its layers use a sliding window"
    for layer in decoder.layers:
        if reason := _unknown(layer):
            return reason
    return decoding.unsupported_rope(network)


def keeps_all(network: Any) -> bool:
    """Whether what the layers of `network` keep is all that later tokens need of earlier ones: no window, nothing unknown."""
    if network.config.model_type not in (*decoding.DENSE_MODELS, *MIXED_MODELS) or decoding.has_windows(network):
        return False
    linear = [layer.linear_attn for layer in text_decoder(network).layers if hasattr(layer, "linear_attn")]
    return all(map(known, linear))


def _unknown(layer: Any) -> str:
    """Why a layer is not one of those that `MixedLayer` knows; '' when it is."""
    if not hasattr(layer, "linear_attn") and not hasattr(layer, "self_attn"):
        return f"a {type(layer).__name__} has no attention that is known here"
    if hasattr(layer, "linear_attn") and not known(layer.linear_attn):
        return "its layers of linear attention have other parts than those that are known here"
    experts = getattr(layer.mlp, "experts", None)
    if experts is not None and not (isinstance(experts, PackedExperts) or packable(experts)):
        return "the transformers that is installed keeps its experts in another way"
    return ""


def step_of(network: Any, compile_part: Callable[[Any], Any] | None, attention_name: str) -> DecodeStep:
    """The decode step of `network`, dense or not."""
    kind = MixedStep if network.config.model_type in MIXED_MODELS else DecodeStep
    return kind(network, compile_part, attention_name)


class MixedLayer(nn.Module):
    """One decoder layer for one new token of each row, over its keys and values or its state."""

    def __init__(self, layer: Any, attention_name: str) -> None:
        super().__init__()
        self.attends = hasattr(layer, "self_attn")
        self.mix: Any = (
            Attention(layer.self_attn, attention_name) if self.attends else LinearAttention(layer.linear_attn)
        )
        self.mlp = layer.mlp
        self.norm_in, self.norm_mid = layer.input_layernorm, layer.post_attention_layernorm
        if self.attends:
            self.heads, self.head_dim, self.groups = self.mix.heads, self.mix.head_dim, self.mix.groups

    def states(self, rows: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what a layer of linear attention keeps."""
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = self.mix.states(rows, dtype)
        return shapes

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, second: Tensor, slot: Tensor, bias: Tensor
    ) -> Tensor:
        """x: [B, hidden]. first, second: keys and values as of `DecodeLayer`, or the states, rewritten in place."""
        x = x + self.mix(self.norm_in(x), cos, sin, first, second, slot, bias)
        return x + feed_forward(self.mlp, self.norm_mid(x))


class Attention(nn.Module):
    """Attention of one token, where the library's layer asks for it with a gate for every number that comes out."""

    def __init__(self, attention: Any, attention_name: str) -> None:
        super().__init__()
        self.attend = decode_attention.ATTEND[attention_name]
        self.attention = attention
        self.head_dim = int(attention.head_dim)
        self.groups = int(attention.num_key_value_groups)
        self.heads = int(attention.k_proj.out_features) // self.head_dim  # of keys and values
        self.gated = int(attention.q_proj.out_features) == 2 * self.heads * self.groups * self.head_dim

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, bias: Tensor
    ) -> Tensor:
        part, rows = self.attention, x.shape[0]
        q, k, v = projected(part, x)
        q = q.view(rows, self.heads, self.groups, -1)
        gate: Tensor | None = None
        if self.gated:
            q, gate = q.chunk(2, dim=-1)
        k = k.view(rows, self.heads, 1, self.head_dim)
        if getattr(part, "q_norm", None) is not None:
            q, k = part.q_norm(q), part.k_norm(k)
        keys.index_copy_(2, slot, rotate_first(k, cos, sin))
        values.index_copy_(2, slot, v.view(rows, self.heads, 1, self.head_dim))
        seen = self.attend(rotate_first(q, cos, sin), keys, values, bias, slot).reshape(rows, -1)
        if gate is not None:
            seen = seen * gate.reshape(rows, -1).sigmoid()
        made: Tensor = part.o_proj(seen)
        return made


def projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [..., hidden], by one product where they are merged."""
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    if hasattr(attention, "qkv_proj"):
        q, k, v = attention.qkv_proj(x).split([int(layer.out_features) for layer in layers], dim=-1)
    else:
        q, k, v = (layer(x) for layer in layers)
    return q, k, v


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for as many numbers of a head as there are angles for."""
    turned = cos.shape[-1]
    if turned == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :turned], cos, sin), x[..., turned:]), dim=-1)


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """[B, hidden] through the library's part; where there are experts, on a card without asking the host which were chosen."""
    made: Tensor
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        made = mlp.down_proj(F.silu(gate) * up)
        return made
    if not hasattr(mlp, "experts"):
        made = mlp(x)
        return made
    if x.device.type in LOOKS:
        whole: Tensor = mlp(x.unsqueeze(1))
        return whole.squeeze(1)
    _, weights, chosen = mlp.gate(x)
    made = chosen_experts(mlp.experts, x, chosen, weights)
    if hasattr(mlp, "shared_expert"):
        made = made + mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x)
    return made


class MixedHead(nn.Module):
    """The last norm, the library's own, and the output head."""

    def __init__(self, norm: Any, head: Any) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.norm(x))
        return made


class MixedStep(DecodeStep):
    """`DecodeStep` with layers of both kinds."""

    def parts(self, network: Any, attention_name: str) -> tuple[list[nn.Module], nn.Module]:
        decoder = text_decoder(network)
        layers: list[nn.Module] = [MixedLayer(layer, attention_name) for layer in decoder.layers]
        return layers, MixedHead(decoder.norm, network.lm_head)
