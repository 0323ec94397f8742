"""Prefill: the question through the decoder once, giving the first logits and the keys and values to continue from.

Positions are always passed explicitly, so that nothing depends on what the library remembers of an earlier call. The
keys and values of a question's pictures (system message included) are kept per model: another question about the same
pictures computes only its own words.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import BoundedCache, content_key, listed
from . import mixed_decoding, rotary
from .decoding import Workspace, text_decoder
from .embeddings import VisualItem
from .encoder_outputs import given, grids
from .interruption import interruptible
from .library_cache import contents, fresh_cache, states_in
from .loaded_model import LoadedModel
from .prompts import Prompt

PREFIX_LIMIT = 1 << 30  # bytes of the device, per model


@dataclass
class Prefilled:
    """logits: [B, V] after the last token; cache: the library's; mask: [B, T]; positions: [B] of the next token."""

    logits: Tensor
    cache: Any
    mask: Tensor
    positions: Tensor
    reused: int = 0  # tokens whose keys and values came from the prefix cache

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values per layer, [B, heads, T, D]; of linear attention its inputs and its state."""
        both = contents(self.cache)
        return [first for first, _ in both], [second for _, second in both]

    def repeated(self, rows: int) -> Prefilled:
        """The same question `rows` times, for several answers to it."""
        if rows == 1:
            return self
        # Its method for repeating knows no layers of linear attention.
        self.cache.reorder_cache(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(rows))
        return Prefilled(
            self.logits.repeat_interleave(rows, 0),
            self.cache,
            self.mask.repeat_interleave(rows, 0),
            self.positions.repeat_interleave(rows, 0),
            self.reused,
        )


@dataclass(frozen=True)
class PrefixState:
    """What the first positions of a question leave for the next one with the same beginning.

    kept: keys and values, [2, layers that attend, 1, heads, length, D]. shift: rotary position less place of every later token.
    states: what each layer of linear attention keeps, as of `linear_attention.state_shapes`.
    """

    kept: Tensor
    shift: int
    states: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def length(self) -> int:
        return int(self.kept.shape[4])

    @classmethod
    def of(cls, space: Workspace, length: int, shift: int) -> PrefixState:
        """A copy of the first `length` positions of decode buffers of one row; states know all that was put in."""
        states = (
            (first.clone(), second.clone())
            for first, second, attends in zip(space.keys, space.values, space.attends, strict=True)
            if not attends
        )
        return cls(space.kept[..., :length, :].clone(), shift, tuple(states))

    def put_into(self, space: Workspace, keys_too: bool) -> None:
        """Let decode buffers go on from here. keys_too: its keys and values are not there already."""
        if keys_too:
            space.kept[..., : self.length, :].copy_(self.kept)
        places = [index for index, attends in enumerate(space.attends) if not attends]
        for index, (first, second) in zip(places, self.states, strict=True):
            space.keys[index].copy_(first)
            space.values[index].copy_(second)

    @classmethod
    def of_cache(cls, cache: Any, states_at: Sequence[int], length: int, shift: int) -> PrefixState:
        """`of` of the library's cache, whose layers `states_at` keep states."""
        both = contents(cache)
        attending = [pair for index, pair in enumerate(both) if index not in states_at]
        kept = torch.stack(
            [torch.stack([part[:, :, :length] for part in parts]) for parts in zip(*attending, strict=True)]
        )
        return cls(kept, shift, tuple((both[index][0].clone(), both[index][1].clone()) for index in states_at))

    def put_into_cache(self, cache: Any, states_at: Sequence[int]) -> None:
        """Let the library's cache, which is empty, go on from here."""
        for index, pair in zip(states_at, self.states, strict=True):
            shapes = [(tuple(part.shape), part.dtype) for part in pair]
            for mine, theirs in zip(states_in(cache, index, shapes, pair[0].device), pair, strict=True):
                mine.copy_(theirs)
        layers = len(states_at) + self.kept.shape[1]
        attending = (index for index in range(layers) if index not in states_at)
        for index, keys, values in zip(attending, *self.kept, strict=True):
            cache.update(keys, values, index)


