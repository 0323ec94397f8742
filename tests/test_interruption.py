"""A stop is heard while a library works that asks nobody, and leaves nothing behind that would hurt the next run."""

from __future__ import annotations

import contextvars
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.host import Interrupted, compiling, interruption
from hotpath.host.headless import HeadlessHost
from hotpath.host.interruption import interruptibly, read_ahead
from torch import nn

SOON = 5.0  # seconds; a busy machine is given its time, the calls that are left take ten times as long


def test_a_call_gives_what_it_returns_and_raises(headless_host):
    assert interruptibly(lambda: 3) == 3
    with pytest.raises(TimeoutError, match="its own"):
        interruptibly(lambda: raise_it(TimeoutError("its own")))
    with pytest.raises(KeyboardInterrupt):
        interruptibly(lambda: raise_it(KeyboardInterrupt()))


def raise_it(error: BaseException) -> None:
    raise error


def test_a_call_has_the_context_of_its_caller(headless_host):
    """ComfyUI keeps there which node runs, so that warnings land on it."""
    node: contextvars.ContextVar[str] = contextvars.ContextVar("node", default="none")
    node.set("7")
    assert interruptibly(node.get) == "7"


def test_a_stop_leaves_a_call_that_goes_on(headless_host):
    release = threading.Event()
    ended = threading.Event()
    stopped: list[float] = []

    def library() -> None:
        stopped.append(time.monotonic())
        headless_host.stop()
        release.wait(10 * SOON)
        ended.set()

    with pytest.raises(Interrupted):
        interruptibly(library)
    assert time.monotonic() - stopped[0] < SOON
    assert not ended.is_set()
    release.set()
    assert ended.wait(SOON)
    assert interruptibly(lambda: "next") == "next"


def test_a_stop_from_before_is_heard_before_the_call(headless_host):
    headless_host.stop()
    called: list[int] = []
    with pytest.raises(Interrupted):
        interruptibly(lambda: called.append(1))
    assert called == []


def test_a_file_is_read_in_pieces_that_ask(tmp_path: Path, headless_host, monkeypatch):
    monkeypatch.setattr(interruption, "CHUNK", 1000)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(5500))
    asked: list[int] = []
    headless_host.check_interrupt = lambda: asked.append(1)
    read_ahead(path)
    assert len(asked) == 6
    monkeypatch.setattr(interruption, "WORTH_A_BAR", 5000)
    bars: list[tuple[int, str]] = []
    monkeypatch.setattr(type(headless_host), "progress", lambda _, total, label="": Bar(bars, total, label))
    read_ahead(path)
    assert bars == [(6, "weights.bin"), *[(1, "")] * 6]


class Bar:
    def __init__(self, seen: list[tuple[int, str]], total: int, label: str) -> None:
        self.seen = seen
        seen.append((total, label))

    def update(self, steps: int = 1, preview: Any = None) -> None:
        self.seen.append((steps, ""))

    def close(self) -> None: ...


def test_reading_stops_between_two_pieces(tmp_path: Path, headless_host, monkeypatch):
    monkeypatch.setattr(interruption, "CHUNK", 1000)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(5500))
    headless_host.stop()
    with pytest.raises(Interrupted):
        read_ahead(path)


def test_a_file_that_memory_cannot_hold_is_left_to_its_loader(tmp_path: Path, headless_host, monkeypatch):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(5500))
    headless_host.stop()  # would be heard if it were read
    monkeypatch.setattr(type(headless_host), "free_memory", lambda *_: 10_000)
    read_ahead(path)
    path = tmp_path / "nothing.bin"
    path.touch()
    headless_host.clear_stop()
    read_ahead(path)


def test_layers_of_a_network_ask_on_a_cpu(headless_host):
    large, small = nn.Linear(256, 256), nn.Linear(4, 256)
    network = nn.Sequential(small, large, nn.ReLU(), large)
    managed = headless_host.manage(network)
    headless_host.manage(network)
    asked: list[int] = []
    headless_host.check_interrupt = lambda: asked.append(1)
    with managed.resident() as resident:
        resident(torch.zeros(1, 4))
    assert len(asked) == 2, "the large layer, once for each pass; the small one takes no time"


def test_layers_elsewhere_do_not_ask(tmp_path):
    network = nn.Linear(256, 256)
    HeadlessHost(models=tmp_path, device="meta", show_progress=False).manage(network)
    assert not network._forward_pre_hooks


