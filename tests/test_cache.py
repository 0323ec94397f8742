"""The bounded store and the caches that are known by name: what is held, counted and dropped."""

from __future__ import annotations

import random
import threading
import tracemalloc
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.cache import (
    BoundedCache,
    all_caches,
    all_statistics,
    all_tiers,
    clear_all,
    disk_tier,
    limit_all,
    listed,
    named_cache,
)
from hotpath.cache import registry as registry_module
from hotpath.cache.bounded import SMALLEST, size_of
from hotpath.face.faces import Faces

KIB = 1024
MIB = 1 << 20


# ---------------------------------------------------------------- size_of


def test_size_of_counts_what_is_kept_alive() -> None:
    whole = torch.zeros(1000)
    assert size_of(whole) == 4000
    assert size_of(whole[:1]) == 4000, "a view keeps its whole storage alive"
    assert size_of([whole, whole[10:], whole.view(10, 100)]) == 4000, "a shared storage is counted once"
    assert size_of([whole, whole.clone()]) == 8000
    assert size_of(torch.zeros(10, dtype=torch.bfloat16)) == 20
    array = np.zeros(1000, np.float32)
    assert size_of(array) == 4000
    assert size_of(array[:1][:1]) == 4000


def test_size_of_looks_into_containers_and_objects() -> None:
    @dataclass(frozen=True)
    class Faces:
        boxes: torch.Tensor
        more: dict[str, torch.Tensor]

    faces = Faces(torch.zeros(10), {"x": torch.zeros(100)})
    assert 440 <= size_of(faces) < 440 + 100
    assert size_of([faces, faces]) < 2 * 440
    assert size_of(SimpleNamespace(nbytes=12345)) == 12345
    assert 1000 <= size_of("x" * 1000) < 1100
    assert size_of({}) == size_of([]) == 0


def test_size_of_a_prepared_identity_is_its_tensors() -> None:
    from hotpath.identity import PreparedIdentity

    blocks = [(torch.zeros(2, 16, 8), torch.zeros(2, 16, 8)) for _ in range(3)]
    prepared = PreparedIdentity(torch.zeros(1, 16, 4), torch.zeros(1, 16, 4), blocks)
    assert size_of(prepared) == prepared.nbytes == 4 * (3 * 2 * 2 * 16 * 8 + 2 * 16 * 4)


# ---------------------------------------------------------------- BoundedCache


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KIB, dtype=torch.uint8)


def test_the_least_recently_used_goes_first() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", 3 * KIB)
    for key in "abc":
        cache.put(key, kib(1))
    assert cache.get("a") is not None  # now b is the oldest
    cache.put("d", kib(1))
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    cache.put("e", kib(2))
    assert [key in cache for key in "acde"] == [False, False, True, True]
    assert cache.statistics().evictions == 3


def test_putting_what_is_there_keeps_the_first_and_counts_as_use() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", 2 * KIB)
    first = cache.put("a", kib(1))
    cache.put("b", kib(1))
    assert cache.put("a", kib(1)) is first
    cache.put("c", kib(1))
    assert "a" in cache
    assert "b" not in cache


def test_a_value_over_the_limit_is_given_back_but_not_kept() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", 2 * KIB)
    cache.put("small", kib(1))
    large = kib(3)
    assert cache.put("large", large) is large
    assert "large" not in cache
    assert "small" in cache, "what does not fit must not push out what does"
    assert cache.put("exact", kib(2)).nbytes == 2 * KIB
    assert "exact" in cache
    empty: BoundedCache[torch.Tensor] = BoundedCache("test", 3 * SMALLEST)
    for key in "abcde":
        empty.put(key, torch.empty(0))
    assert len(empty) == 3, "what has no bytes is counted, too"


def test_pictures_without_faces_take_little_more_than_the_limit() -> None:
    """Days of film in which nobody is seen: an entry has no numbers, and takes 2 KB all the same."""
    limit, cache = MIB, BoundedCache[Faces]("test", MIB)
    tracemalloc.start()
    try:
        for frame in range(20_000):
            cache.put(f"{frame:032}", Faces.none((480, 640), 640, width=512))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.statistics().evictions and held < 3 * limit


