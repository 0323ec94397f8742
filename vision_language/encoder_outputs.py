"""Handing ready vision features to the library's forward pass, whichever way its version takes them.

From transformers 5.20 on, `forward` has a parameter for them. Before, the two methods that would compute them are
replaced on the instance for the length of a call and given stand-in pixels. The choice is made by signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cache import BoundedCache, listed
from .embeddings import DEVICE_LIMIT, VisualFeatures, VisualItem, to_device
from .loaded_model import LoadedModel

KINDS = ("image", "video")


def _of(items: Sequence[VisualItem], kind: str) -> list[VisualItem]:
    return [item for item in items if item.kind == kind]


def grids(items: Sequence[VisualItem], kind: str, device: torch.device) -> Tensor | None:
    """[n, 3] grids of the items of one kind, or None."""
    chosen = _of(items, kind)
    return torch.tensor([item.grid for item in chosen], device=device) if chosen else None


def on_device(model: LoadedModel, items: Sequence[VisualItem]) -> list[VisualFeatures]:
    """The items' features on the model's device, each distinct one moved once, the last of them kept there."""
    moved: dict[int, VisualFeatures] = {}
    there: BoundedCache[VisualFeatures] | None = None
    if model.device.type == "cuda":
        there = model.device_state.get("features")
        if there is None:
            there = listed(BoundedCache("image features on the device", DEVICE_LIMIT))
            model.device_state["features"] = there
    for item in items:
        features = item.features
        if features is None:
            raise ValueError("A picture reached the decoder before the vision tower saw it.")
        if id(features) in moved:
            continue
        known = there.get(item.key) if there is not None and item.found else None
        if known is None:
            known = VisualFeatures(
                to_device(features.pooled, model.device),
                tuple(to_device(level, model.device) for level in features.deep),
                features.grid,
            )
            if there is not None and item.found:
                there.put(item.key, known)
        moved[id(features)] = known
    return [moved[id(item.features)] for item in items]


@contextmanager
def given(model: LoadedModel, items: Sequence[VisualItem]) -> Iterator[dict[str, Any]]:
    """Arguments for one call of `forward` or `generate` that sees `items`, valid inside the block.

    A new container every time: `generate` rewrites the one it gets when it searches with beams.
    """
    arguments: dict[str, Any] = {}
    ready = dict(zip(map(id, items), on_device(model, items), strict=True))
    by_kind = {kind: [ready[id(item)] for item in _of(items, kind)] for kind in KINDS}
    for kind in KINDS:
        if by_kind[kind]:
            arguments[f"{kind}_grid_thw"] = grids(items, kind, model.device)
    if not items:
        yield {}
    elif model.takes_encoder_outputs:
        made = {kind: container(found) for kind, found in by_kind.items() if found}
        yield arguments | {"mm_encoder_outputs": made}
    else:
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if by_kind[kind]:
                patches = int(arguments[f"{kind}_grid_thw"].prod(-1).sum())
                arguments[name] = torch.zeros(patches, 1, device=model.device, dtype=model.dtype)
        with replaced_methods(model, by_kind):
            yield arguments


def container(found: Sequence[VisualFeatures]) -> Any:
    """The output object that `get_image_features` would have returned."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    pooled = [features.pooled for features in found]
    if not found[0].deep:
        return BaseModelOutputWithPooling(pooler_output=pooled)
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    levels = [[features.deep[level] for features in found] for level in range(len(found[0].deep))]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=levels)


@contextmanager
def replaced_methods(model: LoadedModel, by_kind: dict[str, list[VisualFeatures]]) -> Iterator[None]:
    """`get_image_features` and `get_video_features` answering from `by_kind`, on this instance, inside the block."""
    inner = model.network.model
    objects = "kwargs" in inspect.signature(type(inner).get_image_features).parameters

    def answer(found: list[VisualFeatures]) -> Any:
        def method(pixels: Tensor, grid: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            # Beams repeat the pictures of the one question.
            repeated = found * (1 if grid is None else max(1, len(grid) // len(found)))
            pooled = tuple(features.pooled for features in repeated)
            levels = range(len(repeated[0].deep))
            if objects:
                made = container(repeated)
                made.pooler_output = pooled
                if repeated[0].deep and not model.deepstack_in_parts:
                    made.deepstack_features = [torch.cat([f.deep[i] for f in repeated]) for i in levels]
                return made
            if repeated[0].deep:
                return pooled, [torch.cat([f.deep[i] for f in repeated]) for i in levels]
            return pooled

        return method

    names = {"image": "get_image_features", "video": "get_video_features"}
    replaced = [names[kind] for kind, found in by_kind.items() if found]
    try:
        for kind, found in by_kind.items():
            if found:
                setattr(inner, names[kind], answer(found))
        yield
    finally:
        for name in replaced:
            inner.__dict__.pop(name, None)