def test_questions_of_layers_are_in_no_graph(headless_host):
    network = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).requires_grad_(False)
    managed = headless_host.manage(network)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend, fullgraph=True)
    asked: list[int] = []
    headless_host.check_interrupt = lambda: asked.append(1)
    for _ in range(2):
        with managed.resident():
            compiled(torch.zeros(2, 256))
    assert (len(graphs), asked) == (1, [])


def test_a_stop_leaves_a_compilation(headless_host):
    release = threading.Event()
    running: list[int] = []
    most: list[int] = []
    stopped: list[float] = []

    def slow(graph: Any, _: Any) -> Any:
        running.append(1)
        most.append(len(running))
        if not stopped:
            stopped.append(time.monotonic())
            headless_host.stop()
        release.wait(10 * SOON)
        running.pop()
        return graph.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    compiled = torch.compile(double, backend=compiling.interruptible_backend(slow), fullgraph=True)
    x = torch.arange(3.0)
    with pytest.raises(Interrupted):
        compiled(x)
    assert time.monotonic() - stopped[0] < SOON
    threading.Timer(0.3, release.set).start()
    assert torch.equal(compiled(x), 2 * x)  # waits for the one that was left
    assert most == [1, 1], "no two at a time"


def compiled_block(backend: Any) -> Any:
    from hotpath.patches.compilation.graphs import CompiledKind
    from hotpath.patches.compilation.settings import CompileSettings

    kind = CompiledKind("Block", lambda block, x: five_sines(x), CompileSettings(), backend)
    return lambda x: kind(nn.Identity(), (x,), {})


def compiled_colour_network(backend: Any) -> Any:
    from hotpath.colorization.compilation import MaybeCompiled

    return MaybeCompiled(five_sines, True, "network", backend)


def five_sines(x: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        x = torch.sin(x)
    return x


class InterruptProcessingException(Exception):
    """What a stop is in ComfyUI before 0.20, where torch's compiler takes it for a failure of its own."""


@pytest.mark.parametrize("stop", [Interrupted, InterruptProcessingException])
@pytest.mark.parametrize("make", [compiled_block, compiled_colour_network])
def test_a_stop_is_heard_while_a_graph_is_traced(headless_host, monkeypatch, make, stop):
    asked: list[int] = []
    graphs: list[Any] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise stop

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        assert "create_node" not in vars(graph.graph), "a compiler may change the graph as it likes"
        return graph.forward

    monkeypatch.setattr(headless_host, "check_interrupt", check)
    compiled, x = make(backend), torch.rand(4)
    with pytest.raises(stop):
        compiled(x)
    assert len(asked) == 3 and not graphs, "half-way through the five operations"
    assert torch.equal(compiled(x), five_sines(x))
    assert len(graphs) == 1 and sum(node.target is torch.sin for node in graphs[0].graph.nodes) == 5
    count = len(asked)
    assert torch.equal(compiled(x), five_sines(x)) and len(graphs) == 1
    assert len(asked) == count, "compiled code asks nobody"


@pytest.mark.parametrize("make", [compiled_block, compiled_colour_network])
def test_a_stop_of_an_older_comfyui_is_heard_while_a_graph_is_compiled(headless_host, monkeypatch, make):
    begun, stopped = threading.Event(), threading.Event()

    def check() -> None:
        if begun.is_set() and not stopped.is_set():
            stopped.set()
            raise InterruptProcessingException

    def backend(graph: Any, _: Any) -> Any:
        begun.set()
        stopped.wait(10 * SOON)
        return graph.forward

    monkeypatch.setattr(headless_host, "check_interrupt", check)
    compiled, x = make(compiling.interruptible_backend(backend)), torch.rand(4)
    with pytest.raises(InterruptProcessingException):
        compiled(x)
    assert torch.equal(compiled(x), five_sines(x)), "and nothing was taken for a failure"


@pytest.mark.parametrize("make", [compiled_block, compiled_colour_network])
def test_what_is_compiled_waits_for_a_compilation_that_was_left(headless_host, make):
    """torch knows for the whole process that a graph is traced, and takes what is called meanwhile for a part of it."""
    begun, release = threading.Event(), threading.Event()

    def traces(graph: Any, _: Any) -> Any:
        torch.fx._symbolic_trace._is_fx_tracing_flag = True
        begun.set()
        release.wait(10 * SOON)
        torch.fx._symbolic_trace._is_fx_tracing_flag = False
        return graph.forward

    ready, x = make(lambda graph, _: graph.forward), torch.rand(4)
    ready(x)
    threading.Thread(target=lambda: (begun.wait(), headless_host.stop())).start()
    with pytest.raises(Interrupted):
        torch.compile(lambda x: x + 1, backend=compiling.interruptible_backend(traces))(x)
    threading.Timer(0.3, release.set).start()
    assert torch.equal(ready(x), five_sines(x))
    assert release.is_set()


def test_a_compilation_that_was_left_ends_before_its_kernels_are_made(headless_host, monkeypatch):
    begun, release = threading.Event(), threading.Event()
    lowered: list[int] = []

    def compile_fx(graph: Any, inputs: Any, lower: Any, _: Any) -> Any:
        begun.set()
        release.wait(10 * SOON)
        return lower(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", lambda graph, _: (lowered.append(1), graph)[1])
    compiled = torch.compile(lambda x: x + 1, backend=compiling.inductor({"max_autotune": False}))
    threading.Thread(target=lambda: (begun.wait(), headless_host.stop())).start()
    with pytest.raises(Interrupted):
        compiled(torch.zeros(1))
    release.set()
    compiling.until_nothing_compiles()
    assert lowered == []
    assert torch.equal(compiled(torch.zeros(1)), torch.ones(1)) and lowered == [1]


def test_a_compiler_finds_the_settings_of_its_caller(headless_host):
    from torch._guards import TracingContext

    seen: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        context = TracingContext.try_get()
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                context is not None and context.fake_mode is not None,
            )
        )
        return graph.forward

    def compile_in(mode: Any, wrapped: Any) -> None:
        with mode:
            torch.compile(lambda x: x + 1, backend=wrapped)(torch.zeros(1))

    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.autocast("cpu")):
        compile_in(mode, backend)
        compile_in(mode, compiling.interruptible_backend(backend))
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 3 and all(traced for *_, traced in seen)


