"""The disk tier: whole entries or none, for the key that was asked and nothing else, within its limit."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.cache import disk
from hotpath.cache.disk import DiskCache


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache" / "store", limit=1 << 20)


def test_round_trip_of_every_dtype(cache: DiskCache) -> None:
    tensors = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "f16": torch.randn(2).half(),
        "i64": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "view": torch.arange(24).view(4, 6).t()[1:3],
    }
    assert cache.put("k", tensors, {"grid": "[1, 2]"}, "all of it")
    found = DiskCache(cache.folder, cache.limit).get("k", "all of it")
    assert found is not None and found.facts == {"grid": "[1, 2]"}
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def test_what_a_killed_process_left_is_removed(cache: DiskCache) -> None:
    cache.put("k", {"a": torch.ones(2)})
    left, ahead, begun = (cache.folder / f".writing-{name}" for name in ("left", "ahead", "begun"))
    for path in (left, ahead, begun):
        path.write_bytes(b"half of it")
    os.utime(left, (1, 1))
    os.utime(ahead, (time.time() + 86400,) * 2)  # by a clock that was set back since
    cache.put("other", {"a": torch.ones(2)})
    assert not left.exists() and not ahead.exists() and begun.exists() and len(cache.entries()) == 2


def test_a_missing_key_is_a_miss(cache: DiskCache) -> None:
    assert cache.get("absent") is None and cache.misses == 1


def test_another_content_under_the_same_key_is_a_miss_and_stays(cache: DiskCache) -> None:
    cache.put("k", {"a": torch.ones(2)}, description="one")
    assert cache.get("k", "two") is None
    assert cache.get("k", "one") is not None
    assert (cache.hits, cache.misses) == (1, 1)


def test_a_file_that_was_renamed_to_another_key_is_refused(cache: DiskCache) -> None:
    cache.put("k", {"a": torch.ones(2)})
    (cache.folder / "k.safetensors").rename(cache.folder / "other.safetensors")
    assert cache.get("other") is None
    assert not (cache.folder / "other.safetensors").exists()


def test_a_file_of_another_version_of_the_format_is_refused(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("k", {"a": torch.ones(2)})
    monkeypatch.setattr(disk, "FORMAT", "2")
    assert cache.get("k") is None and (cache.misses, len(cache)) == (1, 0)


def test_what_is_not_whole_yet_lies_in_the_folder_under_a_name_that_is_swept(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (written.append(self), replace(self, target))[1])
    assert cache.put("a-key_1", {"a": torch.ones(2)}) and cache.get("a-key_1") is not None
    (only,) = written
    assert only.parent == cache.folder and only.name.startswith(disk.WRITING)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "foreign"])
def test_damage_is_found_and_dropped(cache: DiskCache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.put("k", {"a": torch.randn(100)})
    path = cache.folder / "k.safetensors"
    whole = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, path)
    else:
        path.write_bytes(
            {"cut": whole[:-4], "flip": whole[:-1] + bytes([whole[-1] ^ 4]), "empty": b"", "text": b"hello" * 9}[damage]
        )
    assert cache.get("k") is None
    assert not path.exists() and (cache.hits, cache.misses) == (0, 1)
    assert "is dropped, because" in caplog.text
    assert cache.put("k", {"a": torch.randn(100)}) and cache.get("k") is not None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    entry = {"a": torch.zeros(1000)}
    cache = DiskCache(tmp_path, limit=3 * 4700)
    for index, key in enumerate(("one", "two", "three")):
        cache.put(key, entry)
        os.utime(tmp_path / f"{key}.safetensors", (index, index))
    assert cache.get("one") is not None
    cache.put("four", entry)
    assert [key for key in ("one", "two", "three", "four") if cache.get(key) is not None] == ["one", "three", "four"]
    assert cache.nbytes() <= cache.limit
    assert cache.statistics().evictions == 1
    cache.limit = cache.nbytes() - 1
    assert (cache.trim(), cache.trim(), len(cache)) == (1, 0, 2)
    cache.limit = cache.nbytes()
    assert cache.trim() == 0, "all of the limit may be used"
    assert cache.clear() == 2
    seen = cache.statistics()
    assert (seen.name, seen.entries, seen.hits, seen.misses, seen.evictions) == (tmp_path.name, 0, 0, 0, 0)


def test_a_clock_that_was_set_back_does_not_keep_what_was_there_for_ever(tmp_path: Path) -> None:
    entry = {"a": torch.zeros(1000)}
    cache = DiskCache(tmp_path, limit=3 * 4700)
    for key in ("one", "two", "three"):
        cache.put(key, entry)
        os.utime(tmp_path / f"{key}.safetensors", (time.time() + 86400,) * 2)
    assert cache.get("one") is not None  # and it is used now
    assert cache.put("four", entry) and cache.put("five", entry)
    assert sorted(path.stem for path in cache.entries()) == ["five", "four", "one"]


def test_an_entry_over_the_limit_is_not_written(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "small", limit=1000)
    assert cache.put("small", {"a": torch.zeros(1)})
    assert cache.put("k", {"a": torch.zeros(1000)}) is False
    assert cache.get("k") is None and cache.get("small") is not None, "what does not fit must not push out what does"


def test_nothing_half_written_is_left_when_the_disk_refuses(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("first", {"a": torch.ones(1)})

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert not cache.put("k", {"a": torch.ones(1)})
    assert sorted(path.name for path in cache.folder.iterdir()) == ["first.safetensors"]


@pytest.mark.parametrize("key", ["", "../k", "a/b", "a.b", "k\0"])
def test_keys_cannot_leave_the_folder(cache: DiskCache, key: str) -> None:
    with pytest.raises(ValueError, match="no cache key"):
        cache.get(key)
    with pytest.raises(ValueError, match="no cache key"):
        cache.put(key, {})


def test_writers_and_readers_at_once_see_whole_entries(cache: DiskCache) -> None:
    values = [torch.full((500,), float(i)) for i in range(4)]
    for value in values:
        cache.put("k", {"a": value})
    wrong: list[object] = []

    def write() -> None:
        for value in values * 5:
            cache.put("k", {"a": value})

    def read() -> None:
        for _ in range(40):
            found = cache.get("k")
            if found is None or found.tensors["a"].unique().numel() != 1:
                wrong.append(found)

    threads = [threading.Thread(target=work) for work in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.clear() == 1 and cache.entries() == []


def refuse(error: BaseException) -> Any:
    def refusing(*_: Any, **__: Any) -> Any:
        raise error

    return refusing


LOCKED = PermissionError(13, "The process cannot access the file because it is being used by another process")


@pytest.mark.parametrize("error", [LOCKED, OSError(5, "Input/output error"), MemoryError()])
def test_what_cannot_be_read_just_now_is_a_miss_and_stays(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    cache.put("k", {"a": torch.ones(2)})
    read = Path.read_bytes
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse(error))
        assert cache.get("k") is None and cache.misses == 1
        patched.setattr(os, "utime", refuse(LOCKED))  # of a folder that may only be read
        patched.setattr(Path, "read_bytes", read)
        assert cache.get("k") is not None


def test_what_another_process_has_deleted_meanwhile_stops_nobody(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"*.safetensors": cache.folder / "k.safetensors", ".writing-*": cache.folder / ".writing-k"}
    assert cache.put("l", {"a": torch.ones(2)})
    monkeypatch.setattr(cache, "_named", lambda pattern: [gone[pattern], *cache.folder.glob(pattern)])
    assert cache.put("m", {"a": torch.ones(2)}) and len(cache) == 2
    monkeypatch.setattr(cache, "entries", lambda: [gone["*.safetensors"]])
    cache.clear()


def test_a_folder_that_is_away_holds_nothing(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", refuse(OSError(5, "Input/output error")))
    assert (cache.entries(), cache.trim(), len(cache)) == ([], 0, 0)


def test_a_file_that_cannot_be_deleted_stops_nobody(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("l", {"a": torch.ones(50)})
    cache.limit = cache.nbytes() + 3
    (cache.folder / "k.safetensors").write_bytes(b"damaged")
    os.utime(cache.folder / "k.safetensors", (1, 1))
    (cache.folder / ".writing-left").write_bytes(b"half")
    os.utime(cache.folder / ".writing-left", (1, 1))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse(LOCKED))
        assert cache.get("k") is None
        assert cache.put("l", {"a": torch.ones(50)})
        assert cache.clear() == 0
        patched.setattr(Path, "replace", refuse(LOCKED))
        assert not cache.put("m", {"a": torch.ones(2)})
    cache.put("l", {"a": torch.ones(50)})
    assert [path.name for path in cache.entries()] == ["l.safetensors"]
    monkeypatch.setattr("safetensors.torch.save", refuse(MemoryError()))
    assert not cache.put("n", {"a": torch.ones(2)})


def test_a_share_that_goes_away_while_an_entry_is_put_is_a_miss(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_file", refuse(OSError(116, "Stale file handle")))
    assert not cache.put("k", {"a": torch.ones(2)})
