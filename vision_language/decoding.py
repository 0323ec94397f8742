"""The decode step of a dense Qwen decoder over a static key/value cache: one token in, logits out, nothing allocated.

The library's forward pass prefills; this step continues from its keys and values. While text is written all three
rotary axes of a Qwen-VL model advance together, so the multimodal rotary embedding (Qwen2-VL, section 2.1) is the plain
one here. Buffers keep their addresses, so that the whole step is one CUDA graph; its layers share one compiled kernel
set. Cache lengths come in buckets: a longer prompt of the same bucket compiles and captures nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host.capturing import GraphMemory, captured
from ..host.streamed_layers import StreamedLayer
from . import decode_attention

log = logging.getLogger("hotpath.vision_language")

DENSE_MODELS = ("qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BUCKETS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 131072, 262144)
GRAPH_WARMUP = 3


def bucket_length(tokens: int) -> int:
    """The cache length for a prompt and an answer of `tokens` together."""
    return next((length for length in BUCKETS if length >= tokens), -(-tokens // BUCKETS[0]) * BUCKETS[0])


def text_decoder(network: Any) -> Any:
    """The module with `embed_tokens`, `layers` and `norm` inside a vision-language or text model."""
    model = network.model
    return getattr(model, "language_model", model)


def has_windows(network: Any) -> bool:
    """Whether some layers of a decoder look through a window, so that their cache drops what has left it."""
    return not {*(getattr(text_decoder(network).config, "layer_types", None) or ())} <= {
        "full_attention",
        "linear_attention",
    }


def unsupported(network: Any) -> str:
    """Why `network` cannot take the static decode step; '' when it can."""
    decoder = text_decoder(network)
    config = decoder.config
    if network.config.model_type not in DENSE_MODELS:
        return f"{network.config.model_type} is not one of the dense Qwen decoders"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}"
    if has_windows(network):
        return "some of its layers use a sliding window"
    if any(isinstance(layer, StreamedLayer) for layer in decoder.layers):
        return "some of its layers are streamed from CPU memory"
    first = decoder.layers[0]
    if not hasattr(first.self_attn, "qkv_proj") or not hasattr(first.mlp, "gate_up_proj"):
        return "its projections are packed by another library"
    return unsupported_rope(network)


def unsupported_rope(network: Any) -> str:
    """Why the angles of a token cannot be computed from its place alone; '' when they can."""
    rope = getattr(text_decoder(network).rotary_emb, "rope_type", "default")
    return "" if rope in ("default", "mrope", "yarn", "linear", "llama3") else f"its rotary embedding is {rope}"


def query_shape(network: Any, rows: int) -> tuple[int, int, int, int]:
    """[rows, key heads, queries that share a key head, D] of one new token of each row."""
    attention = next(layer.self_attn for layer in text_decoder(network).layers if hasattr(layer, "self_attn"))
    dim = int(attention.head_dim)
    return rows, int(attention.k_proj.out_features) // dim, int(attention.num_key_value_groups), dim


def weight_addresses(network: Any) -> tuple[int, ...]:
    """Where the decoder's weights are now. A CUDA graph reads these addresses, whoever lives there."""
    decoder = text_decoder(network)
    held = (*decoder.parameters(), *decoder.buffers(), network.lm_head.weight)
    # What oneDNN ordered tells no address, and moves nowhere.
    return tuple(tensor.data_ptr() if tensor.layout == torch.strided else id(tensor) for tensor in held)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, heads, n, D]; cos, sin: [B, 1, 1, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class DecodeLayer(nn.Module):
    """One decoder layer for one new token of each row, over its static cache."""

    attends = True  # has keys and values

    def __init__(self, layer: Any, attention_name: str = decode_attention.TORCH) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.attend = decode_attention.ATTEND[attention_name]
        self.qkv, self.out = attention.qkv_proj, attention.o_proj
        self.gate_up, self.down = mlp.gate_up_proj, mlp.down_proj
        self.norm_in, self.norm_mid = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim = int(attention.head_dim)
        self.groups = int(attention.num_key_value_groups)
        self.heads = int(attention.k_proj.out_features) // self.head_dim  # of keys and values
        self.eps = float(layer.input_layernorm.variance_epsilon)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, bias: Tensor
    ) -> Tensor:
        """x: [B, hidden]; keys, values: [B, heads, length, D], written at `slot` [1]; bias: [B, 1, 1, length]."""
        rows, heads, groups, dim = x.shape[0], self.heads, self.groups, self.head_dim
        qkv = self.qkv(rms_norm(x, self.norm_in.weight, self.eps))
        q, k, v = qkv.split((heads * groups * dim, heads * dim, heads * dim), dim=-1)
        # The query heads that share a key head stand side by side: they are that head's queries.
        q, k = q.view(rows, heads, groups, dim), k.view(rows, heads, 1, dim)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm.weight, self.eps)
            k = rms_norm(k, self.k_norm.weight, self.eps)
        keys.index_copy_(2, slot, rotate(k, cos, sin))
        values.index_copy_(2, slot, v.view(rows, heads, 1, dim))
        seen = self.attend(rotate(q, cos, sin), keys, values, bias, slot)
        x = x + self.out(seen.reshape(rows, heads * groups * dim))
        gate, up = self.gate_up(rms_norm(x, self.norm_mid.weight, self.eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class DecodeHead(nn.Module):
    """The last norm and the output head."""

    def __init__(self, norm: Any, head: Any) -> None:
        super().__init__()
        self.norm, self.head = norm, head
        self.eps = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(rms_norm(x, self.norm.weight, self.eps))


class DecodeStep(nn.Module):
    """The decoder's layers for one token, sharing the weights of `network`."""

    note = ""  # how its products are made, for the report

    def __init__(
        self,
        network: Any,
        compile_part: Callable[[Any], Any] | None = None,
        attention_name: str = decode_attention.TORCH,
    ) -> None:
        super().__init__()
        decoder = text_decoder(network)
        layers, self.head = self.parts(network, attention_name)
        self.layers = nn.ModuleList(layers)
        # In a tuple: these are shared, and moving them is the network's business.
        self._shared = (decoder.embed_tokens, decoder.rotary_emb)
        wrap = compile_part if compile_part is not None else lambda part: part
        self._run, self._finish = [wrap(layer) for layer in self.layers], wrap(self.head)

    def parts(self, network: Any, attention_name: str) -> tuple[list[nn.Module], nn.Module]:
        """The layers, and the head with its norm."""
        decoder = text_decoder(network)
        layers: list[nn.Module] = [DecodeLayer(layer, attention_name) for layer in decoder.layers]
        return layers, DecodeHead(decoder.norm, network.lm_head)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slot: Tensor,
        bias: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """tokens, positions: [B]; slot: [1]; keys, values: of each layer, or its states; returns logits [B, vocabulary]."""
        embed, rotary = self._shared
        x = embed(tokens)
        angles = positions.float().unsqueeze(-1) * rotary.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        cos = (angles.cos() * rotary.attention_scaling).to(x.dtype)
        sin = (angles.sin() * rotary.attention_scaling).to(x.dtype)
        for layer, k, v in zip(self._run, keys, values, strict=True):
            x = layer(x, cos, sin, k, v, slot, bias)
        return self._finish(x)


class Workspace:
    """The buffers of one batch size and one cache length, and on CUDA the graph that runs the step over them."""

    def __init__(
        self,
        step: DecodeStep,
        rows: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        growing: bool = False,
    ) -> None:
        """growing: the step is given only what is filled, so its shapes change; not for what is compiled or recorded."""
        self.step, self.rows, self.length = step, rows, length
        self.growing, self.filled = growing, 0
        layers: list[Any] = list(step.layers)
        attending = [layer for layer in layers if layer.attends]
        # One piece of memory for all layers: a prefix is copied in or out in one go.
        shape = (2, len(attending), rows, attending[0].heads, length, attending[0].head_dim)
        self.kept = torch.zeros(shape, device=device, dtype=dtype)
        self.attends = [layer.attends for layer in layers]
        places = iter(zip(*self.kept, strict=True))
        of_layers = [
            next(places)
            if layer.attends
            else [torch.zeros(size, device=device, dtype=kind) for size, kind in layer.states(rows, dtype)]
            for layer in layers
        ]
        self.keys, self.values = ([pair[place] for pair in of_layers] for place in (0, 1))  # or states
        self.bias = torch.full((rows, 1, 1, length), float("-inf"), device=device, dtype=dtype)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self._zero = torch.zeros((rows, 1, 1, 1), device=device, dtype=dtype)
        self.logits: Tensor | None = None
        self.graph: Any = None
        self.memory: GraphMemory | None = None  # what a model's graphs share: one of them runs at a time
        self.note = ""  # which attention runs in it, and why
        self.prefix = ""  # the key of the prefix whose keys and values these are, if they are one's
        self.prefills: dict[tuple[int, int], Any] = {}  # recordings that write into these buffers

    def nbytes(self) -> int:
        states = zip(self.keys, self.values, self.attends, strict=True)
        return self.kept.nbytes + sum(first.nbytes + second.nbytes for first, second, attends in states if not attends)

    def begin(self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, positions: Tensor) -> None:
        """Continue after a prefill. keys, values: per layer [B or 1, heads, T, D], or its states; mask: [B, T] of 0/1
        (left padding).

        positions: [B] rotary position of the next token.
        """
        filled = mask.shape[1]
        for mine, theirs, attends in zip((*self.keys, *self.values), (*keys, *values), 2 * self.attends, strict=True):
            (mine[:, :, :filled] if attends else mine).copy_(theirs)
        self.bias.fill_(float("-inf"))
        self.bias[:, 0, 0, :filled].masked_fill_(mask.bool(), 0.0)
        self.positions.copy_(positions)
        self.slot.fill_(filled)
        self.filled, self.prefix = filled, ""

    def _advance(self) -> Tensor:
        self.bias.index_copy_(3, self.slot, self._zero)
        bias, keys, values = self.bias, self.keys, self.values
        if self.growing:
            self.filled += 1
            bias = bias[..., : self.filled]
            keys, values = (
                [
                    part[:, :, : self.filled] if attends else part
                    for part, attends in zip(both, self.attends, strict=True)
                ]
                for both in (keys, values)
            )
        logits = self.step(self.tokens, self.positions, self.slot, bias, keys, values)
        self.positions.add_(1)
        self.slot.add_(1)
        return logits

    def warm_up(self) -> None:
        """Run the step once, so that what must be compiled is. Overwrites the buffers, so call it before `begin`."""
        self.slot.zero_()
        self._advance()

    def capture(self) -> None:
        """Record the step as a CUDA graph. Overwrites the buffers, so call it before `begin`."""
        self.slot.zero_()
        # Each warm run moves the slot on by one; `begin` sets it.
        self.graph, self.logits = captured(self._advance, GRAPH_WARMUP, self.tokens.device, self.memory)

    def run(self, tokens: Tensor) -> Tensor:
        """The logits after `tokens` [B]. On CUDA they are overwritten by the next run."""
        self.tokens.copy_(tokens)
        if self.graph is None:
            return self._advance()
        self.graph.replay()
        assert self.logits is not None
        return self.logits
