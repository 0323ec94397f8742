"""The one door to ComfyUI: paths, devices, memory, progress, interrupt; and its stand-in when there is none.

from .. import host
with host.tracked(host.current(), len(frames)) as bar: ...
for picture in host.each(pictures, "faces"): ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache

from .interface import Host, Interrupted, Item, Managed, ModelNotFound, Progress, tracked

__all__ = ["Host", "Interrupted", "Managed", "ModelNotFound", "Progress", "current", "each", "tracked", "use"]

_chosen: Host | None = None


def current() -> Host:
    """The host we run in: the one given to `use`, else ComfyUI's when ComfyUI is loaded in this process, else headless."""
    if _chosen is not None:
        return _chosen
    # Looked up every time: a program may import this pack first and ComfyUI later.
    return _comfyui() if "comfy.model_management" in sys.modules else _headless()


@cache
def _comfyui() -> Host:
    from .comfyui import ComfyUIHost

    return ComfyUIHost()


@cache
def _headless() -> Host:
    from .headless import HeadlessHost

    return HeadlessHost()


def use(host: Host | None) -> Host | None:
    """Make `host` the current one (None: find out at each question) and return the one that was chosen before."""
    global _chosen
    before, _chosen = _chosen, host
    return before


def each(items: Sequence[Item], label: str = "") -> Iterator[Item]:
    """`items` one after the other under a progress bar, so that an interrupt is heard between any two."""
    with tracked(current(), len(items), label) as bar:
        for item in items:
            yield item
            bar.update()
