"""CUDA graphs are captured here, one at a time: cudaMallocAsync, which ComfyUI asks for, allows one capture in a process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")

_capturing = threading.RLock()  # one in another is for torch to refuse


def captured(
    function: Callable[[], Made],
    warm_runs: int,
    device: torch.device | None = None,
    stream: Any = None,
    pool: Any = None,
) -> tuple[Any, Made]:
    """A CUDA graph of `function`, and what `function` gave while it was captured: every replay writes that anew.

    `function` runs `warm_runs` times before, so that libraries choose their kernels and workspaces outside of the capture; what
    it then writes is there when this returns. device: the current one by default. stream: a new one by default; pool: memory
    that graphs share, which they may where one of them runs at a time.
    """
    before: Any = torch.cuda.current_stream(device)
    stream = stream or torch.cuda.Stream(device=device)
    stream.wait_stream(before)
    try:
        # Around the capture too: torch leaves its stream behind as the current one where a capture fails.
        with torch.cuda.stream(stream):
            for _ in range(warm_runs):
                function()
            graph = torch.cuda.CUDAGraph()
            # thread_local: what another thread does with the card meanwhile, such as decoding a preview, is its own affair.
            with _capturing, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                made = function()
    finally:
        before.wait_stream(stream)
    return graph, made
