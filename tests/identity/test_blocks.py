"""SDXL's attention blocks: their order, patch modes, and lists that a person writes."""

from __future__ import annotations

from typing import Any

import pytest
from hotpath.identity.blocks import INDEX, PATCH_MODES, SDXL_BLOCKS, describe, parse_blocks, select_blocks


def test_the_seventy_blocks_in_the_order_of_the_file() -> None:
    expected = {}
    number = 1
    for kind, groups in (
        ("input", ((4, 2), (5, 2), (7, 10), (8, 10))),
        ("output", ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2))),
        ("middle", ((0, 10),)),
    ):
        for block, depth in groups:
            for i in range(depth):
                expected[(kind, block, i)] = number
                number += 2
    assert {block: 2 * index + 1 for block, index in INDEX.items()} == expected
    assert len(SDXL_BLOCKS) == 70
    keys = {name: 2 * INDEX[name] + 1 for name in SDXL_BLOCKS}
    assert (keys["input", 4, 0], keys["input", 8, 9]) == (1, 47)
    assert (keys["output", 0, 0], keys["output", 5, 1]) == (49, 119)
    assert (keys["middle", 0, 0], keys["middle", 0, 9]) == (121, 139)


@pytest.mark.parametrize(
    ("mode", "count", "described"),
    [
        ("full", 70, "24 input, 36 output, 10 middle"),
        ("balanced", 55, "20 input, 30 output, 5 middle"),
        ("fast", 20, "20 output"),
        ("output_only", 36, "36 output"),
    ],
)
def test_patch_modes_have_the_counts_they_name(mode: str, count: int, described: str) -> None:
    blocks = select_blocks(mode)
    assert mode in PATCH_MODES
    assert len(blocks) == count
    assert describe(blocks) == described
    assert blocks <= set(SDXL_BLOCKS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("middle", {("middle", 0, i) for i in range(10)}),
        ("output.3", {("output", 3, 0), ("output", 3, 1)}),
        ("input.7.0-4", {("input", 7, i) for i in range(5)}),
        ("input.7.3", {("input", 7, 3)}),
        ("0", {("input", 4, 0)}),
        ("69", {("middle", 0, 9)}),
        ("0-3", {("input", 4, 0), ("input", 4, 1), ("input", 5, 0), ("input", 5, 1)}),
        ("24;  60\n69", {("output", 0, 0), ("middle", 0, 0), ("middle", 0, 9)}),
        (" Output.5 ,output.5, 59", {("output", 5, 0), ("output", 5, 1)}),
        ("0-69", set(SDXL_BLOCKS)),
        ("input, output middle", set(SDXL_BLOCKS)),
    ],
)
def test_lists_of_blocks(text: str, expected: set[Any]) -> None:
    assert parse_blocks(text) == expected
    assert select_blocks("custom", text) == expected


@pytest.mark.parametrize(
    "part",
    [
        "70",
        "0-70",
        "9-3",
        "-1",
        "input.4.5",
        "input.6",
        "output.6",
        "middle.1",
        "up.0",
        "input.",
        "1.5",
        "*",
        "input.7.4-2",
    ],
)
def test_a_part_that_names_no_block_is_quoted(part: str) -> None:
    with pytest.raises(ValueError, match="names no SDXL block") as caught:
        parse_blocks(f"output.0, {part}")
    assert repr(part) in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", ",;,"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="list of blocks is empty"):
        select_blocks("custom", text)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'turbo'; choose one of full, balanced, fast, output_only, custom"):
        select_blocks("turbo")
