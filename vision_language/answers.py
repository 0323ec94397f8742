"""What an answer is made of: thoughts and text, JSON in it, and boxes in that."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

THINK, THINK_END = "<think>", "</think>"
FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
FENCED = re.compile(r"```[\w-]*[ \t]*\n((?:(?!```).)*)\n?```", re.DOTALL)
BEGINS = re.compile(r"[\[{]")
OBJECT = re.compile(r"\{\s*[\"'}]")  # where prose has a brace, no name follows
LIST = re.compile(r"\[\s*(?:[-\[{\"\d]|(?:true|false|null)\s*[,\]])")
NESTED = re.compile(r"\[\s*" + LIST.pattern)
# A string, which is left as it is, or a comma with nothing behind it.
COMMA = re.compile(r'("(?:[^"\\]|\\.)*"?)|,(?=\s*[}\]])', re.DOTALL)
BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "bboxes", "boxes")
FARTHEST = 1e9  # a corner beyond it is a number that ran away
RELATIVE = 1000  # Qwen3-VL counts both edges of any picture to 1000


@dataclass(frozen=True)
class Box:
    """left, top, right, bottom in pixels of the picture that was asked about."""

    left: float
    top: float
    right: float
    bottom: float
    label: str


def split_thoughts(text: str, opened: bool = False) -> tuple[str, str]:
    """(thoughts, answer). opened: the template itself opened the thoughts, so a text without an end is all thoughts.

    A model may think more than once, and be cut off while it does. Where thoughts end twice, the first end was thought.
    """
    blocks, said, thinking = [""], "", opened
    for index, part in enumerate(text.split(THINK)):
        thought, end, answer = part.rpartition(THINK_END)
        # Inside a line of the answer it is a word without an end, which the answer is about.
        begins = index > 0 and (not said.strip() or said.rstrip(" ").endswith("\n"))
        if not (end or thinking or begins):
            said += THINK * bool(index) + part
            continue
        if not thinking:
            blocks.append("")
        blocks[-1] += thought if end else part
        said, thinking = said + answer * bool(end), not end
    return "\n\n".join(block.strip() for block in blocks if block.strip()), said.strip()


def unfenced(text: str) -> str:
    """`text` without the marks of code around all of it."""
    found = FENCED.fullmatch(text.strip())
    return text if found is None else found[1].strip()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _decoder() -> json.JSONDecoder:
    # Python would read NaN and Infinity, which no other reader of the answer takes. Models break lines inside strings.
    return json.JSONDecoder(parse_constant=_refuse, strict=False)


def _printable(value: Any) -> Any:
    """`value` with halves of surrogate pairs, which a cut-off escape leaves and nothing can write, replaced by '?'."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(entry) for name, entry in value.items()}
    return value


def find_json(text: str) -> Any:
    """The first JSON value in `text`: fenced, bare, or inside prose; None when there is none.

    A list that was cut off by the token limit is read up to its last whole entry, and commas too many are overlooked. An
    object that cannot be read is None, and never a piece out of its middle.
    """
    try:
        return _printable(_find_json(text))
    except RecursionError:  # a model that repeats itself opens a thousand brackets
        return None


def _find_json(text: str) -> Any:
    decoder = _decoder()
    for candidate in (*FENCE.findall(text), text):
        start = 0
        while (begins := BEGINS.search(candidate, start)) is not None:
            start = begins.start()
            try:
                return decoder.raw_decode(candidate, start)[0]
            except ValueError:
                is_object, is_list = OBJECT.match(candidate, start), LIST.match(candidate, start)
            if is_object or is_list:
                mended = COMMA.sub(lambda found: found.group(1) or "", candidate[start:])
                try:
                    return decoder.raw_decode(mended)[0]
                except ValueError:
                    if is_list and (entries := whole_entries(mended[1:])):
                        return entries
            if is_object or NESTED.match(candidate, start):
                break
            start += 1
    return None


def whole_entries(text: str) -> list[Any]:
    """The entries of a list without its end, as far as they are whole."""
    entries: list[Any] = []
    decoder = _decoder()
    rest = text.lstrip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except ValueError:
            break
        rest = rest[end:].lstrip()
        if isinstance(value, int | float) and not rest.startswith(","):
            break  # further digits may be missing
        entries.append(value)
        if not rest.startswith(","):
            break
        rest = rest[1:].lstrip()
    return entries


def find_boxes(value: Any, height: int, width: int, seen: tuple[int, int] | None) -> list[Box]:
    """Boxes anywhere in a parsed answer, in pixels of the picture of `height` x `width`.

    seen: (height, width) as the model saw it, for models that answer in its pixels (Qwen2.5-VL); None for models that
    count both edges to 1000 (Qwen3-VL, Qwen2-VL).
    """
    down, across = (RELATIVE, RELATIVE) if seen is None else seen
    boxes: list[Box] = []
    try:
        found = _labelled_corners(value)
    except RecursionError:
        return []
    for corners, label in found:
        xs = sorted(min(max(v * width / across, 0.0), float(width)) for v in (corners[0], corners[2]))
        ys = sorted(min(max(v * height / down, 0.0), float(height)) for v in (corners[1], corners[3]))
        boxes.append(Box(xs[0], ys[0], xs[1], ys[1], label))
    return boxes


def _labelled_corners(value: Any, label: str = "", bare: bool = True) -> list[tuple[list[float], str]]:
    """Corners with their labels, in the order they were written.

    bare: four numbers are a box; inside an object only under a name for one, where they could be anything else.
    """
    if isinstance(value, dict):
        own = str(value.get("label") or value.get("text") or value.get("name") or "")
        key = next((key for key in BOX_KEYS if key in value), None)
        if key is not None:
            return _labelled_corners(value[key], own)
        return [found for entry in value.values() for found in _labelled_corners(entry, bare=False)]
    if not isinstance(value, list):
        return []
    if len(value) == 4 and all(isinstance(v, int | float) for v in value):
        whole = not any(isinstance(v, bool) for v in value) and all(abs(v) < FARTHEST for v in value)
        return [(value, label)] if bare and whole else []
    return [found for entry in value for found in _labelled_corners(entry, label, bare)]