@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_model_of_an_lru(seed: int) -> None:
    """A thousand random operations: never over the limit, and the same entries as the obvious implementation."""
    rng = random.Random(seed)
    limit = 8 * KIB
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", limit)
    model: OrderedDict[str, int] = OrderedDict()
    hits = misses = evictions = 0

    def shrink() -> int:
        gone = 0
        while sum(model.values()) > limit:
            model.popitem(last=False)
            gone += 1
        return gone

    for _ in range(1000):
        key = f"k{rng.randrange(12)}"
        action = rng.random()
        if action < 0.45:
            size = rng.randrange(1, 10)
            cache.put(key, kib(size))
            if key in model:
                model.move_to_end(key)
            elif size * KIB <= limit:
                model[key] = size * KIB
                evictions += shrink()
        elif action < 0.9:
            found = cache.get(key)
            assert (found is not None) == (key in model)
            if found is not None:
                assert found.nbytes == model[key]
                model.move_to_end(key)
                hits += 1
            else:
                misses += 1
        else:
            limit = rng.randrange(1, 16) * KIB
            cache.resize(limit)
            for large in [k for k, size in model.items() if size > limit]:
                del model[large]
                evictions += 1
            evictions += shrink()
        statistics = cache.statistics()
        assert statistics.nbytes <= statistics.limit == limit
        assert statistics.nbytes == sum(model.values())
        assert statistics.entries == len(cache) == len(model)
        assert all(k in cache for k in model)
    assert (statistics.hits, statistics.misses, statistics.evictions) == (hits, misses, evictions)


def test_resize_drops_the_least_recently_used() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", 4 * KIB)
    for key in "abcd":
        cache.put(key, kib(1))
    cache.get("a")
    cache.resize(2 * KIB)
    assert [key in cache for key in "abcd"] == [True, False, False, True]
    cache.put("e", kib(1))
    assert [key in cache for key in "ade"] == [True, False, True], "the order of use survives a resize"
    cache.resize(10 * KIB)
    assert len(cache) == 2
    assert cache.limit == 10 * KIB


def test_statistics_and_clear() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("faces", 1 << 20)
    assert cache.statistics().hit_rate == 0
    cache.get_or_compute("a", lambda: kib(512))
    cache.get_or_compute("a", lambda: kib(512))
    cache.get_or_compute("a", lambda: kib(512))
    statistics = cache.statistics()
    assert (statistics.entries, statistics.hits, statistics.misses, statistics.nbytes) == (1, 2, 1, 512 * KIB)
    assert statistics.hit_rate == pytest.approx(2 / 3)
    text = str(statistics)
    assert text.startswith("faces: 1 entries, 0.5 of 1 MiB")
    assert "67%" in text
    cache.clear()
    statistics = cache.statistics()
    assert (statistics.entries, statistics.hits, statistics.misses, statistics.nbytes) == (0, 0, 0, 0)


def test_none_is_a_result_like_any_other() -> None:
    cache: BoundedCache[torch.Tensor | None] = BoundedCache("test", KIB)
    calls: list[int] = []

    def nothing_found() -> None:
        calls.append(1)

    assert cache.get_or_compute("a", nothing_found) is None
    assert cache.get_or_compute("a", nothing_found) is None
    assert len(calls) == 1
    assert "a" in cache


def test_a_failing_computation_leaves_no_entry() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", KIB)

    def fails() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.get_or_compute("a", fails)
    assert "a" not in cache
    assert cache.get_or_compute("a", lambda: kib(1)).nbytes == KIB


def test_computing_may_use_the_cache_itself() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", 8 * KIB)
    value = cache.get_or_compute("outer", lambda: cache.get_or_compute("inner", lambda: kib(1)).clone())
    assert value.nbytes == KIB
    assert len(cache) == 2


def test_many_threads_stay_within_the_limit_and_agree() -> None:
    limit = 16 * KIB
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", limit)
    start = threading.Barrier(8)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        for _ in range(400):
            number = rng.randrange(30)
            value = cache.get_or_compute(str(number), lambda n=number: torch.full((KIB,), n, dtype=torch.uint8))
            if int(value[0]) != number:
                wrong.append(f"{number}: {int(value[0])}")
            if cache.statistics().nbytes > limit:
                wrong.append("over the limit")
            if rng.random() < 0.02:
                cache.resize(limit)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    statistics = cache.statistics()
    assert statistics.hits + statistics.misses == 8 * 400


def test_the_store_is_touched_under_the_lock_alone() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", 4 * KIB)

    class Watched(type(cache._store)):  # type: ignore[misc]
        def watched(self, name: str, *args: Any) -> Any:
            assert cache._lock._is_owned(), name  # type: ignore[attr-defined]
            return getattr(super(), name)(*args)

    for name in (
        "__getitem__",
        "__setitem__",
        "__delitem__",
        "__contains__",
        "__len__",
        "get",
        "pop",
        "popitem",
        "clear",
    ):
        setattr(Watched, name, lambda self, *args, name=name: self.watched(name, *args))
    cache._store = Watched(4 * KIB, getsizeof=lambda entry: entry[1])
    cache.put("a", kib(1))
    assert cache.get("a") is not None and "a" in cache and len(cache) == 1 and cache.statistics().entries == 1
    cache.clear()
    cache.resize(KIB)


