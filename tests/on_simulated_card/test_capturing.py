"""Graphs are captured one at a time, and what a capture computed before is there when it returns."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from hotpath.host.capturing import captured


def test_one_capture_at_a_time(card: Any) -> None:
    captures: list[tuple[float, float]] = []
    made: list[bool] = []

    def record() -> None:
        x, out = torch.arange(4.0, device="cuda"), torch.zeros(4, device="cuda")

        def step() -> None:
            start = time.monotonic()
            out.copy_(x + 1)
            if torch.cuda.is_current_stream_capturing():
                time.sleep(0.2)
                captures.append((start, time.monotonic()))

        graph, _ = captured(step, 1)
        assert out.tolist() == [1, 2, 3, 4]  # by the run before the capture
        x.mul_(2)
        graph.replay()
        made.append(out.tolist() == [1, 3, 5, 7])

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [True] * 3
    assert all(end <= start for (_, end), (start, _) in zip(sorted(captures), sorted(captures)[1:], strict=False))
