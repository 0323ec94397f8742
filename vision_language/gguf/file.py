"""GGUF files: the header, its metadata, and where its tensors lie. Weights stay on the disk until they are asked for.

The format is ggml's (its docs/gguf.md): versions 2 and 3, little-endian. A model may be split into several files, of which
the first has the metadata. Nothing that a file says is believed before it is compared with the file's length.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ...host.model_files import impostor
from ..unusable import UnusableModel
from .types import TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BIG_ENDIAN = tuple(int.from_bytes(version.to_bytes(4, "big"), "little") for version in VERSIONS)
ALIGNMENT = 32
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
WORDS = "tokenizer."  # with these keys begin the long lists
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """shape: as torch has it, the rows' length last. start: the first byte in `file`, the number of a file of the model."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    file: int
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.nbytes


class _Damaged(Exception):
    """The header is no header, or ends in the middle."""


class _Header:
    """Reads a header from its beginning on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 4
        self.version = self.number("<I")

    def number(self, form: str) -> Any:
        length = struct.calcsize(form)
        if self.at + length > self.size:
            raise _Damaged
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += length
        return value

    def text(self) -> str:
        length = self.number("<Q")
        if length > self.size - self.at:
            raise _Damaged
        found = self.data[self.at : self.at + length]
        self.at += length
        return found.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise _Damaged
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind][1]}"
            if count > self.size or self.at + struct.calcsize(form) > self.size:
                raise _Damaged
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        if count > self.size - self.at:
            raise _Damaged
        return [self.value(kind) for _ in range(count)]


class GgufFile:
    """One file. head: read the metadata before the tokenizer's lists only, which takes no time; it has no tensors then."""

    def __init__(self, path: Path, head: bool = False, number: int = 0) -> None:
        self.path, self.metadata, self.tensors = path, dict[str, Any](), list[StoredTensor]()
        self.size = path.stat().st_size
        with path.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                reason = impostor(path) or "it is no GGUF file; download it again."
                raise UnusableModel(f"{path} cannot be read: {reason}")
            # Not ACCESS_COPY: for pages that could be written to, Windows sets memory aside, as much as the file is long.
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._address = numpy.frombuffer(self._data, numpy.uint8).ctypes.data
        try:
            self._read(_Header(self._data), head, number)
        except (_Damaged, struct.error, RecursionError, MemoryError, OverflowError):
            raise UnusableModel(
                f"The header of {path} is damaged, or the file ends in it: delete it and download it again."
            ) from None

    def _read(self, header: _Header, head: bool, number: int) -> None:
        if header.version in BIG_ENDIAN:
            raise UnusableModel(f"{self.path} is a big-endian GGUF file: take the usual one, which is little-endian.")
        if header.version not in VERSIONS:
            raise UnusableModel(
                f"{self.path} is a GGUF file of version {header.version}, and versions 2 and 3 are read: take a newer one."
            )
        tensors, entries = header.number("<Q"), header.number("<Q")
        for _ in range(entries):
            name, kind = header.text(), header.number("<I")
            if head and name.startswith(WORDS):
                return
            self.metadata[name] = header.value(kind)
        if head:
            return
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensors):
            name, dimensions = header.text(), header.number("<I")
            if dimensions > MOST_DIMENSIONS:
                raise _Damaged
            shape = tuple(header.number("<Q") for _ in range(dimensions))[::-1]
            found.append((name, shape, header.number("<I"), header.number("<Q")))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damaged
        first = -(-header.at // alignment) * alignment
        for name, shape, kind, offset in found:
            if kind not in TYPES:
                raise UnusableModel(
                    f"{self.path} has tensors of a type that is not known here ({name}: {kind}): take another quantization "
                    "of the model, such as Q4_K_M."
                )
            made = StoredTensor(name, shape, TYPES[kind], number, first + offset)
            if not shape or not all(shape) or shape[-1] % made.kind.values or offset % alignment:
                raise _Damaged
            self.tensors.append(made)

    @property
    def end(self) -> int:
        """The length that the file should have."""
        return max((tensor.start + tensor.nbytes for tensor in self.tensors), default=0)

    def bytes_of(self, tensor: StoredTensor) -> Tensor:
        """What is stored of `tensor`, uint8, as it lies in the file: only to be read."""
        if tensor.start + tensor.nbytes > self.size:
            raise UnusableModel(cut_off(self.path, self.size, self.end))
        # Of memory that may only be read, torch warns at every call.
        lent: Any = (ctypes.c_uint8 * tensor.nbytes).from_address(self._address + tensor.start)
        lent.mapped = self._data  # which stays as long as the tensor does
        return torch.frombuffer(lent, dtype=torch.uint8)


class Gguf:
    """A model of one file or several: its metadata, and its tensors by name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [GgufFile(path, number=number) for number, path in enumerate(paths)]
        self.path, self.metadata = paths[0], self.files[0].metadata
        every = [part for file in self.files for part in file.tensors]
        self.tensors: Mapping[str, StoredTensor] = {part.name: part for part in every}
        if len(self.tensors) < len(every):
            twice = next(part.name for part in every if self.tensors[part.name] is not part)
            raise UnusableModel(
                f"{self.path} has two tensors that are called {twice}: fetch it again, or take another GGUF."
            )
        # No size of a network is larger, nor has it more layers.
        self.largest = max([len(every), *(length for part in every for length in part.shape)])
        for file in self.files:
            if file.size < file.end:
                raise UnusableModel(cut_off(file.path, file.size, file.end))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise UnusableModel(f"{self.path} lacks the tensor {name}: it is not whole, or not a model of its kind.")
        return self.tensors[name]

    def blocks(self, name: str) -> Tensor:
        """The tensor `name` as it is stored, uint8 [blocks, bytes of a block]. Weights lie in it row after row."""
        tensor = self.stored(name)
        return self.files[tensor.file].bytes_of(tensor).view(-1, tensor.kind.nbytes)


def cut_off(path: Path, size: int, whole: int) -> str:
    return (
        f"{path} is not whole ({size:,} of {whole:,} bytes), as after a download that broke off: delete it and download it "
        "again."
    )


def parts_of(path: Path) -> Iterator[Path]:
    """The files that belong together with `path`, itself among them, in their order; whether they are there or not."""
    found = PART.search(path.name)
    if found is None:
        yield path
        return
    for number in range(1, int(found[2]) + 1):
        yield path.with_name(f"{path.name[: found.start()]}-{number:05d}-of-{found[2]}{path.name[found.end() :]}")
