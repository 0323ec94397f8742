"""How many visual tokens a picture may cost: presets in tokens, turned into pixels by the loaded model's own sizes.

A visual token covers (patch * merge)^2 pixels: 28 x 28 in Qwen2-VL and 2.5-VL, 32 x 32 in Qwen3-VL. Budgets counted in
28 x 28 pixels, as older nodes have them, give a Qwen3-VL a quarter fewer tokens than their names say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

OLD_TOKEN_PIXELS = 28 * 28


@dataclass(frozen=True)
class TokenPixels:
    """The sizes of a loaded model's image processor.

    side: pixels of a visual token along one edge (patch * merge). shortest, longest: the processor's own pixel limits.
    """

    side: int
    shortest: int
    longest: int


@dataclass(frozen=True)
class Budget:
    """Visual tokens a picture may cost.

    most: None leaves the upper limit to the model's processor. least: smaller pictures are enlarged to it; None
    leaves it to the processor, 0 never enlarges. in_old_pixels: count a token as 28 x 28 pixels whatever the model.
    """

    name: str
    least: int | None
    most: int | None
    in_old_pixels: bool = False

    def halved(self, sizes: TokenPixels) -> Budget:
        """Half the tokens, for a second try after the device ran out of memory."""
        most = self.most if self.most is not None else sizes.longest // sizes.side**2
        half = max(16, most // 2)
        return replace(self, name=f"{self.name}, halved", most=half, least=min(self.least or 0, half))

    def edges(self, sizes: TokenPixels) -> tuple[int, int]:
        """(shortest_edge, longest_edge) for the image processor: pixel counts, in spite of their names."""
        token = OLD_TOKEN_PIXELS if self.in_old_pixels else sizes.side**2
        longest = sizes.longest if self.most is None else self.most * token
        shortest = sizes.shortest if self.least is None else max(self.least * token, sizes.side**2)
        return min(shortest, longest), longest


PRESETS: dict[str, Budget] = {
    "fast": Budget("fast", 0, 256),
    "balanced": Budget("balanced", 0, 512),
    "high": Budget("high", 0, 768),
    "ultra": Budget("ultra", 0, 1024),
    "native": Budget("native", 0, None),
}
# What the older nodes meant by the same words, and by no word at all.
OLD_PRESETS: dict[str, Budget] = {
    "fast": Budget("fast", 128, 256, True),
    "balanced": Budget("balanced", 256, 512, True),
    "high": Budget("high", 256, 768, True),
    "ultra": Budget("ultra", 256, 1024, True),
}
PROCESSOR = Budget("the processor's own", None, None)


def preset(name: str) -> Budget:
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no token budget: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def check_sides(height: int, width: int) -> None:
    """Raises ValueError for a picture that no processor of these models takes."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"A picture of {width} x {height} is too narrow: its sides may differ by 200 times at most.")


def fitted(height: int, width: int, side: int, shortest: int, longest: int) -> tuple[int, int]:
    """The size a frame is resized to: multiples of `side`, the area within the limits, the proportions nearly kept.

    The rule of the Qwen-VL processors (Qwen2-VL, section 2.1), used here for video, whose processors differ between
    versions in what their limits count. Raises ValueError for a side ratio over 200.
    """
    check_sides(height, width)
    tall, wide = max(side, round(height / side) * side), max(side, round(width / side) * side)
    if tall * wide > longest:
        shrink = math.sqrt(height * width / longest)
        tall = max(side, math.floor(height / shrink / side) * side)
        wide = max(side, math.floor(width / shrink / side) * side)
    elif tall * wide < shortest:
        grow = math.sqrt(shortest / (height * width))
        tall, wide = math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return tall, wide
