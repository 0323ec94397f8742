"""The prefill of one question into the buffers of the decode step, as a CUDA graph for each class of lengths.

The library's forward pass starts some thirty kernels a layer from the host, which takes longer than the card needs to
run them, whether a question has a thousand tokens or ten. Here the tokens are padded at their right to the length of
their class, where no later position sees what is not real, and everything that a call brings (ids, positions, features
of pictures) lies at fixed addresses. A class is recorded when it first occurs, after it ran once as it is.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..host import pinned_memory
from ..host.capturing import captured
from . import decode_products, fused_decode
from .decoding import DENSE_MODELS, Workspace, bucket_length, rms_norm, rotate, text_decoder
from .embeddings import VisualFeatures, VisualItem
from .encoder_outputs import on_device
from .loaded_model import LoadedModel
from .prefill import PrefixState, prefix_cache, prefix_key, rotary_positions
from .prompts import Prompt

log = logging.getLogger("hotpath.vision_language")

LONGEST = 2048  # tokens of a whole question; one that is longer keeps a card busy without a graph
LONGEST_AFTER_PREFIX = 512
SHORTEST = 32  # fewer tokens take as long: weights are read once either way
STEP = 64  # lengths of whole questions are multiples of it
RECORDINGS = 12  # kept for each cache length, the least recently used go first


def length_class(tokens: int, after_prefix: bool) -> int:
    """How many tokens are run for `tokens`: a power of two after a prefix, else four significant bits."""
    if after_prefix:
        return max(SHORTEST, 1 << (tokens - 1).bit_length())
    step = max(STEP, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def reach(positions: int, length: int) -> int:
    """How far a question that ends at `positions` looks in a cache of `length`: a cache is mostly room for the answer."""
    return min(bucket_length(positions), length)


def why_not(model: LoadedModel, tokens: int) -> str:
    """Why a question of so many tokens is not replayed; '' when it is."""
    if model.model_type not in DENSE_MODELS:
        return f"{model.model_type} is not one of the dense Qwen decoders"
    return f"it has more than {LONGEST:,} tokens" if tokens > LONGEST else ""


class PrefillRecording:
    """One class of lengths over one workspace."""

    def __init__(
        self, space: Workspace, network: Any, tokens: int, seen: int, axes: int, features: Tensor | None
    ) -> None:
        """seen: positions of the cache that attention reads, those before the tokens included; 0 where there are none before.

        axes: rotary axes of the model, 3 or 1. features: [levels, rows, hidden], the first row of each is zero.
        """
        # Weakly: the buffers hold their recordings, and must go at once when room is needed.
        self._space = weakref.ref(space)
        self.tokens, self.seen, self.axes = tokens, seen, axes
        self.features = None if seen else features
        decoder = text_decoder(network)
        # In a tuple: these are the network's, which moves them.
        self._shared = (decoder.embed_tokens, decoder.rotary_emb)
        device = space.tokens.device
        # ids, rows of features, positions on every axis; then start, last, filled, position of the next token.
        self.given = torch.zeros(tokens * (2 + axes) + 4, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self.graph: Any = None
        first: Any = space.step.layers[0]
        self.kernels = not kernels_missing(device, space.bias.dtype, first.head_dim, first.q_norm is not None)

    @property
    def space(self) -> Workspace:
        """The buffers that it writes into."""
        space = self._space()
        assert space is not None, "a recording was used after its buffers were gone"
        return space

    def __call__(self, numbers: Tensor) -> Tensor:
        """Logits [1, V] after the last token, overwritten by the next call. numbers: what `given` holds, on the host."""
        held = pinned_memory.pinned(numbers) if self.given.is_cuda else numbers
        self.given.copy_(held, non_blocking=True)
        if self.graph is not None:
            self.graph.replay()
        elif self.given.is_cuda:
            self._record()
        else:
            self._run()
        assert self.logits is not None
        return self.logits

    def _record(self) -> None:
        """Run once as it is, which chooses kernels and gives the result, then record."""
        self.graph, _ = captured(self._run, 1, self.given.device, self.space.memory)

    def _run(self) -> None:
        space, n = self.space, self.tokens
        embed, rotary = self._shared
        ids, rows = self.given[:n], self.given[n : 2 * n]
        start, last, filled, following = self.given[(2 + self.axes) * n :].split(1)
        positions = self.given[2 * n : (2 + self.axes) * n].view(self.axes, 1, n)
        x = embed(ids)
        deep: Tensor | None = None
        if self.features is not None:
            seen = self.features.index_select(1, rows)
            x, deep = torch.where((rows > 0).unsqueeze(-1), seen[0], x), seen[1:]
        cos, sin = rotary(x.unsqueeze(0), positions if self.axes > 1 else positions[0])
        if cos.dim() != 3:
            raise RuntimeError("the rotary embedding of this transformers version gives its axes apart")
        cos, sin = cos[0], sin[0]
        columns = torch.arange(space.length, device=x.device)
        places = torch.arange(n, device=x.device) + start
        mask = None
        if self.seen:
            closed = columns[: self.seen] > places.unsqueeze(1)
            mask = torch.zeros_like(closed, dtype=x.dtype).masked_fill_(closed, float("-inf"))
            first: Any = space.step.layers[0]
            mask = mask.repeat(first.groups, 1)
        # What the padding leaves past the end is overwritten, place by place, before anything looks there.
        places = places.clamp_max(space.length - 1)
        run = fused_layer if self.kernels else prefill_layer
        delta: Tensor | None = None  # what is still to be added to x
        for index, layer in enumerate(space.step.layers):
            x, delta = run(layer, x, delta, cos, sin, space.keys[index], space.values[index], places, mask)
            if deep is not None and index < len(deep):
                x, delta = x + delta, deep[index]
        x = x if delta is None else x + delta
        logits = space.step.head(x.index_select(0, last))
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        space.bias.zero_().masked_fill_(columns >= filled, float("-inf"))
        space.slot.copy_(filled)
        space.positions.copy_(following)


def prefill_layer(
    layer: Any, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A `DecodeLayer` for n tokens of one row: (x, what is to be added to it), as x + delta came in.

    x, delta: [n, hidden]; cos, sin: [n, D]; keys, values: [1, heads, length, D], written at `places` [n]. mask: as `attend`
    takes it, to see what the cache holds as well; None sees only these tokens, each those before it.
    """
    n, heads, groups, dim = len(x), layer.heads, layer.groups, layer.head_dim
    x = x if delta is None else x + delta
    qkv = layer.qkv(rms_norm(x, layer.norm_in.weight, layer.eps))
    q, k, v = qkv.split((heads * groups * dim, heads * dim, heads * dim), dim=-1)
    q, k, v = q.view(n, heads * groups, dim), k.view(n, heads, dim), v.view(n, heads, dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm.weight, layer.eps), rms_norm(k, layer.k_norm.weight, layer.eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    keys.index_copy_(2, places, rotate(k, cos, sin).transpose(0, 1).unsqueeze(0))
    values.index_copy_(2, places, v.transpose(0, 1).unsqueeze(0))
    x = x + layer.out(attend(rotate(q, cos, sin).transpose(0, 1), keys, values, mask))
    gate, up = layer.gate_up(rms_norm(x, layer.norm_mid.weight, layer.eps)).chunk(2, dim=-1)
    return x, layer.down(F.silu(gate) * up)


def fused_layer(
    layer: Any, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prefill_layer`, with our kernels between the products."""
    from .prefill_kernels import gate_rows, norm_rows, place_rows

    x, normed = norm_rows(x, delta, layer.norm_in.weight, layer.eps)
    q_norm = None if layer.q_norm is None else layer.q_norm.weight
    k_norm = None if layer.k_norm is None else layer.k_norm.weight
    queries = place_rows(layer.qkv(normed), cos, sin, q_norm, k_norm, layer.eps, layer.groups, keys, values, places)
    x, normed = norm_rows(x, layer.out(attend(queries, keys, values, mask)), layer.norm_mid.weight, layer.eps)
    return x, layer.down(gate_rows(layer.gate_up(normed)))


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """[n, query heads * D]. q: [query heads, n, D]; keys, values: [1, heads, length, D], from the first on if no mask.

    mask: [groups * n, positions], to be added, the rows of the queries that share a key head one below the other.
    """
    heads, dim = keys.shape[1], keys.shape[3]
    groups, n = q.shape[0] // heads, q.shape[1]
    if mask is None:
        k, v = keys[0, :, :n], values[0, :, :n]
        if groups > 1:
            k, v = (t.unsqueeze(1).expand(heads, groups, n, dim).reshape(heads * groups, n, dim) for t in (k, v))
        seen = F.scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), is_causal=True)
        return seen[0].transpose(0, 1).reshape(n, heads * groups * dim)
    # Queries that share a key head stand one below the other, so that no key is copied.
    q, positions = q.reshape(1, heads, groups * n, dim), mask.shape[1]
    seen = F.scaled_dot_product_attention(q, keys[:, :, :positions], values[:, :, :positions], attn_mask=mask)
    return seen.view(heads, groups, n, dim).permute(2, 0, 1, 3).reshape(n, heads * groups * dim)


@functools.cache
def kernels_missing(device: torch.device, dtype: torch.dtype, dim: int, normed: bool) -> str:
    """Why torch's operators stand between the products; '' where our kernels do. Tried once, against torch. Waits.

    dim: width of a head. normed: heads have norms of their own, as Qwen3's; the kernel is another one without.
    """
    if device.type != "cuda" or dtype not in decode_products.TOLERANCE:
        return f"there are none for {dtype} on {device.type}"
    try:
        from . import prefill_kernels

        if prefill_kernels.INTERPRETED and not fused_decode.allow_interpreter:
            return "Triton interprets, which is for tests"
        for found, wanted in trial(device, dtype, dim, normed):
            decode_products.check(found, wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a card that Triton does not know, numbers that are off
        log.warning("prefill: torch's operators, because our kernels failed", exc_info=True)
        return f"{type(error).__name__}: {error}"
    return ""


def trial(device: torch.device, dtype: torch.dtype, dim: int, normed: bool) -> list[tuple[Tensor, Tensor]]:
    """What our kernels make of some numbers, and torch."""
    from .prefill_kernels import gate_rows, norm_rows, place_rows

    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows, width, heads, groups, length = 5, 2 * dim + 8, 2, 2, 9
    x, delta, weight, norms = random(rows, width), random(rows, width), random(width), random(2, dim)
    qkv, gate_up = random(rows, (groups + 2) * heads * dim), random(rows, 2 * width)
    angles = torch.rand(rows, dim, generator=generator, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    places = torch.arange(rows, device=device) + 2
    keys, values = random(1, heads, length, dim), random(1, heads, length, dim)
    total, of_rows = norm_rows(x, delta, weight, 1e-6)
    q_norm, k_norm = norms if normed else (None, None)
    queries = place_rows(qkv, cos, sin, q_norm, k_norm, 1e-6, groups, keys, values, places)
    q, k, v = (part.view(rows, -1, dim) for part in qkv.split((heads * groups * dim, heads * dim, heads * dim), dim=-1))
    if normed:
        q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    gate, up = gate_up.chunk(2, dim=-1)
    return [
        (total, x + delta),
        (of_rows, rms_norm(x + delta, weight, 1e-6)),
        (queries, rotate(q, cos, sin).transpose(0, 1)),
        (keys[0, :, 2 : 2 + rows], rotate(k, cos, sin).transpose(0, 1)),
        (values[0, :, 2 : 2 + rows], v.transpose(0, 1)),
        (gate_rows(gate_up), F.silu(gate) * up),
    ]


def feature_buffer(model: LoadedModel) -> Tensor | None:
    """Where features of pictures lie for every recording of `model`: [levels, LONGEST + 1, hidden]; None without a tower."""
    if model.processor is None:
        return None
    known: Tensor | None = model.device_state.get("feature buffer")
    if known is None:
        levels = 1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
        shape = (levels, LONGEST + 1, int(model.text_config.hidden_size))
        known = model.device_state["feature buffer"] = torch.zeros(shape, device=model.device, dtype=model.dtype)
    return known


def put_features(buffer: Tensor, found: Sequence[VisualFeatures]) -> None:
    """Copy the features of pictures, in the order of the prompt, to the rows from 1 on."""
    row = 1
    for features in found:
        for level, part in enumerate((features.pooled, *features.deep)):
            buffer[level, row : row + len(part)].copy_(part)
        row += len(features.pooled)


def in_order(items: Sequence[VisualItem]) -> list[VisualItem]:
    return [item for kind in ("image", "video") for item in items if item.kind == kind]


def numbers_of(model: LoadedModel, prompt: Prompt, tokens: int, axes: int, known: PrefixState | None) -> Tensor:
    """What a recording is given for `prompt`, less what is known of it, padded to `tokens`. On the host."""
    start = 0 if known is None else known.length
    left = prompt.length - start
    made = torch.zeros(tokens * (2 + axes) + 4, dtype=torch.long)
    made[:left] = prompt.ids[0, start:]
    table = made[2 * tokens : (2 + axes) * tokens].view(axes, tokens)
    if known is not None:
        table[:, :left] = torch.arange(start + known.shift, prompt.length + known.shift)
        following = prompt.length + known.shift
    else:
        mask = torch.ones_like(prompt.ids)
        positions, after = rotary_positions(model, prompt.ids, mask, prompt.kinds, prompt.items)
        following = int(after)
        # Vision models: the text position comes before the three axes.
        table[:, :left] = positions[-axes:, 0] if positions.dim() == 3 else positions
        if prompt.items:
            seen = torch.cat([(prompt.kinds[0] == kind).nonzero()[:, 0] for kind in (1, 2)])
            made[tokens + seen] = torch.arange(1, len(seen) + 1)
    made[-4:] = torch.tensor([start, left - 1, prompt.length, following])
    return made


def replay(model: LoadedModel, space: Workspace, prompt: Prompt, use_prefix: bool) -> tuple[Tensor, int, str]:
    """Prefill `prompt` into `space`: (logits [1, V], tokens that came from the prefix cache, a note).

    The network is resident, `space` has one row and room for the prompt, which is not too long.
    """
    key = prefix_key(model, prompt) if use_prefix else ""
    known = prefix_cache(model).get(key) if key else None
    if known is not None and prompt.length - known.length > LONGEST_AFTER_PREFIX:
        known = None  # a mask over so many tokens costs more than the pictures do
    start = 0 if known is None else known.length
    tokens = length_class(prompt.length - start, known is not None)
    axes = 1 if model.processor is None else 3
    seen = 0 if known is None else reach(prompt.length, space.length)
    recording = recording_of(model, space, tokens, seen, axes)
    host.current().check_interrupt()
    if known is not None:
        if space.prefix != key:
            space.kept[..., :start, :].copy_(known.kept)
    elif recording.features is not None and prompt.items:
        put_features(recording.features, on_device(model, in_order(prompt.items)))
    space.prefix = ""
    with torch.no_grad():
        numbers = numbers_of(model, prompt, tokens, axes, known)
        logits = recording(numbers)
    space.filled, space.prefix = prompt.length, key
    if key and start == 0:
        shift = int(numbers[-1]) - prompt.length
        prefix_cache(model).put(key, PrefixState(space.kept[..., : prompt.prefix, :].clone(), shift))
    return logits, start, f"one CUDA graph of {tokens:,}" if recording.graph is not None else f"{tokens:,} in one go"


def recording_of(model: LoadedModel, space: Workspace, tokens: int, seen: int, axes: int) -> PrefillRecording:
    """The recording for a class of lengths, that of an earlier call when there was one."""
    key = (seen, tokens)
    if key in space.prefills:
        space.prefills[key] = found = space.prefills.pop(key)  # now the most recently used
        return found
    while len(space.prefills) >= RECORDINGS:
        space.prefills.pop(next(iter(space.prefills)))
    made = PrefillRecording(space, model.network, tokens, seen, axes, feature_buffer(model))
    space.prefills[key] = made
    return made
