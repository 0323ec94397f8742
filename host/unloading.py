"""Tells who wants to know when ComfyUI unloads every model: by its button, by /free, or after a run that was out of memory; and
when it finds that the computer's own memory runs short."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

_OURS = f"_told_by_{__name__}"  # the pack may be there twice, under two names
_listeners: list[Callable[[], None]] = []
_givers: list[Callable[[int], int]] = []
_prompts = 0


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


def when_memory_is_short(giver: Callable[[int], int]) -> None:
    """Call `giver` with the bytes of CPU memory that ComfyUI misses, before it drops results of the running workflow for them;
    it returns how many it gives back. Only with ComfyUI's cache that looks at memory, the one it has by default."""
    if giver not in _givers:
        _givers.append(giver)
    cache: Any = getattr(sys.modules.get("comfy_execution.caching"), "RAMPressureCache", None)
    if not hasattr(cache, "ram_release") or hasattr(cache, _OURS):
        return
    set_prompt, release = cache.set_prompt, cache.ram_release

    @functools.wraps(set_prompt)
    async def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _prompts
        _prompts += 1
        return await set_prompt(self, *args, **kwargs)

    @functools.wraps(release)
    def ram_release(self: Any, target: int, *args: Any, **kwargs: Any) -> int:
        given = _give(_missing(target))
        return given + int(release(self, target, *args, **kwargs))

    # ComfyUI asks its own cache alone.
    cache.set_prompt, cache.ram_release = counted, ram_release
    setattr(cache, _OURS, True)


def prompts_begun() -> int:
    """A number that is another one in every prompt, as far as `when_memory_is_short` calls anybody."""
    return _prompts


def _missing(target: int) -> int:
    """Bytes that are really too few: what the prompt before left is cleared away with a target of all memory there is."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    memory: Any = sys.modules.get("comfy.memory_management")
    return min(target, getattr(memory, "RAM_CACHE_HEADROOM", target)) - int(psutil.virtual_memory().available)


def _give(missing: int) -> int:
    given = 0
    for giver in _givers:
        if given < missing:
            given += giver(missing - given)
    return given
