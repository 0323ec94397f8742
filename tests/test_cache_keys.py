"""Content keys and fingerprints of files: what decides whether it is the right picture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hotpath.cache import content_key, file_fingerprint, keys

# ---------------------------------------------------------------- content_key

DIFFERENT = {
    "strings joined": ("ab", "c"),
    "strings joined elsewhere": ("a", "bc"),
    "a string with a tag in it": ("aSb", "c"),
    "a string with a tag elsewhere": ("a", "bSc"),
    "one string": ("abc",),
    "nested": (("ab", "c"),),
    "deeper": ((("ab",), "c"),),
    "int": (1,),
    "float": (1.0,),
    "bool": (True,),
    "string of a digit": ("1",),
    "bytes of a digit": (b"1",),
    "path": (Path("1"),),
    "another path": (Path("2"),),
    "none": (None,),
    "none first": (None, "a"),
    "none last": ("a", None),
    "nothing": (),
    "empty string": ("",),
    "empty bytes": (b"",),
    "empty list": ([],),
    "two empty lists": ([], []),
    "an empty list in a list": ([[]],),
    "empty mapping": ({},),
    "zero": (0,),
    "float zero": (0.0,),
    "false": (False,),
    "big int": (2**70,),
    "mapping": ({"a": 1, "b": 2},),
    "mapping as pairs": ([("a", 1), ("b", 2)],),
    "mapping, values swapped": ({"a": 2, "b": 1},),
    "mapping, other keys": ({"a": 1, "c": 2},),
    "mapping first": ({"a": 1}, {}),
    "mapping last": ({}, {"a": 1}),
    "dtype": (torch.float32,),
    "another dtype": (torch.float16,),
    "dtype's name": ("torch.float32",),
    "2x3": (torch.arange(6.0).reshape(2, 3),),
    "3x2": (torch.arange(6.0).reshape(3, 2),),
    "6": (torch.arange(6.0),),
    "2x3 as array": (np.arange(6, dtype=np.float32).reshape(2, 3),),
    "3x2 as array": (np.arange(6, dtype=np.float32).reshape(3, 2),),
    "2x3 as list": (torch.arange(6.0).reshape(2, 3).tolist(),),
    "scalar tensor": (torch.tensor(1.0),),
    "one element": (torch.tensor([1.0]),),
    "empty tensor": (torch.empty(0),),
    "empty 0x3": (torch.empty(0, 3),),
    "empty 3x0": (torch.empty(3, 0),),
    "empty array": (np.empty(0, np.float32),),
    "half": (torch.ones(4, dtype=torch.float16),),
    "bfloat16": (torch.ones(4, dtype=torch.bfloat16),),
    "fp8 e4m3": (torch.ones(4).to(torch.float8_e4m3fn),),
    "fp8 e5m2": (torch.ones(4).to(torch.float8_e5m2),),
    "uint8": (torch.zeros(4, dtype=torch.uint8),),
    "int8": (torch.zeros(4, dtype=torch.int8),),
    "bool tensor": (torch.zeros(4, dtype=torch.bool),),
    "int32": (torch.zeros(4, dtype=torch.int32),),
    "float32 zeros": (torch.zeros(4),),
    "negative zeros": (-torch.zeros(4),),
    "complex": (torch.ones(2, dtype=torch.complex64),),
}


def test_everything_that_differs_has_another_key() -> None:
    keys = {name: content_key(*parts) for name, parts in DIFFERENT.items()}
    by_key: dict[str, list[str]] = {}
    for name, key in keys.items():
        by_key.setdefault(key, []).append(name)
    assert [names for names in by_key.values() if len(names) > 1] == []
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys.values())


def test_a_key_is_of_the_content_and_not_of_the_object() -> None:
    picture = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1))
    same = content_key(picture)
    assert content_key(picture.clone()) == same
    assert content_key(picture.clone().requires_grad_(True)) == same
    assert content_key(torch.nn.Parameter(picture.clone())) == same
    assert content_key(("x", picture)) == content_key(["x", picture])
    changed = picture.clone()
    changed[-1, -1, -1] += 1e-7
    assert content_key(changed) != same


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.int64]
)
def test_layout_in_memory_does_not_matter(dtype: torch.dtype) -> None:
    source = (torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) * 9).to(dtype)
    turned = source.t().contiguous().t()
    assert not turned.is_contiguous()
    assert content_key(turned) == content_key(source)
    wide = torch.zeros(4, 12).to(dtype)
    wide[:, ::2] = source
    assert content_key(wide[:, ::2]) == content_key(source)
    expanded = source[:1].expand(3, 6)
    assert content_key(expanded) == content_key(expanded.clone())


def test_layout_of_arrays_does_not_matter_but_byte_order_is_content() -> None:
    source = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert content_key(np.asfortranarray(source)) == content_key(source)
    assert content_key(np.repeat(source, 2, axis=1)[:, ::2]) == content_key(source)
    assert content_key(source.astype(">f4")) != content_key(source)
    assert content_key(np.array(3.0)) != content_key(np.array([3.0]))


def test_order_of_a_mapping_does_not_matter() -> None:
    one = {"weight": 0.8, "name": "ann", "nested": {"b": 1, "a": [2, None]}}
    other = {"nested": {"a": [2, None], "b": 1}, "name": "ann", "weight": 0.8}
    assert list(one) != list(other)
    assert content_key(one) == content_key(other)


@pytest.mark.parametrize(
    "unknown",
    [
        object(),
        SimpleNamespace(a=1),
        torch.nn.Linear(1, 1),
        {1, 2},
        (i for i in range(3)),
        np.array([object()]),
        [1, {"deep": object()}],
        lambda: 0,
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_of_unknown_content_makes_no_key(unknown: object) -> None:
    with pytest.raises(TypeError):
        content_key("prefix", unknown)


def test_same_key_in_another_process() -> None:
    """A key made of addresses, or of Python's salted hash, would differ."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest, torch, numpy as np\n"
        "from pathlib import Path\n"
        "from hotpath.cache import content_key\n"
        "print(content_key('ann', 0.35, {'b': 1, 'a': None}, torch.arange(7).to(torch.bfloat16), np.ones((2, 2)),"
        " Path('x/y'), torch.float16))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "COMFYUI_PATH": os.devnull}
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    here = content_key(
        "ann",
        0.35,
        {"a": None, "b": 1},
        torch.arange(7).to(torch.bfloat16),
        np.ones((2, 2)),
        Path("x/y"),
        torch.float16,
    )
    assert run.stdout.split()[-1] == here


