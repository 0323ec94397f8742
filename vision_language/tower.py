"""The vision tower: features of the pictures and clips that no cache knew, on CUDA as one graph for each size of picture.

The library's forward pass makes positions and lengths of sequences on the card and asks for them back in every block, and
starts some thirty kernels a block (hundreds where a block looks through windows), which takes longer than the card needs to
run them. Its own arguments for what depends on the size alone are made on the host here. A size that comes again is recorded.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host.capturing import GraphMemory, captured
from ..host.errors import first_line
from . import patches
from .embeddings import EmbeddingCache, VisualFeatures, VisualItem, to_device
from .interruption import interruptible
from .loaded_model import LoadedModel, graph_memory
from .quantization import OURS
from .timing import Timing

log = logging.getLogger("hotpath.vision_language")

LARGEST = 8192  # patches of a picture or clip; a larger one keeps a card busy without a graph
RECORDINGS = 4  # sizes; each holds its pictures' patches and features
SIZES_REMEMBERED = 64
RECORDED_TOWER = "recorded tower"  # its name among a model's paths that failed
SPLITTING = ("sdpa", "eager")  # attentions that take a sequence after the other, with lengths from the host


def encode(
    model: LoadedModel,
    items: Sequence[VisualItem],
    cache: EmbeddingCache,
    timing: Timing,
    jointly: bool = False,
    keep_now: bool = True,
    record: bool = False,
) -> list[VisualItem]:
    """Run the tower for every item without features (the network is resident); returns an item of each that it saw.

    jointly=True shows it all pictures at once, which is faster for many small ones; one by one a picture's features do
    not depend on its company to the last bit. keep_now=False leaves it to the caller to `keep` what came of it, once
    the device has other work to do. record: the model stays where it is, so a graph serves again.
    """
    waiting: dict[str, list[VisualItem]] = {}
    for item in items:
        if item.features is None:
            waiting.setdefault(item.key, []).append(item)
    seen: list[VisualItem] = []
    for kind in ("image", "video"):
        groups = [group for group in waiting.values() if group[0].kind == kind]
        for part in [groups] if jointly and groups else [[group] for group in groups]:
            made = features_of(model, kind, [group[0] for group in part], timing, record)
            for group, features in zip(part, made, strict=True):
                for item in group:
                    item.features, item.patches, item.pixels = features, None, None
                seen.append(group[0])
    if keep_now:
        keep(seen, cache)
    return seen


def keep(seen: Sequence[VisualItem], cache: EmbeddingCache) -> None:
    """Put what the tower made of `seen` into the cache. Waits for the device. An answer does not fail for what is not kept."""
    for item in seen:
        if item.features is None:
            continue
        try:
            cache.put(item.key, item.description, item.features)
        except (OSError, MemoryError, RuntimeError) as error:
            log.warning("what the model saw is not kept, because of %s: %s", type(error).__name__, first_line(error))
            return


def features_of(
    model: LoadedModel, kind: str, items: Sequence[VisualItem], timing: Timing, record: bool = False
) -> list[VisualFeatures]:
    """The tower's features of `items`, all of one kind, in one run."""
    with timing.stage("transfer", on_device=True):
        shown = (
            torch.cat([patches_of(model, item) for item in items]) if len(items) > 1 else patches_of(model, items[0])
        )
    with timing.stage("tower", on_device=True), torch.no_grad():
        made = None
        if record and len(items) == 1:
            made = replayed(model, items[0].grid, shown)
            items[0].replayed = made is not None
        if made is None:
            with interruptible(model.network):
                made = run(model, kind, items, shown)
        pooled, deep = split(made, items, int(model.config.vision_config.spatial_merge_size))
    return [VisualFeatures(pooled[i], tuple(level[i] for level in deep), item.grid) for i, item in enumerate(items)]


def patches_of(model: LoadedModel, item: VisualItem) -> Tensor:
    """What the tower looks at, on its device."""
    if item.patches is not None:
        return to_device(item.patches, model.device)
    assert item.pixels is not None
    worker = model.processor.image_processor
    table: Tensor | None = model.device_state.get("pixel values")
    if table is None:
        table = to_device(patches.values(worker).to(model.dtype), model.device)
        model.device_state["pixel values"] = table
    return patches.patches(worker, to_device(item.pixels, model.device), table)


def run(model: LoadedModel, kind: str, items: Sequence[VisualItem], shown: Tensor) -> Any:
    """What the tower makes of `shown`, as the library returns it."""
    grids = torch.tensor([item.grid for item in items])
    inner = model.network.model
    tower = getattr(inner, "visual", None)
    given = from_size(tower, grids, model.device)
    if tower is not None and given is not None:
        return tower(shown.to(model.dtype), grid_thw=grids, return_dict=True, **given)
    method = inner.get_image_features if kind == "image" else inner.get_video_features
    return method(shown, grids.to(model.device))