def left_padded(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, kinds), each [B, T], shorter prompts padded at their left."""
    longest = max(prompt.length for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.length :] = prompt.ids[0]
        kinds[row, longest - prompt.length :] = prompt.kinds[0]
        mask[row, longest - prompt.length :] = 1
    return ids, mask, kinds


def rotary_positions(
    model: LoadedModel, ids: Tensor, mask: Tensor, kinds: Tensor, items: Sequence[VisualItem]
) -> tuple[Tensor, Tensor]:
    """(positions of every token, positions [B] of the next one).

    Vision models: [4, B, T], the text position and the three rotary axes. Text models: [B, T].
    """
    plain = (mask.cumsum(-1) - 1).clamp_min(0)
    if model.processor is None:
        return plain, plain[:, -1] + 1
    if not items:
        return plain.unsqueeze(0).expand(4, -1, -1), plain[:, -1] + 1
    if model.model_type in rotary.TRAINED_SO:
        vision = model.config.vision_config
        axes = rotary.positions(
            kinds, mask, items, int(vision.spatial_merge_size), getattr(vision, "tokens_per_second", None)
        )
        return torch.cat((plain.unsqueeze(0), axes)), axes[0, :, -1] + 1
    method = model.network.model.get_rope_index
    cpu = torch.device("cpu")
    steps = [item.step for item in items if item.kind == "video"]
    offered: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": kinds.int(),
        "image_grid_thw": grids(items, "image", cpu),
        "video_grid_thw": grids(items, "video", cpu),
        "second_per_grid_ts": torch.tensor(steps) if steps else None,
    }
    known = inspect.signature(method).parameters
    axes, _ = method(**{name: value for name, value in offered.items() if name in known and value is not None})
    axes = axes.long()
    return torch.cat((plain.unsqueeze(0), axes)), axes[0, :, -1] + 1


def prefix_cache(model: LoadedModel) -> BoundedCache[PrefixState]:
    known: BoundedCache[PrefixState] | None = model.device_state.get("prefix")
    if known is None:
        known = model.device_state["prefix"] = listed(BoundedCache("image prefixes", PREFIX_LIMIT))
    return known


def prefix_key(model: LoadedModel, prompt: Prompt) -> str:
    """Everything the keys and values of the prefix depend on; '' when there is none that could be kept."""
    if not prompt.prefix or not all(item.key for item in prompt.items) or not mixed_decoding.keeps_all(model.network):
        return ""
    seen = [[item.key, list(item.grid), item.step] for item in prompt.items]
    return content_key(prompt.ids[:, : prompt.prefix], seen)


def prefill(model: LoadedModel, prompts: Sequence[Prompt], use_prefix: bool = True) -> Prefilled:
    """Run the decoder over `prompts` (the network is resident), left-padded when there are several.

    use_prefix: look for, and keep, the keys and values of the pictures; only for one prompt, and only for decoders
    whose cache holds every position.
    """
    items = [item for prompt in prompts for item in prompt.items]
    ids, mask, kinds = left_padded(prompts, model.pad_id)
    positions, following = rotary_positions(model, ids, mask, kinds, items)
    shift = int(following[0]) - prompts[0].length
    device = model.device
    ids, mask, kinds = ids.to(device), mask.to(device), kinds.to(device)
    positions, following = positions.to(device), following.to(device)
    key = prefix_key(model, prompts[0]) if use_prefix and len(prompts) == 1 else ""
    known = prefix_cache(model).get(key) if key else None
    cache = fresh_cache(model.network)
    start = reused = 0
    if known is not None:
        known.put_into_cache(cache, states_at(model))
        start = reused = known.length
    # A state knows everything before it: where there are some, the pictures go first, and are kept as they are then.
    apart = bool(key and states_at(model)) and known is None
    for stop in [prompts[0].prefix, ids.shape[1]] if apart else [ids.shape[1]]:
        arguments: dict[str, Any] = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[..., start:stop],
            model.cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if items and "mm_token_type_ids" in model.tower_signature:
            arguments["mm_token_type_ids"] = kinds[:, start:stop]
        with torch.no_grad(), interruptible(model.network), given(model, () if start else items) as seen:
            logits = model.network(**arguments, **seen).logits[:, -1]
        if key and known is None:
            made = PrefixState.of_cache(cache, states_at(model), prompts[0].prefix, shift)
            known = prefix_cache(model).put(key, made)
        start = stop
    return Prefilled(logits, cache, mask, following, reused)


def states_at(model: LoadedModel) -> list[int]:
    """The layers of linear attention."""
    layers = text_decoder(model.network).layers
    return [index for index, layer in enumerate(layers) if hasattr(layer, "linear_attn")]
