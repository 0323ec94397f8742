"""SCRFD with key points (arXiv:2105.04714): from a batch of letterboxed pictures to boxes.

Per stride 8, 16, 32 the network gives scores (already sigmoid), distances to the four sides and offsets to the five
points, all in strides, two anchors per cell, both centred on the cell's upper left corner.

The files in use were exported when rows ran (height, width, *batch*, anchor): in a batch the pictures are interleaved.
Newer exports put the batch first. No header says which, so `Detector` finds out with two pictures of noise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import host
from ..attention.topk import topk
from .faces import FaceError
from .onnx_outline import Outline
from .runner import Run, Runner, joined, replayed

log = logging.getLogger("hotpath.face")

CANDIDATES = 256  # fetched per picture; pictures with more over the threshold are computed again, and fetched whole
MERGED_AT_ONCE = 128
PROBE_SIDE = 96  # three cells at stride 32
PROBE_TOLERANCE = 2e-3  # on outputs of about 1; a wrong layout is wrong by more than 0.1


@dataclass(frozen=True)
class Candidates:
    """Of one picture, the best score first: what passed the threshold, before overlapping boxes are merged."""

    boxes: NDArray[np.float32]  # [K, 4] in canvas pixels
    points: NDArray[np.float32]  # [K, 5, 2]
    scores: NDArray[np.float32]  # [K]


class Detector:
    """A detection network whose output layout is known."""

    def __init__(self, runner: Runner, file: Outline) -> None:
        """Runs the network three times on noise. Raises FaceError when its outputs are not those of an SCRFD."""
        self.runner = runner
        self.file = file
        self.strides: tuple[int, ...] = (8, 16, 32) if len(file.outputs) == 9 else (8, 16, 32, 64, 128)
        height, width = file.size
        self.fixed_size = (height, width) if height is not None and width is not None else None
        self.anchors = 0
        self.layout = self._probe()
        log.info("%s: %s, %d anchors per cell", file.path.name, self.layout, self.anchors)

    def _probe(self) -> str:
        """ "batch inside", "batch outside" or "one picture at a time"."""
        side = max(PROBE_SIDE, self.strides[-1])
        height, width = self.fixed_size or (side, side)
        noise = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(self.runner.device)
        single = [self.runner.run(noise[i : i + 1]) for i in range(2)]
        cells = [-(-height // s) * -(-width // s) for s in self.strides]
        levels = len(self.strides)
        rows = [o.numel() // channels for o, channels in zip(single[0], self._channels(), strict=True)]
        self.anchors = rows[0] // cells[0]
        expected = [n * self.anchors for n in cells] * 3
        if self.anchors < 1 or rows != expected:
            raise FaceError(
                f"{self.file.path} is no SCRFD detector with key points (rows {rows[:levels]} per stride where "
                f"multiples of {cells} belong): put the right file there."
            )
        try:
            both = self.runner.run(noise)
        except Exception as error:  # each engine raises its own for a graph with a batch of one built in
            log.info("%s takes one picture at a time (%s)", self.file.path.name, error)
            return "one picture at a time"
        if [o.numel() for o in both] == [2 * o.numel() for o in single[0]]:
            alone = [self._arrange(s, 1, (height, width), "batch outside") for s in single]
            for layout in ("batch inside", "batch outside"):
                arranged = self._arrange(both, 2, (height, width), layout)
                if all(
                    torch.allclose(whole[i], part[0], atol=PROBE_TOLERANCE, rtol=PROBE_TOLERANCE)
                    for i in range(2)
                    for whole, part in zip(arranged, alone[i], strict=True)
                ):
                    return layout
        return "one picture at a time"

    def _channels(self) -> list[int]:
        return [c for c in (1, 4, 10) for _ in self.strides]

    def _arrange(self, outputs: list[Tensor], count: int, size: tuple[int, int], layout: str) -> list[Tensor]:
        """Each output as [count, cells * anchors, channels]."""
        arranged = []
        for i, (output, channels) in enumerate(zip(outputs, self._channels(), strict=True)):
            stride = self.strides[i % len(self.strides)]
            cells = -(-size[0] // stride) * -(-size[1] // stride)
            if layout == "batch inside":
                output = output.reshape(cells, count, self.anchors, channels).transpose(0, 1)
            arranged.append(output.reshape(count, cells * self.anchors, channels))
        return arranged

    def predict(self, canvas: Tensor, run: Run | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [N, A], side distances [N, A, 4] and point offsets [N, A, 10] of `canvas` [N, 3, H, W], in strides."""
        run = run or self.runner.run
        count, size = canvas.shape[0], (int(canvas.shape[2]), int(canvas.shape[3]))
        if self.layout == "one picture at a time":
            each = [self._arrange(run(canvas[i : i + 1]), 1, size, "batch outside") for i in range(count)]
            outputs = [torch.cat(parts) for parts in zip(*each, strict=True)]
        else:
            outputs = self._arrange(run(canvas), count, size, self.layout)
        levels = len(self.strides)
        scores, sides, points = (torch.cat(outputs[i * levels : (i + 1) * levels], 1) for i in range(3))
        return scores[..., 0], sides, points

    def find(self, canvases: Sequence[Tensor], threshold: float) -> list[Candidates]:
        """Everything with a score of at least `threshold` per picture of `canvases` [N, 3, H, W] of one size.

        One copy to the host, which is the only time anybody waits for the device; pictures with more than CANDIDATES over
        the threshold are computed and copied again. Checks for an interrupt before each canvas.
        """
        packed = [self._packed(canvas, threshold, CANDIDATES) for canvas in canvases]
        rows = joined(packed).cpu()
        most = int(rows[:, 0].max())
        if most > (rows.shape[1] - 1) // 15:
            rows = joined([self._packed(canvas, threshold, most) for canvas in canvases]).cpu()
        found = []
        for row in rows.numpy():
            values = row[1:].reshape(-1, 15)[: int(row[0])]
            found.append(Candidates(values[:, 1:5], values[:, 5:].reshape(-1, 5, 2), values[:, 0]))
        return found

    def _packed(self, canvas: Tensor, threshold: float, limit: int) -> Tensor:
        """[N, 1 + K * 15] per picture: how many passed the threshold, and the best K; K is `limit`, if there are as many."""
        host.current().check_interrupt()
        grid = _grid(self.strides, self.anchors, (int(canvas.shape[2]), int(canvas.shape[3])), canvas.device)

        def step(run: Run, canvas: Tensor) -> list[Tensor]:
            scores, sides, points = self.predict(canvas, run)
            passed = (scores >= threshold).sum(1)
            # On a CPU nobody waits for the number.
            most = max(limit, int(passed.max())) if canvas.device.type == "cpu" else limit
            best = _pack(scores, sides, points, grid, min(most, scores.shape[1]))
            return [torch.cat([passed[:, None].float(), best], 1), scores, sides, points]

        return replayed(self.runner, ("find", threshold, limit), step, canvas)


