"""Layers that stay in the machine's memory and lend their weights to the device while they run.

For a model that is larger than the device. Streamed layers are no part of the module that the host manages, so it neither
counts nor moves them; what they compute is what the whole model computes. On CUDA one layer's weights are copied while the
layer before it computes, so that where computing takes longer than copying, streaming costs no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .cards import numbered
from .layer_weights import Weights

PLACES = 2  # layers whose weights are on the device at a time


class StreamedLayer(nn.Module):
    """One layer whose weights are on the device of its input while it runs, and only then."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that neither `.to` nor the host's memory management sees the weights.
        self._layer = (layer,)
        self.weights = Weights(layer)
        self.lane: Lane | None = None

    @property
    def layer(self) -> nn.Module:
        return self._layer[0]

    def __getattr__(self, name: str) -> Any:
        # Libraries ask a layer for its attention type and the like.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: the layer's first input, on the device that computes."""
        if self.lane is not None and self.lane.device == x.device:
            with self.lane.lent(self):
                return self.layer(x, *args, **kwargs)
        with self.weights.replaced_by(self.weights.copied(x.device)):
            return self.layer(x, *args, **kwargs)


class Lane:
    """Two places on a CUDA device for the weights of streamed layers: one is filled while the other is computed with.

    layers: in the order in which they run, again and again. For one thread.
    """

    def __init__(self, layers: Sequence[StreamedLayer], device: torch.device) -> None:
        self.device = device
        self._after = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
        self._places: list[_Place] = []
        self._copying: Any = None

    @contextmanager
    def lent(self, layer: StreamedLayer) -> Iterator[None]:
        """`layer` with its weights on the device; the next one's are on their way meanwhile."""
        here = self._filled(layer, None)
        computing: Any = torch.cuda.current_stream(self.device)
        computing.wait_event(here.filled)
        self._filled(self._after[layer], here)
        try:
            with layer.weights.replaced_by(here.weights(layer)):
                yield
        finally:
            here.left.record(computing)

    def _filled(self, layer: StreamedLayer, besides: _Place | None) -> _Place:
        """A place with the weights of `layer`, or on the way there; not the place `besides`, which is in use."""
        for place in self._places:
            if place.holds is layer:
                return place
        if not self._places:
            self._begin()
        # The one that was computed with longer ago.
        place = next(place for place in self._places if place is not besides)
        self._places.sort(key=lambda other: other is place)
        self._copying.wait_event(place.left)
        with torch.cuda.stream(self._copying):
            place.take(layer)
        return place

    def _begin(self) -> None:
        size = max(layer.weights.nbytes for layer in self._after)
        self._copying = torch.cuda.Stream(self.device)
        with torch.inference_mode(False):
            self._places = [_Place(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(PLACES)]
        # What had this memory before may still be under way.
        self._copying.wait_stream(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        """Give the places up. Waits for copies: whoever changes weights next writes what they read."""
        if self._copying is not None:
            self._copying.synchronize()
        self._places = []


class _Place:
    """Memory of a device for the weights of one layer at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.holds: StreamedLayer | None = None
        self.filled: Any = torch.cuda.Event()
        self.left: Any = torch.cuda.Event()  # when what was computed with them last is done
        self._memory = memory
        self._weights: dict[StreamedLayer, list[Tensor]] = {}

    def take(self, layer: StreamedLayer) -> None:
        """Copy the weights of `layer` here, on the current stream."""
        whole = layer.weights.memory
        self.holds = None
        self._memory[: len(whole)].copy_(whole, non_blocking=True)
        self.filled.record(torch.cuda.current_stream(self._memory.device))
        self.holds = layer

    def weights(self, layer: StreamedLayer) -> list[Tensor]:
        if layer not in self._weights:
            self._weights[layer] = layer.weights.on(self._memory)
        return self._weights[layer]


@contextmanager
def lending(network: nn.Module, device: torch.device) -> Iterator[None]:
    """The streamed layers of `network` with a `Lane` on `device`, where that is CUDA; elsewhere each copies for itself."""
    layers = [part for part in network.modules() if isinstance(part, StreamedLayer)]
    if not layers or device.type != "cuda" or layers[0].lane is not None:
        yield
        return
    lane = Lane(layers, numbered(device))
    for layer in layers:
        layer.lane = lane
    try:
        yield
    finally:
        for layer in layers:
            layer.lane = None
        lane.close()


def nbytes(module: nn.Module) -> int:
    """Bytes of the weights of a module, of its streamed layers none."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def whole_bytes(network: nn.Module) -> int:
    """Bytes of the weights of `network`, of its streamed layers as well."""
    streamed = (part.layer for part in network.modules() if isinstance(part, StreamedLayer))
    return nbytes(network) + sum(map(nbytes, streamed))


def how_many(layers: Sequence[nn.Module], excess: int) -> int:
    """How many of `layers` must be streamed to need `excess` bytes less on the device: all, if that is too few."""
    if excess <= 0:
        return 0
    largest = max(map(whole_bytes, layers), default=0)
    return min(len(layers), PLACES + math.ceil(excess / max(1, largest)))


def stream(layers: nn.ModuleList, count: int) -> None:
    """Let `count` of `layers`, the last one among them, be streamed ones and no others, in place.

    Evenly spread: those between them compute while the next one is copied.
    """
    chosen = {(i + 1) * len(layers) // count - 1 for i in range(count)}
    for index, layer in enumerate(list(layers)):
        if isinstance(layer, StreamedLayer) and index not in chosen:
            layers[index] = layer.layer
        elif not isinstance(layer, StreamedLayer) and index in chosen:
            layers[index] = StreamedLayer(layer)


def inside(module: Any) -> Any:
    """The layer itself, of one that is streamed."""
    return module.layer if isinstance(module, StreamedLayer) else module


def named_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names, those within streamed layers under the names that they have when nothing is streamed."""
    for name, module in network.named_modules():
        if not isinstance(module, StreamedLayer):
            yield name, module
            continue
        for below, part in module.layer.named_modules():
            yield f"{name}.{below}".rstrip("."), part
