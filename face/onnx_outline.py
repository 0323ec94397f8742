"""What an ONNX file is, without reading its weights: its inputs, outputs and first nodes.

A folder such as antelopev2 holds 400 MB in five files, of which two are wanted. This walks the protobuf fields of
ModelProto and GraphProto and steps over the tensors, which also shows at once whether the file ends early.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .faces import FaceError

# Field numbers of onnx.proto.
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_NAME, TENSOR_NAME, VALUE_NAME = 3, 8, 1
VALUE_DIMENSION, DIMENSION_SIZE = (2, 1, 2, 1), 1  # type.tensor_type.shape.dim of ValueInfoProto, and its dim_value
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Value(NamedTuple):
    """An input or output; None is a dimension the file leaves open."""

    name: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Outline:
    """What is known of a file by its header and the names of its nodes."""

    path: Path
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    first_nodes: tuple[str, ...]  # names of the first eight

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width of the pictures that a detector or recogniser takes."""
        height, width = self.inputs[0].shape[2:]
        return height, width

    @property
    def kind(self) -> str:
        """ "detection", "recognition", or what else is known of it, by the rules every insightface release follows."""
        if len(self.inputs) != 1 or len(self.inputs[0].shape) != 4:
            return "other"
        height, width = self.size
        if len(self.outputs) >= 5:
            return "detection" if len(self.outputs) in (9, 15) else "detection without key points"
        if height == width == 192:
            return "landmarks"
        if height == width == 96:
            return "attributes"
        square = height is not None and height == width and height >= 112 and height % 16 == 0
        return "recognition" if square and len(self.outputs) == 1 else "other"


class _Truncated(Exception):
    pass


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            break
    raise _Truncated


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field, wire type, start, end) of each field; for a varint, start is its value."""
    while at < end:
        tag, at = _varint(data, at, end)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at, end)
            yield field, wire, value, at
            continue
        if wire == BYTES:
            length, at = _varint(data, at, end)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise _Truncated
        if field == 0 or at + length > end:
            raise _Truncated
        yield field, wire, at, at + length
        at += length


def _text(data: mmap.mmap, at: int, end: int, wanted: int) -> str:
    for field, wire, start, stop in _fields(data, at, end):
        if field == wanted and wire == BYTES:
            return data[start:stop].decode("utf-8", "replace")
    return ""


def _messages(data: mmap.mmap, at: int, end: int, path: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Start and end of each message at `path`, the numbers of its field and of those around it, the outermost first."""
    for field, wire, start, stop in _fields(data, at, end):
        if field == path[0] and wire == BYTES:
            if len(path) == 1:
                yield start, stop
            else:
                yield from _messages(data, start, stop, path[1:])


def _shape(data: mmap.mmap, at: int, end: int) -> tuple[int | None, ...]:
    sizes: list[int | None] = []
    for start, stop in _messages(data, at, end, VALUE_DIMENSION):
        known = [
            size for field, wire, size, _ in _fields(data, start, stop) if (field, wire) == (DIMENSION_SIZE, VARINT)
        ]
        sizes.append(known[0] if known and 0 < known[0] < 1 << 40 else None)
    return tuple(sizes)


def outline(path: Path) -> Outline:
    """Raises FaceError for a file that is empty, ends early, or is no ONNX model."""
    broken = FaceError(
        f"{path} is no whole ONNX file ({path.stat().st_size:,} bytes): it is truncated or of another kind; copy or "
        "download it again."
    )
    inputs: list[Value] = []
    outputs: list[Value] = []
    nodes: list[str] = []
    stored: set[str] = set()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start, stop in _messages(data, 0, len(data), (MODEL_GRAPH,)):
                for part, kind, at, end in _fields(data, start, stop):
                    if kind != BYTES:
                        continue
                    if part == GRAPH_INPUT:
                        inputs.append(Value(_text(data, at, end, VALUE_NAME), _shape(data, at, end)))
                    elif part == GRAPH_OUTPUT:
                        outputs.append(Value(_text(data, at, end, VALUE_NAME), _shape(data, at, end)))
                    elif part == GRAPH_INITIALIZER:
                        stored.add(_text(data, at, end, TENSOR_NAME))
                    elif part == GRAPH_NODE and len(nodes) < 8:
                        nodes.append(_text(data, at, end, NODE_NAME))
    except (_Truncated, ValueError) as error:  # mmap refuses an empty file with a ValueError
        raise broken from error
    # Old exporters list the weights among the inputs.
    inputs = [value for value in inputs if value.name not in stored]
    if not inputs or not outputs:
        raise broken
    return Outline(path, tuple(inputs), tuple(outputs), tuple(nodes))