# ---------------------------------------------------------------- file_fingerprint


def test_a_small_file_is_known_by_its_bytes_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(b"weights" * 100)
    second.write_bytes(b"weights" * 100)
    os.utime(second, ns=(1, 1))
    assert file_fingerprint(first) == file_fingerprint(second)
    second.write_bytes(b"weights" * 99 + b"Weights")
    assert file_fingerprint(first) != file_fingerprint(second)


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    before = file_fingerprint(path)
    assert file_fingerprint(path) == before
    path.write_bytes(b"two")
    os.utime(path, ns=(10**18, 10**18))  # the clock of a file system may be too coarse to see the edit
    after = file_fingerprint(path)
    assert after != before
    path.write_bytes(b"two!")
    assert file_fingerprint(path) not in (before, after)


def test_every_edit_of_a_large_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    size = 20 << 20
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, ns=(10**18, 10**18))
    seen = {file_fingerprint(path)}
    for step, offset in enumerate((0, size - 1, (1 << 20) + 5000, size // 2), start=1):  # some lie between the samples
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        os.utime(path, ns=(10**18 + step, 10**18 + step))
        seen.add(file_fingerprint(path))
    assert len(seen) == 5


def test_a_large_file_without_its_date_is_known_by_samples_from_end_to_end(tmp_path: Path) -> None:
    seen = set()
    for offset in (None, 0, 21 << 20, (64 << 20) - 1):  # the third lies in a sample, too
        path = tmp_path / f"{offset}.bin"
        with path.open("wb") as file:
            file.truncate(64 << 20)
            if offset is not None:
                file.seek(offset)
                file.write(b"x")
        seen.add(file_fingerprint(path, dated=False))
    assert len(seen) == 4
    os.utime(path, ns=(10**18, 10**18))
    assert file_fingerprint(path, dated=False) in seen and file_fingerprint(path) not in seen


def test_fingerprints_are_remembered_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REMEMBERED", 4)
    monkeypatch.setattr(keys, "_fingerprints", {})
    monkeypatch.setattr(keys, "FRESH", -1.0)
    for number in range(10):
        (tmp_path / str(number)).write_bytes(b"x" * number)
        known = len(keys._fingerprints)
        file_fingerprint(tmp_path / str(number))
        assert len(keys._fingerprints) == (1 if known == 4 else known + 1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", None)  # it is not read again
        assert file_fingerprint(tmp_path / "9") in keys._fingerprints.values()


def test_a_file_that_was_just_written_may_be_written_again_within_the_tick_of_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stat = tmp_path / "a.bin", Path.stat
    path.write_bytes(b"first")
    at_once = path.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **options: at_once if self == path else stat(self, **options))
    before = file_fingerprint(path)
    path.write_bytes(b"other")
    assert file_fingerprint(path) != before


def test_fingerprint_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_fingerprint(tmp_path / "none.bin")
