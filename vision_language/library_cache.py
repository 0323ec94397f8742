"""The library's cache for keys, values and states, whatever release it is of: made, read and filled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shape = tuple[tuple[int, ...], torch.dtype]


def fresh_cache(network: Any) -> Any:
    """An empty cache for `network`. Qwen3-Next's and Qwen3.5's linear attention has one of its own in its module before
    transformers 5.5."""
    from transformers import DynamicCache

    library = vars(sys.modules[type(network).__module__])
    own = [kind for name, kind in library.items() if name.endswith("DynamicCache") and kind is not DynamicCache]
    return own[0](config=network.config.get_text_config()) if own else DynamicCache(config=network.config)


def contents(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [B, heads, T, D]; of linear attention its inputs and its state."""
    if hasattr(cache, "layers"):
        return [_states(cache, index) or (layer.keys, layer.values) for index, layer in enumerate(cache.layers)]
    pairs = zip(cache.key_cache, cache.value_cache, cache.conv_states, cache.recurrent_states, strict=True)
    return [(seen, state) if keys is None else (keys, values) for keys, values, seen, state in pairs]


def states_in(cache: Any, index: int, shapes: Sequence[Shape], device: torch.device) -> tuple[Tensor, Tensor]:
    """What a layer of linear attention keeps in `cache`; before its first tokens zeros of `shapes`, which are put there."""
    if (kept := _states(cache, index)) is not None:
        return kept
    seen, state = (torch.zeros(size, device=device, dtype=kind) for size, kind in shapes)
    if not hasattr(cache, "layers"):
        cache.conv_states[index], cache.recurrent_states[index] = seen, state
        return seen, state
    cache.update_conv_state(seen, index)
    cache.update_recurrent_state(state, index)
    layer = cache.layers[index]
    if not isinstance(layer.recurrent_states, dict):
        layer.recurrent_states = state  # some releases keep it in half precision
    kept = _states(cache, index)
    assert kept is not None
    return kept


def _states(cache: Any, index: int) -> tuple[Tensor, Tensor] | None:
    """None where there are none. Later releases number the states of a layer."""
    if not hasattr(cache, "layers"):
        first, second = cache.conv_states[index], cache.recurrent_states[index]
    elif index < len(cache.layers):
        both = (getattr(cache.layers[index], name, None) for name in ("conv_states", "recurrent_states"))
        first, second = (part.get(0) if isinstance(part, dict) else part for part in both)
    else:
        first = second = None
    return None if first is None or second is None else (first, second)
