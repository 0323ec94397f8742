"""Tells who wants to know when ComfyUI unloads every model: by its button, by /free, or after a run that was out of memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

_OURS = f"_told_by_{__name__}"  # the pack may be there twice, under two names
_listeners: list[Callable[[], None]] = []


def before_unloading_all(listener: Callable[[], None]) -> None:
    """Call `listener` each time before ComfyUI unloads every model. Without ComfyUI in this process nobody does."""
    if listener not in _listeners:
        _listeners.append(listener)
    management: Any = sys.modules.get("comfy.model_management")
    # Asked for at every use: the pack may be imported first and ComfyUI later.
    if management is None or hasattr(management, _OURS):
        return
    unload = management.unload_all_models

    @functools.wraps(unload)
    def unload_all_models(*args: Any, **kwargs: Any) -> Any:
        for each in tuple(_listeners):
            each()
        return unload(*args, **kwargs)

    # ComfyUI has no callback for it: a model that is in none of its lists any more, such as one that waits on the CPU, is told
    # nothing.
    management.unload_all_models = unload_all_models
    setattr(management, _OURS, True)