def split(result: Any, items: Sequence[VisualItem], merge: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The parts of what the library returned, per picture: 4.57 gives tuples, later versions objects."""
    if hasattr(result, "pooler_output"):
        pooled, deep = result.pooler_output, getattr(result, "deepstack_features", None) or []
    elif isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], list):
        pooled, deep = result
    else:
        pooled, deep = result, []
    sizes = [item.tokens(merge) for item in items]

    def parts(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return list(torch.split(value, sizes))
        pieces = list(value)
        # Some versions split a clip by its frames.
        return pieces if len(pieces) == len(items) else list(torch.split(torch.cat(pieces), sizes))

    return parts(pooled), [parts(level) for level in deep]


# What the library's helpers (transformers.vision_utils, from 5.10 on) make of a size, by the names its forward takes them
# under: (names, arguments beside the size that the tower has).
FROM_SIZE: dict[str, tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]]] = {
    "get_vision_position_ids": (("position_ids",), lambda tower: {"spatial_merge_size": tower.spatial_merge_size}),
    "get_vision_cu_seqlens": (("cu_seqlens",), lambda tower: {}),
    "get_vision_attention_seqlens": (("cu_seqlens", "max_seqlen"), lambda tower: {"config": tower.config}),
    "get_vision_window_index": (
        ("window_index", "cu_window_seqlens"),
        lambda tower: {
            "spatial_merge_size": tower.spatial_merge_size,
            "window_size": tower.window_size,
            "patch_size": tower.patch_size,
        },
    ),
    "get_vision_bilinear_indices_and_weights": (
        ("bilinear_indices", "bilinear_weights"),
        lambda tower: {
            "num_grid_per_side": tower.num_grid_per_side,
            "spatial_merge_size": tower.config.spatial_merge_size,
        },
    ),
    "get_vision_interpolation_indices_and_weights": (
        ("interp_indices", "interp_weights"),
        lambda tower: {
            "num_grid_per_side": tower.num_grid_per_side,
            "mode": tower.interpolation_mode,
            "align_corners": tower.interpolation_align_corners,
            "spatial_merge_size": tower.config.spatial_merge_size,
        },
    ),
}
LENGTHS = ("cu_seqlens", "cu_window_seqlens")  # are read on the host


def from_size(tower: Any, grids: Tensor, device: torch.device) -> dict[str, Any] | None:
    """Arguments of the tower's forward that depend on `grids` alone; None where the library takes none, or others.

    It then makes them itself, and the host waits in every block.
    """
    if str(getattr(getattr(tower, "config", None), "_attn_implementation", "")) not in SPLITTING:
        return None
    asked = [name for name in _asked(type(tower)) if name.startswith("get_vision_")]
    if not asked or any(name not in FROM_SIZE for name in asked):
        return None
    from transformers import vision_utils

    made: dict[str, Any] = {}
    for name in asked:
        names, facts = FROM_SIZE[name]
        values = getattr(vision_utils, name)(grids, **facts(tower))
        made |= zip(names, values if len(names) > 1 else (values,), strict=True)
    return {
        name: value if name in LENGTHS else to_device(value, device)
        for name, value in made.items()
        if value is not None
    }


def _asked(kind: type) -> tuple[str, ...]:
    """The global names that the forward of a class uses."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # type: ignore[attr-defined]
    return () if code is None else tuple(code.co_names)


class TowerRecording:
    """The tower for one size, as a CUDA graph over fixed addresses."""

    def __init__(
        self, tower: Any, grid: tuple[int, int, int], given: dict[str, Any], shown: Tensor, memory: GraphMemory
    ) -> None:
        self.given, self.shown = given, torch.empty_like(shown)
        grids = torch.tensor([grid])

        def look() -> tuple[Tensor, list[Tensor]]:
            made = tower(self.shown, grid_thw=grids, return_dict=True, **given)
            return made.pooler_output, list(getattr(made, "deepstack_features", None) or [])

        self.shown.copy_(shown)
        self.graph, self.made = captured(look, 1, shown.device, memory)

    def __call__(self, shown: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(features, deeper levels) of patches of this size."""
        self.shown.copy_(shown)
        self.graph.replay()
        pooled, deep = self.made
        return pooled.clone(), [level.clone() for level in deep]


def replayed(model: LoadedModel, grid: tuple[int, int, int], shown: Tensor) -> tuple[Tensor, list[Tensor]] | None:
    """What the tower makes of `shown`, by the recording of its size; None where there is none, and when it comes first."""
    state = model.device_state
    failed: dict[str, str] = state.setdefault("failed paths", {})
    full_precision = model.quantization in OURS
    if model.device.type != "cuda" or len(shown) > LARGEST or not full_precision or RECORDED_TOWER in failed:
        return None
    tower = getattr(model.network.model, "visual", None)
    if tower is None:
        return None
    places = tuple(held.data_ptr() for held in (*tower.parameters(), *tower.buffers()))
    if state.get("tower's addresses", places) != places:
        # The host moved weights out and in again without telling: what points at them is void.
        state.pop("towers", None)
    state["tower's addresses"] = places
    sizes: OrderedDict[tuple[int, int, int], TowerRecording | None] = state.setdefault("towers", OrderedDict())
    comes_again = grid in sizes
    recording = sizes.pop(grid, None)
    sizes[grid] = recording  # now the most recently used
    while len(sizes) > SIZES_REMEMBERED:
        sizes.popitem(last=False)
    if recording is None and comes_again:
        try:
            recording = recorded(model, tower, grid, shown)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what drivers and libraries raise that cannot be recorded
            failed[RECORDED_TOWER] = first_line(error)
            log.warning("%s: the vision tower could not be recorded", model.folder.name, exc_info=True)
    return None if recording is None else recording(shown)


def recorded(model: LoadedModel, tower: Any, grid: tuple[int, int, int], shown: Tensor) -> TowerRecording | None:
    """A recording for `grid`, kept with those of the last sizes; None where the library waits for the card in between."""
    given = from_size(tower, torch.tensor([grid]), model.device)
    if given is None:
        return None
    state = model.device_state
    sizes: OrderedDict[tuple[int, int, int], TowerRecording | None] = state["towers"]
    others = [other for other, made in sizes.items() if made is not None]
    for other in others[: max(0, len(others) - RECORDINGS + 1)]:
        sizes[other] = None
    sizes[grid] = made = TowerRecording(tower, grid, given, shown.to(model.dtype), graph_memory(model))
    return made
