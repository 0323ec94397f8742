"""Graphs are captured one at a time, and what a capture computed before is there when it returns."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from hotpath.host import capturing
from hotpath.host.capturing import GraphMemory, captured


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


@pytest.mark.parametrize("name", capturing.ENDS)
def test_a_capture_that_breaks_off_costs_the_next_ones_nothing(
    card: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    end = torch._C._cuda_endAllocateToPool
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.setattr(torch._C, name, end, raising=False)
    x, out = torch.arange(4.0, device="cuda"), torch.zeros(4, device="cuda")
    memory = GraphMemory()

    def step() -> None:
        out.copy_(x + 1)

    def waits() -> None:
        step()
        out.sum().item()

    first, _ = captured(step, 1, memory=memory)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing") as raised:
        captured(waits, 1, memory=memory)
    error = weakref.ref(raised.value)
    raised.value.__traceback__ = None
    del raised
    assert error() is None, "nothing but a collector of garbage would free what the failed call had in memory"
    assert torch.cuda.current_stream() is stream
    assert memory.stream is memory.pool is None, "nothing more goes where it broke off"
    second, _ = captured(step, 1, memory=memory)
    assert second.pool() != first.pool()
    for graph in (first, second):
        x.add_(1)
        graph.replay()
        assert torch.equal(out.cpu(), x.cpu() + 1)


def test_an_error_that_has_a_cause_of_its_own_is_told_as_it_is(card: Any) -> None:
    def fails() -> None:
        torch.zeros(3, device="cuda").add_(1)
        if torch.cuda.is_current_stream_capturing():
            try:
                raise KeyError("inner")
            except KeyError:
                raise RuntimeError("outer") from None

    with pytest.raises(RuntimeError, match="outer"):
        captured(fails, 1)


def test_an_error_of_the_function_ends_the_capture(card: Any) -> None:
    def fails() -> None:
        torch.zeros(3, device="cuda").add_(1)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        captured(fails, 1)
    assert captured(lambda: torch.zeros(3, device="cuda"), 1)[0] is not None


def test_what_other_threads_do_meanwhile_breaks_no_capture(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    graph = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **settings: (asked.append(settings), graph(*a, **settings))[1])
    captured(lambda: torch.zeros(3, device="cuda"), 1)
    assert [settings["capture_error_mode"] for settings in asked] == ["thread_local"]


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_meanwhile(card: Any, collects: bool) -> None:
    freed: list[bool] = []

    class Circle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(torch.cuda.is_current_stream_capturing())

    def litters() -> torch.Tensor:
        made = torch.zeros(3, device="cuda")
        if torch.cuda.is_current_stream_capturing():
            for _ in range(20 * gc.get_threshold()[0]):
                Circle()
        return made

    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        captured(litters, 1)
        assert gc.isenabled() == collects
        gc.collect()
        assert freed and not any(freed)
        with pytest.raises(ZeroDivisionError):
            captured(lambda: 1 // (not torch.cuda.is_current_stream_capturing()), 1)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_memory_is_shared_while_a_graph_of_it_lives(card: Any) -> None:
    memory = GraphMemory()
    first, _ = captured(lambda: torch.zeros(3, device="cuda"), 1, memory=memory)
    second, _ = captured(lambda: torch.zeros(3, device="cuda"), 1, memory=memory)
    assert first.pool() == second.pool()
    del first
    third, _ = captured(lambda: torch.zeros(3, device="cuda"), 1, memory=memory)
    assert third.pool() == second.pool()
    left = third.pool()
    del second, third
    assert captured(lambda: torch.zeros(3, device="cuda"), 1, memory=memory)[0].pool() != left


def test_workspaces_are_made_within_the_capture(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captured(lambda: torch.zeros(3, device="cuda"), 1)
    assert card.launches["workspaces cleared"] == 2  # before it, and after it
    # cudaMallocAsync gives a graph what is allocated in its capture: there they stay where the runs before it made them.
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    captured(lambda: torch.zeros(3, device="cuda"), 1)
    assert card.launches["workspaces cleared"] == 2


def test_where_a_graph_that_goes_takes_workspaces_with_it_each_has_its_stream(
    card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def step() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            used.append(torch.cuda.current_stream())
        return torch.zeros(3, device="cuda")

    memory = GraphMemory()
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    for release, streams in (("2.11.0+cu130", 1), ("2.12.1", 3)):
        monkeypatch.setattr(torch, "__version__", release)
        used.clear()
        kept = [captured(step, 1, memory=memory) for _ in range(3)]
        assert len(set(used)) == streams and len(kept) == 3
