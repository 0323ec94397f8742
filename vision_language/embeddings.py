"""Vision features by content: what the tower makes of a picture or a clip, computed once and kept.

The key holds everything that the features depend on and nothing else: exact pixels, effective sizes, the processor's
constants, the library version, the weights as loaded. Prompt, sampling, order and frame rate are not in it. Entries
live in CPU memory (bounded, shared by all models, they survive an unload) and, when asked for, on disk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host
from ..cache import BoundedCache, content_key, disk_tier, named_cache
from ..host import pinned_memory
from ..host.cores import on_cores
from . import patches
from .budgets import Budget, check_sides, fitted
from .loaded_model import LoadedModel
from .pictures import Clip, Picture
from .timing import Timing

log = logging.getLogger("hotpath.vision_language")

MEMORY_LIMIT = 2 << 30
DISK_LIMIT = 8 << 30
DEVICE_LIMIT = 256 << 20  # bytes of the device, per model: what was seen last need not be sent again
PIECES = 16  # of a picture's pixels
CLIP_TOKENS = 16384  # all frames of a clip together

on_disk = disk_tier("image embeddings on disk", lambda: host.current().cache_folder() / "image_embeddings", DISK_LIMIT)


@dataclass(frozen=True)
class VisualFeatures:
    """What the tower says about one picture or clip.

    grid: patches in time, height and width; stored with the features, because a wrong grid of the right size runs and
    gives other answers. pooled: [tokens, D]; deep: further levels of the same shape (Qwen3-VL's deepstack), maybe none.
    """

    pooled: Tensor
    deep: tuple[Tensor, ...]
    grid: tuple[int, int, int]


@dataclass
class VisualItem:
    """One picture or clip on its way through an answer.

    features is None until they were found or computed; then `patches` is what the tower must look at, or `pixels`,
    [3, H, W] uint8, of which the card makes them.
    seconds: the time of every temporal patch (clips); step: seconds between two of them.
    """

    kind: str  # "image" or "video"
    grid: tuple[int, int, int]
    key: str = ""
    description: str = ""
    features: VisualFeatures | None = None
    patches: Tensor | None = None
    pixels: Tensor | None = None
    seconds: tuple[float, ...] = ()
    step: float = 1.0
    found: str = ""  # "memory" or "disk" on a hit
    replayed: bool = False  # by the tower's recording

    def tokens(self, merge: int) -> int:
        time, height, width = self.grid
        return time * height * width // merge**2


class EmbeddingCache:
    """The two tiers. enabled=False bypasses both: nothing is read and nothing is written."""

    def __init__(self, enabled: bool = True, disk: bool = False) -> None:
        self.enabled = enabled
        self.memory: BoundedCache[VisualFeatures] = named_cache("image embeddings", MEMORY_LIMIT)
        self.disk = on_disk() if disk and enabled else None

    def get(self, key: str, description: str) -> tuple[VisualFeatures | None, str]:
        """(features, tier) or (None, '')."""
        if not self.enabled:
            return None, ""
        if (found := self.memory.get(key)) is not None:
            return found, "memory"
        entry = self.disk.get(key, description) if self.disk is not None else None
        if entry is None or "pooled" not in entry.tensors or "grid" not in entry.facts:
            return None, ""
        time, height, width = (int(v) for v in json.loads(entry.facts["grid"]))
        deep = tuple(entry.tensors[f"deep.{i}"] for i in range(len(entry.tensors) - 1))
        return self.memory.put(key, VisualFeatures(entry.tensors["pooled"], deep, (time, height, width))), "disk"

    def put(self, key: str, description: str, features: VisualFeatures) -> None:
        if not self.enabled:
            return
        pooled, *deep = to_host((features.pooled, *features.deep))
        kept = VisualFeatures(pooled, tuple(deep), features.grid)
        self.memory.put(key, kept)
        if self.disk is not None:
            tensors = {"pooled": kept.pooled} | {f"deep.{i}": level for i, level in enumerate(kept.deep)}
            self.disk.put(key, tensors, {"grid": json.dumps(kept.grid)}, description)


def constants(processor: Any) -> dict[str, Any]:
    """The constants of an image or video processor that its output depends on."""
    names = ("patch_size", "temporal_patch_size", "merge_size", "do_rescale", "rescale_factor", "do_normalize")
    found: dict[str, Any] = {name: getattr(processor, name, None) for name in names}
    found["resample"] = str(getattr(processor, "resample", None))
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None)
        found[name] = None if value is None else [float(v) for v in np.atleast_1d(value)]
    return found | {"class": type(processor).__name__}


def describe(model: LoadedModel, pixels: Any, kind: str, processor: Any, size: Sequence[int]) -> str:
    """The whole content of a key, as text: the pixels by hash, everything else by value."""
    import transformers

    parts = {
        "kind": kind,
        "pixels": pixels_key(pixels),
        "shape": list(pixels.shape),
        "size": [int(v) for v in size],
        "processor": constants(processor),
        "transformers": transformers.__version__,
        "model": model.identity,
        "model_type": model.model_type,
        "tower": [str(model.dtype), model.quantization, model.attention],
    }
    return json.dumps(parts, sort_keys=True)


def pixels_key(pixels: Any) -> str:
    """MD5 (hex) of the exact pixels [..., 3] uint8, by way of those of PIECES parts, which are hashed side by side."""
    return content_key(on_cores(content_key, np.array_split(np.ascontiguousarray(pixels).reshape(-1), PIECES)))


def look_up(
    model: LoadedModel,
    pictures: Sequence[Picture],
    clips: Sequence[Clip],
    budget: Budget,
    cache: EmbeddingCache,
    timing: Timing,
) -> list[VisualItem]:
    """An item for each picture and each clip: from the cache, else with the patches the tower needs.

    The processors run only for what is not cached; the same picture twice is one entry.
    """
    items: list[VisualItem] = []
    fresh: dict[str, VisualItem] = {}
    every: list[Picture | Clip] = [*pictures, *clips]
    for media in every:
        with timing.stage("processor"):
            if isinstance(media, Picture):
                size: tuple[int, ...] = budget.edges(model.image_sizes)
                kind, pixels, worker = "image", media.pixels, model.processor.image_processor
            else:
                size = clip_size(model, media, budget)
                kind, pixels, worker = "video", media.frames, model.processor.video_processor
            description = describe(model, pixels, kind, worker, size)
            key = content_key(description)
            features, tier = cache.get(key, description)
            if features is not None:
                item = VisualItem(kind, features.grid, key, description, features, found=tier)
            elif key in fresh:
                item = fresh[key]
            elif isinstance(media, Picture):
                item = fresh[key] = process_picture(model, media, size, key, description)
            else:
                item = fresh[key] = process_clip(model, media, size, key, description)
            if isinstance(media, Clip):
                # A clip shown twice may have two sets of times; the features are the same object either way.
                item = replace(item, **clip_times(model, media))
            items.append(item)
    return items


def process_picture(
    model: LoadedModel, picture: Picture, size: Sequence[int], key: str, description: str
) -> VisualItem:
    from PIL import Image

    check_sides(*picture.pixels.shape[:2])
    worker = model.processor.image_processor
    if patches.serves(worker, model.device):
        shown = patches.resized(worker, picture.pixels, size)
        return VisualItem("image", patches.grid_of(worker, shown), key, description, pixels=shown)
    processed = worker(
        images=[Image.fromarray(picture.pixels)],
        return_tensors="pt",
        size={"shortest_edge": int(size[0]), "longest_edge": int(size[1])},
    )
    return VisualItem(
        "image", as_grid(processed["image_grid_thw"][0]), key, description, None, processed["pixel_values"]
    )


def clip_size(model: LoadedModel, clip: Clip, budget: Budget) -> tuple[int, int]:
    """(height, width) that every frame is resized to: the picture's budget, less when the clip as a whole is long."""
    sizes = model.image_sizes
    pairs = -(-len(clip.frames) // int(model.processor.video_processor.temporal_patch_size))
    ceiling = max(4, min(CLIP_TOKENS, model.context_length // 2) // pairs)
    most = ceiling if budget.most is None else min(ceiling, budget.most)
    shortest, longest = replace(budget, most=most, least=min(budget.least or 0, most)).edges(sizes)
    return fitted(clip.frames.shape[1], clip.frames.shape[2], sizes.side, shortest, longest)


def process_clip(model: LoadedModel, clip: Clip, size: Sequence[int], key: str, description: str) -> VisualItem:
    from torchvision.transforms.v2 import functional as vision
    from torchvision.transforms.v2.functional import InterpolationMode

    frames = torch.from_numpy(np.ascontiguousarray(clip.frames)).permute(0, 3, 1, 2)
    # Resized here, because the video processors of different versions count their limits in different things.
    frames = vision.resize(frames, [int(v) for v in size], InterpolationMode.BICUBIC, antialias=True)
    processed = model.processor.video_processor(
        videos=[frames], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    grid = as_grid(processed["video_grid_thw"][0])
    return VisualItem("video", grid, key, description, None, processed["pixel_values_videos"])


def clip_times(model: LoadedModel, clip: Clip) -> dict[str, Any]:
    """`seconds` and `step` of an item: the middle of every temporal patch, the last frame repeated to fill its own."""
    patch = int(model.processor.video_processor.temporal_patch_size)
    shown = list(clip.seconds())
    shown += [shown[-1]] * (-len(shown) % patch)
    middles = tuple((shown[i] + shown[i + patch - 1]) / 2 for i in range(0, len(shown), patch))
    span = shown[len(clip.frames) - 1] - shown[0]
    interval = span / (len(clip.frames) - 1) if len(clip.frames) > 1 else 1.0 / clip.fps
    return {"seconds": middles, "step": patch * interval}


def as_grid(grid: Tensor) -> tuple[int, int, int]:
    time, height, width = (int(v) for v in grid)
    return time, height, width


def to_host(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host. From CUDA in one go through pinned memory, which is given back."""
    if parts[0].device.type != "cuda":
        return [part.to("cpu", copy=True) for part in parts]
    whole = torch.cat(tuple(parts))
    pinned = pinned_memory.empty(whole.shape, whole.dtype)
    pinned.copy_(whole, non_blocking=True)
    done: Any = torch.cuda.Event()
    done.record()
    done.synchronize()
    # A copy for each, so that none keeps the others' memory.
    return [part.clone() for part in pinned.split([len(part) for part in parts])]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On CUDA through pinned memory, so that the copy really runs beside the host's work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return pinned_memory.pinned(tensor).to(device, non_blocking=True)
    return tensor.to(device)
