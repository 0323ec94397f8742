"""MD5 keys over content: the same parameters give the same key in every process, different ones a different key.

Never `id()`, `data_ptr()` or `str(tensor)`: memory is reused and printed tensors are abbreviated, and both have handed
one person's face to another in packs that relied on them.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def content_key(*parts: Any) -> str:
    """MD5 (hex) of nested tensors, arrays, numbers, strings, paths, None, sequences and mappings.

    Every value is framed with its type and length, so that ("ab", "c") and ("a", "bc"), 1 and 1.0 and True, or a
    [2, 3] and a [3, 2] tensor differ. Mappings are ordered by key. Raises TypeError for anything else: an object
    whose content is not known cannot be part of a key.
    """
    digest = hashlib.md5(usedforsecurity=False)
    _feed(digest, parts)
    return digest.hexdigest()


def _frame(digest: Any, tag: bytes, payload: Any) -> None:
    view = memoryview(payload)
    digest.update(tag + struct.pack("<Q", view.nbytes))
    digest.update(view)


def _feed(digest: Any, value: Any) -> None:
    if value is None:
        _frame(digest, b"N", b"")
    elif isinstance(value, bool):
        _frame(digest, b"B", b"\1" if value else b"\0")
    elif isinstance(value, int):
        _frame(digest, b"I", str(value).encode())
    elif isinstance(value, float):
        _frame(digest, b"F", struct.pack("<d", value))
    elif isinstance(value, str):
        _frame(digest, b"S", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        _frame(digest, b"Y", value)
    elif isinstance(value, os.PathLike):
        _frame(digest, b"P", os.fsencode(value))
    elif isinstance(value, torch.Tensor):
        _feed_tensor(digest, value)
    elif isinstance(value, np.ndarray):
        _frame(digest, b"A", f"{value.dtype.str}{value.shape}".encode())
        _frame(digest, b"a", np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif isinstance(value, torch.dtype):
        _frame(digest, b"D", str(value).encode())
    elif isinstance(value, Mapping):
        _frame(digest, b"M", str(len(value)).encode())
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        _frame(digest, b"L", str(len(value)).encode())
        for item in value:
            _feed(digest, item)
    else:
        raise TypeError(f"a {type(value).__name__} has no known content to make a cache key of")


def _feed_tensor(digest: Any, tensor: torch.Tensor) -> None:
    _frame(digest, b"T", f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy knows neither bfloat16 nor the fp8 types; their bytes say everything.
    _frame(digest, b"t", flat.view(torch.uint8).numpy() if flat.numel() else b"")


REMEMBERED = 1 << 16  # fingerprints at most; a list may name a million files
FRESH = 2.5  # seconds in which a file may be written once more without another time: some disks tell every second one
_fingerprints: dict[tuple[str, int, int, int, int, bool], str] = {}


def file_fingerprint(path: Path, dated: bool = True) -> str:
    """MD5 (hex) that changes when the file does: its size and up to 16 MiB of samples spread over it.

    Reading a 1.7 GB file whole takes seconds on a cold disk, so files over 16 MiB are sampled in 16 slices of 1 MiB
    including both ends, and the modification time is part of the key unless `dated` is off, for what has to be the same on
    another machine. Remembered per (path, size, times), once the file has been there for a moment.
    """
    stat = path.stat()
    # The last time changes with the content whatever becomes of the others (on Windows it is that of creation).
    known = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, dated)
    if (remembered := _fingerprints.get(known)) is not None:
        return remembered
    digest = hashlib.md5(struct.pack("<Q", stat.st_size), usedforsecurity=False)
    slices, length = 16, 1 << 20
    with path.open("rb") as file:
        if stat.st_size <= slices * length:
            digest.update(file.read())
        else:
            if dated:
                digest.update(struct.pack("<q", stat.st_mtime_ns))
            for i in range(slices):
                file.seek((stat.st_size - length) * i // (slices - 1))
                digest.update(file.read(length))
    found = digest.hexdigest()
    if abs(time.time() - max(stat.st_mtime, stat.st_ctime)) > FRESH:
        if len(_fingerprints) >= REMEMBERED:
            _fingerprints.clear()
        _fingerprints[known] = found
    return found