def test_two_threads_that_miss_the_same_key_get_one_value() -> None:
    cache: BoundedCache[torch.Tensor] = BoundedCache("test", KIB)
    both = threading.Barrier(2, timeout=30)
    results: list[torch.Tensor] = []

    def compute() -> torch.Tensor:
        both.wait()  # passes only if neither holds a lock while it computes
        return kib(1)

    threads = [threading.Thread(target=lambda: results.append(cache.get_or_compute("a", compute))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 2
    assert results[0] is results[1]


# ---------------------------------------------------------------- registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No caches of others, and none of ours left for them."""
    monkeypatch.setattr(registry_module, "_caches", {})
    monkeypatch.setattr(registry_module, "_held", weakref.WeakSet())
    monkeypatch.setattr(registry_module, "_tiers", {})
    monkeypatch.setattr(registry_module, "_disks", {})
    monkeypatch.setattr(registry_module, "_limit", None)


@pytest.mark.usefixtures("own_registry")
def test_a_named_cache_is_made_once() -> None:
    cache = named_cache("b", 100 * KIB)
    assert named_cache("b", 5) is cache
    assert cache.limit == 100 * KIB
    named_cache("a", KIB)
    assert [c.name for c in all_caches()] == ["a", "b"]


@pytest.mark.usefixtures("own_registry")
def test_clearing_one_cache_or_all() -> None:
    for name in "ab":
        for number in range(3):
            named_cache(name, 100 * KIB).put(str(number), kib(1))
    assert clear_all("a") == 3
    assert (len(named_cache("a", 0)), len(named_cache("b", 0))) == (0, 3)
    assert clear_all() == 3
    assert clear_all("unknown") == 0


@pytest.mark.usefixtures("own_registry")
def test_a_limit_for_all_holds_for_later_caches_too() -> None:
    early = named_cache("early", 100 * KIB)
    for number in range(10):
        early.put(str(number), kib(1))
    limit_all(2 * KIB)
    assert early.limit == 2 * KIB
    assert early.statistics().nbytes == 2 * KIB
    assert named_cache("late", 100 * KIB).limit == 2 * KIB
    limit_all(5 * KIB)
    assert early.limit == 5 * KIB, "a limit may be raised again"
    limit_all(None)
    assert named_cache("later", 100 * KIB).limit == 100 * KIB


@pytest.mark.usefixtures("own_registry")
def test_a_cache_of_something_shorter_lived_is_listed_as_long_as_it_is_held() -> None:
    held = listed(BoundedCache("of a model", 10 * KIB))
    held.put("a", kib(1))
    assert [cache.name for cache in all_caches()] == ["of a model"] and clear_all() == 1 and len(held) == 0
    limit_all(100 * KIB)
    assert held.limit == 10 * KIB, "it is on a device, where a limit for all must not take more"
    limit_all(KIB)
    assert held.limit == KIB == listed(BoundedCache("of another", 10 * KIB)).limit
    assert listed(BoundedCache("a small one", 100)).limit == 100
    del held
    assert all_caches() == []


@pytest.mark.usefixtures("own_registry")
def test_a_folder_is_known_before_it_is_used_and_cleared_only_when_asked(tmp_path: Path) -> None:
    store = tmp_path / "store"
    tier = disk_tier("on disk", lambda: store, 100 * KIB)
    assert all_tiers() == []
    tier().put("k", {"a": kib(1)})
    tier().get("k")
    (shown,) = all_tiers()
    seen = shown.statistics()
    assert (seen.name, seen.entries, seen.limit, seen.hits) == ("on disk", 1, 100 * KIB, 1) and seen.nbytes >= KIB
    assert all_caches() == [] and clear_all() == 0 and len(tier()) == 1, "giving memory back leaves the disk alone"
    assert clear_all(disk=True) == 1 and all_tiers() == []
    tier().put("k", {"a": kib(1)})
    store = tmp_path / "elsewhere"
    assert tier().get("k") is None, "the host's folder is another one now"


@pytest.mark.usefixtures("own_registry")
def test_caches_of_one_name_count_together() -> None:
    """Each model has one of its own."""
    first, second = (listed(BoundedCache("of a model", 100 * KIB)) for _ in range(2))
    other = named_cache("another", 50 * KIB)
    for cache in (first, second, other):
        cache.put("k", kib(1))
        cache.get("k")
    second.get("missing")
    seen = {part.name: part for part in all_statistics()}
    assert seen.keys() == {"of a model", "another"} and len(all_statistics()) == 2
    both = seen["of a model"]
    assert (both.entries, both.limit, both.hits, both.misses) == (2, 200 * KIB, 2, 1)
    assert both.nbytes == first.statistics().nbytes + second.statistics().nbytes
