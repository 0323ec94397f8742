"""One network of a checkpoint: read when it is needed, then under the host's management, as far as its device has room.

What has none stays in the machine's memory, layer by layer, and is lent to the device while it computes.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import host
from ..attention.capabilities import on_device
from ..host import streamed_layers
from ..host.streamed_layers import StreamedLayer, lending

log = logging.getLogger("hotpath.text_to_image")


class Holder(nn.Module):
    """A library network as a plain module: the host keeps the present device on it, which library models forbid."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Component:
    """One network of a checkpoint, read from the disk when it is first needed, then in the host's management.

    One run at a time computes with it, and nobody sends it away meanwhile. load: reads it; others: the checkpoint's
    networks, which leave the device first when there is no room for this one. Both are methods of the checkpoint, and kept
    weakly: a checkpoint that nobody holds must go at once, with its gigabytes. device: where it computes, if not where the
    host does.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], nn.Module],
        others: Callable[[], Iterable[Component]],
        device: torch.device | None = None,
    ) -> None:
        self.name, self.device = name, device
        self._load = weakref.WeakMethod(load)
        self._others = weakref.WeakMethod(others)
        self._lock = threading.RLock()
        self._managed: Any = None

    @property
    def loaded(self) -> bool:
        return self._managed is not None

    @property
    def managed(self) -> Any:
        """The host's handle; reads the network from the disk the first time."""
        with self._lock:
            if self._managed is None:
                start = time.perf_counter()
                # Ordinary tensors also where the host runs nodes in inference mode.
                load = self._load()
                assert load is not None, "a checkpoint's network was used after the checkpoint was gone"
                with torch.inference_mode(False):
                    network = load().eval().requires_grad_(False)
                self._managed = host.current().manage(Holder(network), self.device)
                log.info("%s read in %.1f s", self.name, time.perf_counter() - start)
            return self._managed

    @contextmanager
    def resident(self, extra_bytes: int = 0) -> Iterator[Any]:
        """The network on its device, in inference mode, with room for `extra_bytes` of activations."""
        self._make_room(extra_bytes)
        with (
            self._lock,
            self.managed.resident(extra_bytes) as holder,
            on_device(self.managed.device),
            torch.inference_mode(),
            lending(holder.network, self.managed.device),
        ):
            yield holder.network

    def _make_room(self, extra_bytes: int) -> None:
        """Send others away, then leave layers in the machine's memory, until the rest and `extra_bytes` have room."""
        device = self.managed.device
        if device.type == "cpu":
            return
        here = host.current()
        if here.free_memory(device) < self._arriving() + extra_bytes:
            others = self._others()
            for other in others() if others is not None else ():
                if other is not self:
                    other.release()
            here.make_room(self._arriving() + extra_bytes, device)
        with self._lock:  # not before: the others' locks may be held by who waits for this one
            self._fit(extra_bytes)

    def _fit(self, extra_bytes: int) -> None:
        layers, streamed, arriving = self._layers(), self._streamed(), self._arriving()
        waiting = streamed_layers.whole_bytes(self.managed.module) - streamed_layers.nbytes(self.managed.module)
        missing = arriving + extra_bytes - host.current().free_memory(self.managed.device)
        wanted = streamed_layers.how_many(layers, missing + waiting)  # as if none waited yet
        # More wait at once; fewer only when the network is brought anyway, and by so many that the next picture, for which a
        # little less may be free, does not send one back.
        if wanted > streamed or (arriving and wanted <= streamed - streamed_layers.PLACES):
            self._stream(wanted)

    def _stream(self, count: int) -> None:
        """Leave `count` layers, and no others, in the machine's memory."""
        network = self.managed.module.network
        self.managed.release()
        log.info("%s: %d of %d layers stay in the machine's memory", self.name, count, len(network.layers))
        streamed_layers.stream(network.layers, count)
        # Anew: a host may have counted the bytes of the old one.
        self._managed = host.current().manage(Holder(network), self.device)

    def _arriving(self) -> int:
        """Bytes that are to be brought to the device; a host may have taken a part of the network off it."""
        module, kind = self.managed.module, self.managed.device.type
        return sum(held.nbytes for held in [*module.parameters(), *module.buffers()] if held.device.type != kind)

    def _layers(self) -> Sequence[nn.Module]:
        return getattr(self.managed.module.network, "layers", None) or ()

    def _streamed(self) -> int:
        return sum(isinstance(layer, StreamedLayer) for layer in self._layers())

    def note(self) -> str:
        """For a report: how many layers wait in the machine's memory; '' when none does."""
        with self._lock:
            if self._managed is None or not self._streamed():
                return ""
            return (
                f"{self._streamed()} of {len(self._layers())} layers of the {self.name} wait in the machine's memory, because "
                f"{self._managed.device} has no room for them"
            )

    def release(self) -> None:
        """Send the weights back to the offload device; nothing when they were never read. Waits for who uses them."""
        with self._lock:
            if self._managed is not None:
                self._managed.release()
