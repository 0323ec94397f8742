"""How much an identity changes each cross-attention block at each step, as telemetry measured it.

The size of a contribution is relative: the root of its energy (sum of squares) over that of the block's own output, the
attention to the text. Energies of several calls at the same noise level add up, so a batch, a CFG split over devices and
several seeds need no weighing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..host.letters import counted
from .blocks import SDXL_BLOCKS, Block

Floats = NDArray[np.float64]
GROUPS = ("input", "middle", "output")  # the way of the data through the UNet


def block_name(block: Block) -> str:
    """Such as "input.4.0": what a list of custom blocks takes."""
    return ".".join(map(str, block))


@dataclass(frozen=True, eq=False)
class Contributions:
    """Energies by step and block. Raises ValueError for values that are not finite.

    sigmas: [S], falling. identity, own: [S, B], sums of squares of the identities' contributions and of the blocks' own
    outputs; own is 0 where nothing was measured. runs, calls: how many sampling runs are in it, and model calls that
    measured something.
    """

    blocks: tuple[Block, ...]
    sigmas: Floats
    identity: Floats
    own: Floats
    runs: int = 1
    calls: int = 0

    def __post_init__(self) -> None:
        shape = (len(self.sigmas), len(self.blocks))
        if self.identity.shape != shape or self.own.shape != shape:
            raise ValueError(f"contributions need energies {shape}, not {self.identity.shape} and {self.own.shape}")
        finite = np.isfinite(self.identity).all(axis=0) & np.isfinite(self.own).all(axis=0)
        if not finite.all():
            names = ", ".join(block_name(self.blocks[i]) for i in np.flatnonzero(~finite))
            raise ValueError(
                f"The model gave values that are not finite (NaN) in {names}: such a run says nothing about its blocks. "
                "Look at the picture; another precision or a lower weight helps."
            )

    @property
    def relative(self) -> Floats:
        """[S, B] size of the contribution over the size of the block's own output; NaN where nothing was measured."""
        measured = self.own > 0
        ratio = np.divide(self.identity, self.own, out=np.full(self.own.shape, np.nan), where=measured)
        return np.asarray(np.sqrt(ratio))

    @property
    def measured(self) -> NDArray[np.bool_]:
        """[B] whether a block was measured at all."""
        return np.asarray((self.own > 0).any(axis=0))

    @property
    def size(self) -> Floats:
        """[B] mean relative size over the steps in which the identity acted anywhere; 0 for a block never measured."""
        steps = int((self.own > 0).any(axis=1).sum())
        return np.asarray(np.nansum(self.relative, axis=0) / max(steps, 1))

    @property
    def share(self) -> Floats:
        """[B] each block's part of the sum of all sizes; zeros when nothing was measured."""
        size = self.size
        total = size.sum()
        return np.asarray(size / total if total > 0 else size)

    def in_network_order(self) -> list[int]:
        """Places of the blocks in the order the data goes through them: input, middle, output."""
        return sorted(range(len(self.blocks)), key=lambda i: (GROUPS.index(self.blocks[i][0]), *self.blocks[i][1:]))

    @property
    def is_sdxl(self) -> bool:
        """Whether the blocks are SDXL's 70, which is what a profile is about."""
        return self.blocks == SDXL_BLOCKS


def energies_by_step(steps: Mapping[float, Floats], blocks: tuple[Block, ...], runs: int, calls: int) -> Contributions:
    """Contributions of the energies [B, 2] (identity, own) at each noise level."""
    sigmas = sorted(steps, reverse=True)
    stacked = np.stack([steps[s] for s in sigmas]) if sigmas else np.zeros((0, len(blocks), 2))
    return Contributions(blocks, np.array(sigmas), stacked[..., 0], stacked[..., 1], runs, calls)


def table(found: Contributions) -> str:
    """Sums by group, then every measured block, the largest share first."""
    size, share, relative = found.size, found.share, found.relative
    order = sorted(np.flatnonzero(found.measured).tolist(), key=lambda i: (-share[i], i))
    lines = [
        f"{len(order)} of {len(found.blocks)} blocks measured over {counted(len(found.sigmas), 'step')} "
        f"({counted(found.calls, 'model call')}, {counted(found.runs, 'run')}).",
        "size: the identity's contribution relative to the block's own output, mean over the steps.",
        "",
        f"{'group':12} {'blocks':>7} {'share':>8}",
    ]
    groups = sorted({block[:2] for block in found.blocks}, key=lambda g: (GROUPS.index(g[0]), g[1]))
    for group in groups:
        inside = [i for i in order if found.blocks[i][:2] == group]
        if inside:
            lines.append(f"{group[0]}.{group[1]:<{11 - len(group[0])}} {len(inside):7} {share[inside].sum():8.1%}")
    lines += ["", f"{'block':12} {'size':>8} {'largest':>8} {'share':>8} {'sum':>8}"]
    total = 0.0
    for i in order:
        total += share[i]
        largest = np.nanmax(relative[:, i])
        lines.append(f"{block_name(found.blocks[i]):12} {size[i]:8.4f} {largest:8.4f} {share[i]:8.2%} {total:8.1%}")
    return "\n".join(lines)