def test_a_block_that_writes_to_its_input_is_compiled_in_inference_mode(headless_host):
    """As Flux' blocks do. torch turns the mode off while it compiles, and notes that per thread."""
    from torch._dynamo.backends.debugging import aot_eager

    def block(x: torch.Tensor) -> torch.Tensor:
        x += 1
        return 2 * x

    with torch.inference_mode():
        x = torch.zeros(2)
        made = torch.compile(block, backend=compiling.interruptible_backend(aot_eager), fullgraph=True)(x)
    assert (x.tolist(), made.tolist()) == ([1, 1], [2, 2])


def test_errors_of_the_compiler_arrive_as_its_own(headless_host):
    def broken(*_: Any) -> Any:
        raise ValueError("no kernel for this")

    compiled = torch.compile(lambda x: x + 1, backend=compiling.interruptible_backend(broken))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no kernel for this"):
        compiled(torch.zeros(1))


def test_a_graph_with_a_way_back_is_compiled_by_its_caller(headless_host):
    """torch compiles the way back under a lock that the caller's thread holds; another thread would wait for ever."""
    from torch._dynamo.convert_frame import compile_lock

    taken: list[bool] = []

    def backend(graph: Any, _: Any) -> Any:
        taken.append(compile_lock.acquire(timeout=0.5))
        if taken[-1]:
            compile_lock.release()
        return graph.forward

    wrapped = compiling.interruptible_backend(backend)
    x = torch.ones(2, requires_grad=True)
    torch.compile(lambda x: 2 * x, backend=wrapped)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2]
    torch.compile(nn.Linear(2, 2), backend=wrapped)(torch.ones(1, 2))
    assert taken == [True, True]


def test_networks_compiled_with_equal_options_share_their_graphs(headless_host, monkeypatch):
    """Dynamo keeps eight graphs of a function, and none of another backend; the ninth engine would run uncompiled."""
    graphs: list[Any] = []

    def compile_fx(graph: Any, *_: Any, **__: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for _ in range(3):
        torch.compile(double, backend=compiling.inductor({"coordinate_descent_tuning": True}))(torch.zeros(1))
    assert len(graphs) == 1
    torch.compile(double, backend=compiling.inductor())(torch.zeros(1))
    assert len(graphs) == 2


def test_a_backend_may_compile_a_part_by_itself(headless_host):
    inner = compiling.interruptible_backend(lambda graph, _: graph.forward)
    outer = compiling.interruptible_backend(lambda graph, inputs: inner(graph, inputs))
    assert torch.equal(torch.compile(lambda x: x + 1, backend=outer)(torch.zeros(1)), torch.ones(1))