def _pack(scores: Tensor, sides: Tensor, points: Tensor, grid: Tensor, limit: int) -> Tensor:
    """[N, limit * 15]: score, box and points of the best, decoded to canvas pixels."""
    best, index = topk(scores, limit)
    anchor = grid[index]
    centre, stride = anchor[..., :2], anchor[..., 2:]
    side = sides.gather(1, index[..., None].expand(-1, -1, 4)) * stride
    point = points.gather(1, index[..., None].expand(-1, -1, 10)) * stride
    box = torch.cat([centre - side[..., :2], centre + side[..., 2:]], -1)
    point = point + centre.repeat(1, 1, 5)
    return torch.cat([best[..., None], box, point], -1).flatten(1)


@lru_cache(maxsize=16)
def _grid(strides: tuple[int, ...], anchors: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """[A, 3] x, y and stride of each anchor of a canvas (height, width)."""
    levels = []
    for stride in strides:
        y, x = torch.meshgrid(
            torch.arange(-(-size[0] // stride), device=device),
            torch.arange(-(-size[1] // stride), device=device),
            indexing="ij",
        )
        cell = torch.stack([x * stride, y * stride, torch.full_like(x, stride)], -1).reshape(-1, 1, 3)
        levels.append(cell.expand(-1, anchors, -1).reshape(-1, 3))
    return torch.cat(levels).float()


def merge_overlapping(boxes: NDArray[np.float32], overlap: float) -> list[int]:
    """Greedy non-maximum suppression over boxes [K, 4] sorted by score: indices of those kept, in order.

    Sides count one pixel more than their difference, as in every SCRFD evaluation; an IoU above `overlap` goes.
    """
    left = np.arange(len(boxes))
    kept: list[int] = []
    while left.size:
        # All pairs of a few hundred at once: a call of numpy takes longer than the arithmetic of a row.
        foremost, left = left[:MERGED_AT_ONCE], left[MERGED_AT_ONCE:]
        apart = _overlaps(boxes[foremost], boxes[foremost]) <= overlap
        remains = np.ones(len(foremost), bool)
        chosen = []
        for i in range(len(foremost)):
            if remains[i]:
                chosen.append(i)
                remains &= apart[i]
        kept += foremost[chosen].tolist()
        if left.size:
            left = left[(_overlaps(boxes[foremost[chosen]], boxes[left]) <= overlap).all(0)]
    return kept


def _overlaps(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, M] intersection over union of boxes [N, 4] and others [M, 4]."""
    x0, y0, x1, y1 = np.ascontiguousarray(others.T)
    u0, v0, u1, v1 = np.ascontiguousarray(boxes.T)[:, :, None]
    width, height = np.minimum(u1, x1), np.minimum(v1, y1)
    for side, low, other in ((width, u0, x0), (height, v0, y0)):
        side -= np.maximum(low, other)
        side += np.float32(1)
        np.maximum(side, np.float32(0), out=side)
    shared = width * height
    both = (u1 - u0 + 1) * (v1 - v0 + 1) + (x1 - x0 + 1) * (y1 - y0 + 1)
    made: NDArray[np.float32] = shared / (both - shared)
    return made
