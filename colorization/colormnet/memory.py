"""ColorMNet's three memories (XMem's, section 3): working and long-term memory in one buffer, and the sensory state.

The buffer is allocated once. Long-term elements end where working elements begin, so what is read is one contiguous
range however full either is, and writing a frame copies that frame only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.topk import topk
from ...attention.topk_memory import SIMILARITIES, MemoryReading, read_top_k, similarity
from .feature_fusion import PLANES
from .settings import ColorMNetSettings

COLUMNS = ("key", "selection", "value", "shrinkage", "used", "lived")


class FrameMemory:
    """Working and long-term memory of keys and values.

    Working memory starts with the references, which stay for good, then recent memory frames. When it is full, all
    but the newest of those become `prototypes` long-term elements; when those are full, the least used go.
    """

    def __init__(
        self,
        settings: ColorMNetSettings,
        places: int,
        references: int,
        key: int,
        value: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """places: h * w at 1/16; references: frames that are kept for good, at least 1; key, value: widths."""
        self.settings = settings
        self.places = places
        self.permanent = max(1, references) * places
        # One frame is the reference in the limits of the original; every further one adds to them.
        extra = (max(1, references) - 1) * places
        self.most = settings.most_frames * places + extra
        self.fewest = settings.fewest_frames * places + extra
        self.boundary = settings.long_term
        self.long = 0
        self.work = 0
        rows = settings.long_term + self.most
        self.key = torch.zeros(rows, key, device=device)
        self.selection = torch.zeros(rows, key, device=device)
        self.value = torch.zeros(rows, PLANES * value, dtype=dtype, device=device)
        self.shrinkage = torch.zeros(rows, device=device)
        self.used = torch.zeros(rows, device=device)
        self.lived = torch.zeros(rows, device=device)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in COLUMNS)

    @property
    def filled(self) -> slice:
        return slice(self.boundary - self.long, self.boundary + self.work)

    def add(self, key: Tensor, shrinkage: Tensor, selection: Tensor, value: Tensor) -> None:
        """Remember one frame. key, selection [C, h, w], shrinkage [1, h, w], value [2, V, h, w]."""
        rows = slice(self.boundary + self.work, self.boundary + self.work + self.places)
        self._write(rows, key, shrinkage, selection, value)
        self.used[rows] = 0
        self.lived[rows] = 1e-7
        self.work += self.places
        if self.work >= self.most:
            room = self.settings.long_term - self.settings.prototypes
            if self.long > room:
                self._forget(room)
            self._compress()

    def replace(self, index: int, key: Tensor, shrinkage: Tensor, selection: Tensor, value: Tensor) -> None:
        """Put another frame where frame `index` of those that are kept for good is; the arguments are those of `add`."""
        first = self.boundary + index * self.places
        self._write(slice(first, first + self.places), key, shrinkage, selection, value)

    def _write(self, rows: slice, key: Tensor, shrinkage: Tensor, selection: Tensor, value: Tensor) -> None:
        self.key[rows] = key.flatten(1).T
        self.selection[rows] = selection.flatten(1).T
        self.shrinkage[rows] = shrinkage.flatten()
        self.value[rows] = value.flatten(2).permute(2, 0, 1).flatten(1)

    def read(self, query: Tensor, selection: Tensor, similarities: int = SIMILARITIES) -> MemoryReading:
        """query, selection: [T, C, h, w]; similarities: how many of them at a time. The readout is [T * places, 2 * V],
        rows frame by frame.

        Counts how much each element was used. Frames that read the same memory may be read together: their counts
        add up.
        """
        frames, channels = query.shape[:2]
        filled = self.filled
        reading = read_top_k(
            query.flatten(2).transpose(1, 2).reshape(-1, channels),
            selection.flatten(2).transpose(1, 2).reshape(-1, channels),
            self.key[filled],
            self.shrinkage[filled],
            self.value[filled],
            self.settings.top_k,
            similarities,
        )
        self.used[filled] += reading.usage
        self.lived[filled] += frames
        return reading

    def _compress(self) -> None:
        """Turn the middle of working memory into long-term prototypes: the most used keys, each with the values near
        it (XMem, section 3.3)."""
        first = self.boundary + self.permanent
        last = self.boundary + self.work - (self.fewest - self.permanent)
        middle = slice(first, last)
        usage = self.used[middle] / self.lived[middle]
        chosen = topk(usage, min(self.settings.prototypes, len(usage)))[1]
        key = self.key[middle][chosen]
        scores = similarity(key, self.selection[middle][chosen], self.key[middle], self.shrinkage[middle])
        affinity = scores.softmax(dim=1)
        value = (affinity.to(self.value.dtype) @ self.value[middle]).clone()
        shrinkage = affinity @ self.shrinkage[middle]
        tail = slice(last, self.boundary + self.work)
        kept = tail.stop - tail.start
        for name in COLUMNS:
            column = getattr(self, name)
            column[first : first + kept] = column[tail].clone()
        self.work = self.permanent + kept
        self._remember(key, value, shrinkage)

    def _remember(self, key: Tensor, value: Tensor, shrinkage: Tensor) -> None:
        """Put elements before the long-term ones that are there."""
        stop = self.boundary - self.long
        rows = slice(stop - len(key), stop)
        self.key[rows], self.value[rows], self.shrinkage[rows] = key, value, shrinkage
        self.selection[rows] = 0  # never asked of a long-term element
        self.used[rows] = 0
        self.lived[rows] = 1e-7
        self.long += len(key)

    def _forget(self, room: int) -> None:
        """Drop the least used long-term elements until `room` are left; ties at the limit all go."""
        rows = slice(self.boundary - self.long, self.boundary)
        usage = self.used[rows] / self.lived[rows]
        # Sorted: `kthvalue` came to Macs late.
        limit = usage.sort().values[self.long - room - 1]
        survivors = (usage > limit).nonzero()[:, 0]
        start = self.boundary - len(survivors)
        for name in COLUMNS:
            column = getattr(self, name)
            column[start : self.boundary] = column[rows][survivors].clone()
        self.long = len(survivors)

    def state(self) -> dict[str, Tensor]:
        """Copies of what is remembered."""
        filled = self.filled
        tensors = {name: getattr(self, name)[filled].clone() for name in COLUMNS}
        return {**tensors, "sizes": torch.tensor([self.long, self.work])}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave; the settings and sizes must be the same."""
        self.long, self.work = (int(n) for n in state["sizes"])
        if self.long > self.settings.long_term or self.work > self.most:
            raise ValueError("The state remembers more than these memory settings hold; use the settings it came from.")
        for name in COLUMNS:
            getattr(self, name)[self.filled] = state[name].to(self.key.device)


class SensoryMemory:
    """The recurrent state of both planes, [2, C, h, w] float32, and the last remembered frame for local attention."""

    def __init__(self, channels: int, height: int, width: int, device: torch.device) -> None:
        self.hidden = torch.zeros(PLANES, channels, height, width, device=device)
        self.last_key: Tensor | None = None  # [1, C, h, w]
        self.last_value: Tensor | None = None  # [1, 2 * V, h, w]

    def look_at(self, key: Tensor, value: Tensor) -> None:
        """key [1, C, h, w] and value [2, V, h, w] of the frame that local attention reads from now on."""
        self.last_key = key
        self.last_value = value.flatten(0, 1)[None]

    def state(self) -> dict[str, Tensor]:
        if self.last_key is None or self.last_value is None:
            return {"hidden": self.hidden.clone()}
        return {
            "hidden": self.hidden.clone(),
            "last_key": self.last_key.clone(),
            "last_value": self.last_value.clone(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        device = self.hidden.device
        self.hidden = state["hidden"].to(device)
        self.last_key = state["last_key"].to(device) if "last_key" in state else None
        self.last_value = state["last_value"].to(device) if "last_value" in state else None
