"""Prefill: the question through the decoder once, giving the first logits and the keys and values to continue from.

Positions are always passed explicitly, so that nothing depends on what the library remembers of an earlier call. The
keys and values of a question's pictures (system message included) are kept per model: another question about the same
pictures computes only its own words.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import BoundedCache, content_key, listed
from . import decoding, rotary
from .embeddings import VisualItem
from .encoder_outputs import given, grids
from .interruption import interruptible
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
        if hasattr(self.cache, "layers"):
            both = [_kept(layer) for layer in self.cache.layers]
        else:
            pairs = zip(*(zip(*kept, strict=True) for kept in _lists(self.cache)), strict=True)
            both = [states if keys[0] is None else keys for keys, states in pairs]
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


def _kept(layer: Any) -> tuple[Tensor, Tensor]:
    """What a layer of the library's cache holds. Later releases number the states of a layer."""
    if not hasattr(layer, "recurrent_states"):
        return layer.keys, layer.values
    both = (layer.conv_states, layer.recurrent_states)
    first, second = (part[0] if isinstance(part, dict) else part for part in both)
    return first, second


def _lists(cache: Any) -> tuple[tuple[list[Any], list[Any]], tuple[list[Any], list[Any]]]:
    """(keys and values, states) of all layers in a cache that a kind of models had for itself, None where a layer has none."""
    return (cache.key_cache, cache.value_cache), (cache.conv_states, cache.recurrent_states)


@dataclass(frozen=True)
class PrefixState:
    """What the first positions of a question leave for the next one with the same beginning.

    kept: keys and values, [2, layers, 1, heads, length, D]. shift: rotary position less place of every later token.
    """

    kept: Tensor
    shift: int

    @property
    def length(self) -> int:
        return int(self.kept.shape[4])


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
    whole = model.model_type in decoding.DENSE_MODELS and not decoding.has_windows(model.network)
    if not whole or not prompt.prefix or not all(item.key for item in prompt.items):
        return ""
    seen = [[item.key, list(item.grid), item.step] for item in prompt.items]
    return content_key(prompt.ids[:, : prompt.prefix], seen)


def fresh_cache(model: LoadedModel) -> Any:
    """The library's cache for keys and values, empty. Qwen3-Next's and Qwen3.5's linear attention has one of its own in its
    module before transformers 5.5."""
    from transformers import DynamicCache

    library = vars(sys.modules[type(model.network).__module__])
    own = [kind for name, kind in library.items() if name.endswith("DynamicCache") and kind is not DynamicCache]
    return own[0](config=model.text_config) if own else DynamicCache(config=model.config)


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
    cache = fresh_cache(model)
    start = 0
    if known is not None:
        for layer, (keys, values) in enumerate(zip(*known.kept, strict=True)):
            cache.update(keys, values, layer)
        start = known.length
    arguments: dict[str, Any] = {
        "input_ids": ids[:, start:],
        "attention_mask": mask,
        "position_ids": positions[..., start:],
        model.cache_argument: cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    if items and "mm_token_type_ids" in model.tower_signature:
        arguments["mm_token_type_ids"] = kinds[:, start:]
    with torch.no_grad(), interruptible(model.network), given(model, items if known is None else ()) as seen:
        logits = model.network(**arguments, **seen).logits[:, -1]
    if key and known is None:
        length = prompts[0].prefix
        keys = torch.stack([layer.keys[:, :, :length] for layer in cache.layers])
        values = torch.stack([layer.values[:, :, :length] for layer in cache.layers])
        prefix_cache(model).put(key, PrefixState(torch.stack((keys, values)), shift))
    return Prefilled(logits, cache, mask, following, start)
