"""The prefill of one question into the buffers of the decode step, as a CUDA graph for each class of lengths.

The library's forward pass starts some thirty kernels a layer from the host, which takes longer than the card needs to
run them, whether a question has a thousand tokens or ten. Here the tokens are padded at their right to the length of
their class, where no later position sees what is not real, and everything that a call brings (ids, positions, features
of pictures) lies at fixed addresses. A class is recorded when it first occurs, after it ran once as it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host import pinned_memory
from ..host.capturing import captured
from .decoding import DENSE_MODELS, DecodeLayer, Workspace, bucket_length, text_decoder
from .embeddings import VisualFeatures, VisualItem
from .encoder_outputs import on_device
from .loaded_model import LoadedModel
from .mixed_decoding import EXPERTS, MIXED_MODELS
from .prefill import PrefixState, prefix_cache, prefix_key, rotary_positions
from .prefill_layers import fused_layer, kernels_missing, mixed_layer, prefill_layer
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
    if model.model_type in EXPERTS:
        return "the library's experts ask the host which of them were chosen"
    if model.model_type not in (*DENSE_MODELS, *MIXED_MODELS):
        return f"{model.model_type} is not one of the Qwen decoders that are known here"
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
        first: Any = next(layer for layer in space.step.layers if layer.attends)
        self.groups = int(first.groups)
        self.mixed = any(not isinstance(layer, DecodeLayer) for layer in space.step.layers)
        self.kernels = not self.mixed and not kernels_missing(
            device, space.bias.dtype, first.head_dim, first.q_norm is not None
        )

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
            mask = mask.repeat(self.groups, 1)
        else:
            for first, second, attends in zip(space.keys, space.values, space.attends, strict=True):
                if not attends:
                    first.zero_()
                    second.zero_()
        # What the padding leaves past the end is overwritten, place by place, before anything looks there.
        places = places.clamp_max(space.length - 1)
        run = fused_layer if self.kernels else prefill_layer
        delta: Tensor | None = None  # what is still to be added to x
        for index, layer in enumerate(space.step.layers):
            given = layer, x, delta, cos, sin, space.keys[index], space.values[index], places, mask
            x, delta = mixed_layer(*given, last + 1) if self.mixed else run(*given)
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


def numbers_of(model: LoadedModel, prompt: Prompt, tokens: int, axes: int, start: int, stop: int, shift: int) -> Tensor:
    """What a recording is given for the tokens start to stop of `prompt`, padded to `tokens`. On the host.

    shift: as of `PrefixState`. Pictures are among the first tokens, and end before a `stop` that is not the prompt's end.
    """
    left = stop - start
    made = torch.zeros(tokens * (2 + axes) + 4, dtype=torch.long)
    made[:left] = prompt.ids[0, start:stop]
    table = made[2 * tokens : (2 + axes) * tokens].view(axes, tokens)
    if start:
        table[:, :left] = torch.arange(start + shift, stop + shift)
    else:
        positions, _ = places_of(model, prompt)
        # Vision models: the text position comes before the three axes.
        table[:, :left] = positions[-axes:, 0, :stop] if positions.dim() == 3 else positions[:, :stop]
        if prompt.items:
            seen = torch.cat([(prompt.kinds[0] == kind).nonzero()[:, 0] for kind in (1, 2)])
            made[tokens + seen] = torch.arange(1, len(seen) + 1)
    made[-4:] = torch.tensor([start, left - 1, stop, stop + shift])
    return made


def places_of(model: LoadedModel, prompt: Prompt) -> tuple[Tensor, int]:
    """(positions of every token, the shift of those behind the pictures)."""
    positions, after = rotary_positions(model, prompt.ids, torch.ones_like(prompt.ids), prompt.kinds, prompt.items)
    return positions, int(after) - prompt.length


def replay(model: LoadedModel, space: Workspace, prompt: Prompt, use_prefix: bool) -> tuple[Tensor, int, str]:
    """Prefill `prompt` into `space`: (logits [1, V], tokens that came from the prefix cache, a note).

    The network is resident, `space` has one row and room for the prompt, which is not too long.
    """
    key = prefix_key(model, prompt) if use_prefix else ""
    known = prefix_cache(model).get(key) if key else None
    short = prompt.length - prompt.prefix <= LONGEST_AFTER_PREFIX
    if not short:
        known = None  # a mask over so many tokens costs more than the pictures do
    reused = 0 if known is None else known.length
    if known is not None:
        known.put_into(space, keys_too=space.prefix != key)
    space.prefix = ""
    shift = places_of(model, prompt)[1] if known is None else known.shift
    # A state knows everything before it: where there are some, the pictures go first, and are kept as they are then.
    apart = bool(key) and known is None and short and not all(space.attends)
    ends = [prompt.prefix, prompt.length] if apart else [prompt.length]
    kept = bool(key) and known is None and (apart or all(space.attends))
    start, ran = reused, []
    for stop in ends:
        host.current().check_interrupt()
        logits, recording = _run_part(model, space, prompt, start, stop, shift)
        ran.append((recording.tokens, recording.graph is not None))
        if kept and stop == ends[0]:
            prefix_cache(model).put(key, PrefixState.of(space, prompt.prefix, shift))
        start = stop
    space.filled, space.prefix = prompt.length, key
    return logits, reused, _said(ran)


def _run_part(
    model: LoadedModel, space: Workspace, prompt: Prompt, start: int, stop: int, shift: int
) -> tuple[Tensor, PrefillRecording]:
    """Tokens start to stop of `prompt`, behind those that are in `space`: (logits [1, V] after them, what ran)."""
    tokens = length_class(stop - start, start > 0)
    axes = 1 if model.processor is None else 3
    recording = recording_of(model, space, tokens, reach(prompt.length, space.length) if start else 0, axes)
    if recording.features is not None and prompt.items:
        put_features(recording.features, on_device(model, in_order(prompt.items)))
    with torch.no_grad():
        return recording(numbers_of(model, prompt, tokens, axes, start, stop, shift)), recording


def _said(ran: Sequence[tuple[int, bool]]) -> str:
    tokens = " and ".join(f"{count:,}" for count, _ in ran)
    if not all(recorded for _, recorded in ran):
        return f"{tokens} in one go"
    return f"one CUDA graph of {tokens}" if len(ran) == 1 else f"CUDA graphs of {tokens}"


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
