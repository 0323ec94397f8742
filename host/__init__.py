"""The one door to ComfyUI: paths, devices, memory, progress, interrupt; and its stand-in when there is none.

from .. import host
with host.current().progress(len(frames)) as bar: ...
"""

from __future__ import annotations

import sys

from .interface import Host, Interrupted, Managed, ModelNotFound, Progress, tracked

__all__ = ["Host", "Interrupted", "Managed", "ModelNotFound", "Progress", "current", "tracked", "use"]

_current: Host | None = None


def current() -> Host:
    """The host we run in. ComfyUI's when ComfyUI is loaded in this process, else the headless one."""
    global _current
    if _current is None:
        if "comfy.model_management" in sys.modules:
            from .comfyui import ComfyUIHost

            _current = ComfyUIHost()
        else:
            from .headless import HeadlessHost

            _current = HeadlessHost()
    return _current


def use(host: Host | None) -> Host | None:
    """Make `host` the current one (None: find out again at the next question) and return the one before."""
    global _current
    before, _current = _current, host
    return before
