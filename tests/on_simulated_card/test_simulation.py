"""The simulated card takes amiss what a card does, and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from simulated_card import Hazard, OnCard


def recorded(function: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        out = function()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, out


def test_tensors_are_on_one_device(card: Any) -> None:
    a, b = torch.ones(3, device="cuda"), torch.ones(3)
    assert a.device == torch.device("cuda", 0) and a.is_cuda and (a + 1).is_cuda and a.cpu().device.type == "cpu"
    assert (a * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number may come from the host
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()


def test_modules_move_and_stay_the_same_objects(card: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval()
    weight = module[0].weight
    x = torch.ones(2, 3)
    expected = module(x)
    module.to("cuda")
    assert module[0].weight is weight and isinstance(weight, torch.nn.Parameter) and isinstance(weight, OnCard)
    assert torch.equal(module(x.cuda()).cpu(), expected)
    assert card.held >= sum(p.nbytes for p in module.parameters())
    module.to("cpu")
    assert not isinstance(weight, OnCard) and torch.equal(module(x), expected)


def test_waits_are_counted_and_forbidden_on_request(card: Any) -> None:
    a = torch.arange(4.0, device="cuda")
    assert not card.waits
    a.sum().item(), a[a > 1], a.cpu(), torch.cuda.synchronize()
    assert len(card.waits) == 4
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        bool(a[0] > 0)


def test_a_graph_runs_when_it_is_replayed(card: Any) -> None:
    x, seen = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")

    def step() -> torch.Tensor:
        seen.add_(1)
        return x * 2 + seen

    graph, out = recorded(step)
    assert seen.tolist() == [0, 0] and out.isnan().all()
    graph.replay()
    assert seen.tolist() == [1, 1] and out.tolist() == [3, 3]
    x.copy_(torch.tensor([5.0, 6.0]))
    graph.replay()
    assert out.tolist() == [12, 14]


@pytest.mark.parametrize("forbidden", [lambda x: x.sum().item(), lambda x: x + torch.ones(2).to("cuda")])
def test_a_graph_does_not_wait(card: Any, forbidden: Any) -> None:
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="during capture") as raised:
        recorded(lambda: forbidden(x))
    assert "when stream is capturing" in str(raised.value.__context__) and card.capture is None


def test_a_graph_reads_where_it_was_recorded(card: Any) -> None:
    held = [torch.ones(2, device="cuda")]
    graph, _ = recorded(lambda: held[0] * 2)
    held.clear()
    with pytest.raises(Hazard, match="freed"):
        graph.replay()


def test_streams_wait_for_each_other(card: Any) -> None:
    x = torch.ones(2, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), pytest.raises(Hazard, match="may still write"):
        x + 1
    side.wait_event(torch.cuda.current_stream().record_event())
    with torch.cuda.stream(side):
        made = x + 1
    with pytest.raises(Hazard, match="may still read"):
        x.zero_()
    torch.cuda.current_stream().wait_stream(side)
    x.zero_()
    assert made.tolist() == [2, 2]


def test_copies_arrive_when_somebody_waited(card: Any) -> None:
    x = torch.full((2,), 3.0, device="cuda")
    host = torch.empty(2, pin_memory=True)
    host.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    with pytest.raises(Hazard, match="may still copy to"):
        host.sum()
    event.synchronize()
    assert host.tolist() == [3, 3] and not card.waits
    x.copy_(host, non_blocking=True)
    with pytest.raises(Hazard, match="may still copy from"):
        host.zero_()


def test_another_thread_has_the_card_too(card: Any) -> None:
    with ThreadPoolExecutor(1) as threads, torch.inference_mode():
        made = threads.submit(torch.tensor, [1.0, 2.0], device="cuda").result()
        host = torch.empty(2, pin_memory=True)
        host.copy_(made, non_blocking=True)
        event = torch.cuda.current_stream().record_event()
        threads.submit(event.synchronize).result()  # which is in no inference mode
        assert made.is_cuda and host.tolist() == [1, 2]


def test_memory_of_another_stream_is_kept_for_it(card: Any) -> None:
    side = torch.cuda.Stream()
    x, y = torch.ones(2, device="cuda"), torch.ones(2, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    y.record_stream(side)
    with torch.cuda.stream(side):
        x + y
    del y
    assert not card.hazards
    del x
    assert len(card.hazards) == 1 and "record_stream" in card.hazards.pop()


def test_a_device_in_force_is_heard(card: Any) -> None:
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta and torch.zeros(1).is_meta
    with torch.device("cuda"):
        assert torch.tensor([1.0]).is_cuda
