"""When ComfyUI runs short of the computer's own memory: what the pack holds beside ComfyUI's cache goes first."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hotpath.host import unloading

GB = 1 << 30


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """free: what the computer has; asked: what the giver was asked for, which gives all of it back."""
    state = SimpleNamespace(free=32 * GB, asked=[])

    def giver(missing: int) -> int:
        state.asked.append(missing)
        state.free += missing
        return missing

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=state.free, total=64 * GB))
    monkeypatch.setattr(unloading, "_givers", [])
    state.giver = giver
    return state


@pytest.mark.comfy
def test_what_is_missing_is_asked_of_the_pack_before_results_are_dropped(
    comfy_host: Any, memory: Any, monkeypatch
) -> None:
    caching = pytest.importorskip("comfy_execution.caching")
    if not hasattr(caching.RAMPressureCache, "ram_release"):
        pytest.skip("this ComfyUI looks at memory in another way")
    import comfy.memory_management as management

    unloading.when_memory_is_short(memory.giver)
    unloading.when_memory_is_short(memory.giver)
    cache = caching.RAMPressureCache(caching.CacheKeySetInputSignature)
    monkeypatch.setattr(management, "RAM_CACHE_HEADROOM", 4 * GB)
    # What the prompt before left is cleared with a target of all memory; nothing is short yet.
    cache.ram_release(64 * GB)
    assert memory.asked == []
    memory.free = 3 * GB
    assert cache.ram_release(64 * GB) == GB and memory.asked == [GB]
    assert cache.ram_release(4 * GB, free_active=True, min_entry_size=1) == 0 and memory.asked == [GB]
    before = unloading.prompts_begun()
    prompt = SimpleNamespace(all_node_ids=list, get_node=dict)
    asyncio.run(cache.set_prompt(prompt, [], None))
    assert unloading.prompts_begun() == before + 1


def test_without_such_a_cache_nobody_is_called(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (None, SimpleNamespace(), SimpleNamespace(RAMPressureCache=type("Older", (), {}))):
        monkeypatch.setitem(sys.modules, "comfy_execution.caching", module)
        unloading.when_memory_is_short(memory.giver)
    assert memory.asked == []
