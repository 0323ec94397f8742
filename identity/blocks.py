"""SDXL's 70 cross-attention blocks in the adapter's order, and the named selections of them.

The adapter numbers its keys and values over *all* blocks, input first, then output, then middle (the order of the
diffusers UNet). A selection leaves blocks out; it never renumbers the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Block = tuple[str, int, int]
"""("input" | "output" | "middle", block id, transformer index), as ComfyUI's attention patches name it."""

SDXL_BLOCKS: tuple[Block, ...] = (
    *(("input", block, i) for block, depth in ((4, 2), (5, 2), (7, 10), (8, 10)) for i in range(depth)),
    *(("output", block, i) for block, depth in enumerate((10, 10, 10, 2, 2, 2)) for i in range(depth)),
    *(("middle", 0, i) for i in range(10)),
)
INDEX = {block: index for index, block in enumerate(SDXL_BLOCKS)}

ADAPTIVE = "adaptive"  # by a measured profile, see contribution_profile
PATCH_MODES = ("full", "balanced", "fast", "output_only", "custom", ADAPTIVE)


def _in_output(last: int) -> frozenset[Block]:
    return frozenset(b for b in SDXL_BLOCKS if b[0] == "output" and b[1] <= last)


SELECTIONS: dict[str, frozenset[Block]] = {
    "full": frozenset(SDXL_BLOCKS),
    "balanced": _in_output(2)
    | {b for b in SDXL_BLOCKS if b[0] == "middle" and b[2] < 5}
    | {b for b in SDXL_BLOCKS if b[0] == "input" and b[1] in (7, 8)},
    "fast": _in_output(1),
    "output_only": _in_output(5),
}

_PART = re.compile(r"(input|output|middle)(?:\.(\d+)(?:\.(\d+)(?:-(\d+))?)?)?")


def parse_blocks(text: str) -> frozenset[Block]:
    """Blocks named in a list such as "output.0, output.1, input.7.0-4, middle, 12, 20-29".

    A bare number or range counts blocks from 0 to 69 in the adapter's order. Raises ValueError naming the part that
    is not understood, and when nothing is selected.
    """
    chosen: set[Block] = set()
    for part in filter(None, re.split(r"[,;\s]+", text.strip().lower())):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            found = set(SDXL_BLOCKS[first : last + 1]) if last < len(SDXL_BLOCKS) else set()
        elif match := _PART.fullmatch(part):
            kind, block, low, high = match[1], match[2], match[3], match[4]
            found = {
                b
                for b in SDXL_BLOCKS
                if b[0] == kind
                and (block is None or b[1] == int(block))
                and (low is None or int(low) <= b[2] <= int(high or low))
            }
        else:
            found = set()
        if not found:
            raise ValueError(
                f"{part!r} names no SDXL block; write parts such as output.0, input.7.0-4, middle or 12-20 (0 to 69)."
            )
        chosen |= found
    if not chosen:
        raise ValueError("patch_mode is custom, but the list of blocks is empty; write for example output.0, output.1")
    return frozenset(chosen)


def select_blocks(mode: str, custom: str = "") -> frozenset[Block]:
    """The blocks of a patch mode. Raises ValueError for an unknown mode or a custom list that is not understood."""
    if mode == "custom":
        return parse_blocks(custom)
    if mode not in SELECTIONS:
        raise ValueError(f"patch_mode is {mode!r}; choose one of {', '.join(PATCH_MODES)}.")
    return SELECTIONS[mode]


def describe(blocks: Iterable[Block]) -> str:
    """Such as "20 input, 36 output, 10 middle"."""
    counts = {kind: 0 for kind in ("input", "output", "middle")}
    for kind, _, _ in blocks:
        counts[kind] += 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
