"""The nodes that show, limit and clear what is remembered."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hotpath.cache import named_cache
from hotpath.cache import registry as registry_module
from hotpath.cache.disk import DiskCache
from hotpath.host.headless import HeadlessHost
from hotpath.nodes import NODE_CLASS_MAPPINGS


@pytest.fixture(autouse=True)
def no_caches(headless_host: HeadlessHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty host, and no caches but those a test makes."""
    monkeypatch.setattr(registry_module, "_caches", {})
    monkeypatch.setattr(registry_module, "_held", weakref.WeakSet())
    monkeypatch.setattr(registry_module, "_limit", None)


def run(node: str, **inputs: Any) -> Any:
    instance = NODE_CLASS_MAPPINGS[node]()
    return getattr(instance, instance.FUNCTION)(**inputs)


def fill(name: str = "faces", entries: int = 3) -> Any:
    cache = named_cache(name, 64 << 20)
    for n in range(entries):
        cache.put(str(n), torch.zeros(1 << 20, dtype=torch.uint8))
    return cache


def test_the_report_lists_every_cache(headless_host: HeadlessHost) -> None:
    faces, people = fill("faces", 3), fill("people", 2)
    faces.get("0")
    faces.get("none")
    (report,) = run("HotpathCache", clear="nothing", after="anything", unique_id="9")
    assert report.split("\n") == [
        "faces: 3 entries, 3.0 of 64 MiB, 1 hits, 1 misses (50%), 0 evicted",
        "people: 2 entries, 2.0 of 64 MiB, 0 hits, 0 misses (0%), 0 evicted",
    ]
    assert (len(faces), len(people)) == (3, 2)
    assert headless_host.texts == [("9", report)]


def test_clearing_says_how_much_went() -> None:
    faces, people = fill("faces", 3), fill("people", 2)
    (report,) = run("HotpathCache", clear="all")
    assert report.startswith("5 entries cleared\nfaces: 0 entries")
    assert (len(faces), len(people)) == (0, 0)


def test_what_is_on_the_disk_is_listed_and_cleared(headless_host: HeadlessHost) -> None:
    for folder in ("image_embeddings", "prompt_embeddings"):
        DiskCache(headless_host.cache_folder() / folder, 1 << 20).put("k", {"a": torch.zeros(4)})
    (report,) = run("HotpathCache", clear="nothing")
    assert [line.partition(",")[0] for line in report.split("\n")] == [
        "image embeddings on disk: 1 entries",
        "prompt embeddings on disk: 1 entries",
    ]
    # One that was saved with a workflow, to free memory at every run, would have them made anew every time.
    assert run("InstantIDCacheManager", clear_cache="true")[0].split("\n")[1:] == report.split("\n")
    assert run("HotpathCache", clear="all")[0].split("\n") == ["2 entries cleared", "nothing is remembered yet"]
    assert not list(headless_host.cache_folder().rglob("*.safetensors"))


def test_a_limit_for_caches_of_now_and_later() -> None:
    faces = fill("faces", 5)
    (report,) = run("HotpathCache", clear="nothing", limit_mib=2)
    assert "faces: 2 entries, 2.0 of 2 MiB" in report
    assert "3 evicted" in report
    assert fill("made later", 5).limit == 2 << 20
    run("HotpathCache", clear="nothing", limit_mib=0)
    assert faces.limit == 2 << 20, "0 leaves the limits as they are"


def test_nothing_remembered_yet() -> None:
    assert run("HotpathCache", clear="nothing")[0] == "nothing is remembered yet"


def test_the_report_is_made_anew_on_every_run() -> None:
    assert math.isnan(NODE_CLASS_MAPPINGS["HotpathCache"].IS_CHANGED(clear="nothing", after=None, limit_mib=0))


def test_any_socket_can_be_waited_for_and_passed_on() -> None:
    after = NODE_CLASS_MAPPINGS["HotpathCache"].INPUT_TYPES()["optional"]["after"][0]
    passed_on = NODE_CLASS_MAPPINGS["InstantIDCacheManager"].RETURN_TYPES[1]
    for other in ("MODEL", "IMAGE", "*", "FACEANALYSIS"):
        assert not after != other  # noqa: SIM202 - ComfyUI compares with !=
        assert not passed_on != other  # noqa: SIM202


def test_the_older_cache_manager_still_works() -> None:
    faces = fill("faces", 3)
    stats, passed = run("InstantIDCacheManager", clear_cache="false", passthrough=7)
    assert stats.startswith("faces: 3 entries")
    assert passed == 7
    assert len(faces) == 3
    stats, _ = run("InstantIDCacheManager", clear_cache="true")
    assert stats.startswith("3 entries cleared")
    assert len(faces) == 0
