"""What runs beside what: copies, decoding and encoding, and a per-frame loop that never waits for the device."""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from film_files import frames
from hotpath.attention import local_window
from hotpath.colorization import clip_job, compatible, file_job, film
from hotpath.colorization.colormnet import engine
from hotpath.colorization.colormnet.network import ColorMNet
from hotpath.colorization.colormnet.session import ColorMNetSession
from hotpath.colorization.colormnet.settings import ColorMNetSettings
from hotpath.colorization.cuda_graph import GraphedStep
from hotpath.colorization.film_options import METHODS, FilmOptions, read_references
from hotpath.colorization.transfers import DirectCopies, copies_for
from tiny_colorizers import TINY
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("colour_host")


# Copies


class LateCopies:
    """A device whose copies happen as late as they may: when somebody waits for them. Until then the memory they write to
    holds nonsense, so whoever does not wait is found out. Counts what is under way."""

    made: list[LateCopies] = []
    from_any_thread = True

    def __init__(self, device: torch.device) -> None:
        self.inward: deque[Callable[[], object]] = deque()
        self.outward: deque[Callable[[], object]] = deque()
        self.most = 0
        self.lock = threading.Lock()
        self.threads: set[str] = set()
        LateCopies.made.append(self)

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), 77, dtype=dtype)

    def _queue(self, queue: deque[Callable[[], object]], copy: Callable[[], object]) -> Callable[[], object]:
        with self.lock:
            queue.append(copy)
            self.most = max(self.most, len(self.inward))
            self.threads.add(threading.current_thread().name.split("_")[0])
        return copy

    def _run_to(self, queue: deque[Callable[[], object]], last: Callable[[], object]) -> None:
        with self.lock, torch.inference_mode():
            while last in queue:
                queue.popleft()()

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        tensor = torch.full_like(host, 33)
        return tensor, self._queue(self.inward, functools.partial(tensor.copy_, host))

    def arrived(self, tensor: Tensor, mark: Any) -> Tensor:
        self._run_to(self.inward, mark)
        return tensor

    def to_host(self, host: Tensor, tensor: Tensor) -> Any:
        return self._queue(self.outward, functools.partial(host.copy_, tensor))

    def mark(self) -> Any:
        return self._queue(self.outward, lambda: None)

    def host_waits(self, mark: Any) -> None:
        self._run_to(self.outward, mark)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateCopies]:
    monkeypatch.setattr(film, "copies_for", LateCopies)
    monkeypatch.setattr(compatible, "copies_for", LateCopies)
    LateCopies.made = []
    return LateCopies.made


def clip(method: str, **options: Any) -> Any:
    chosen = FilmOptions(method=method, colour_size=32, **options)
    references = read_references([*frames(1, seed=3)])
    return clip_job.colorize_clip(clip_job.load_method(chosen), frames(50), references, chosen)


@pytest.mark.parametrize("method", METHODS)
def test_nobody_reads_what_is_still_under_way(method: str, late: list[LateCopies]) -> None:
    done = clip(method)
    assert late
    late_state = done.state.tensors
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(film, "copies_for", copies_for)
        expected = clip(method)
    # Where memory lies differs, and so does the last bit; what was read too early would be 33 or 77.
    torch.testing.assert_close(done.pictures, expected.pictures, atol=0.02, rtol=0)
    torch.testing.assert_close(done.confidence, expected.confidence, atol=0.02, rtol=0)
    for name, tensor in expected.state.tensors.items():
        torch.testing.assert_close(late_state[name], tensor, atol=0.5, rtol=0)
    assert late[0].most <= 1, "a clip has one portion on its way to the device"


def test_compatible_jobs_wait_too(late: list[LateCopies]) -> None:
    from hotpath.colorization.networks import load_colormnet, load_deep_exemplar

    def both() -> tuple[Tensor, Tensor]:
        job = compatible.ColorMNetJob(40, 54)
        one, _ = compatible.run_colormnet(load_colormnet(), frames(40), frames(1, seed=3), job)
        other, _ = compatible.run_deep_exemplar(
            load_deep_exemplar(), frames(40), frames(1, seed=3), compatible.DeepExemplarJob(40, 54)
        )
        return one, other

    found = both()
    assert len(late) == 2
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(compatible, "copies_for", copies_for)
        expected = both()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0)


@pytest.mark.long
def test_a_file_is_decoded_and_encoded_beside_the_computing(
    tmp_path: Path, late: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads, bounded: decoding runs at most AHEAD portions before the computing, encoding AHEAD behind."""
    import av

    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 40, 54, "yuv420p"
        for picture in (frames(170) * 255).to(torch.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    decoded, coloured, encoded = [0], [0], [0]
    lead: list[int] = []
    prepare, colour, write = film.FilmSession.prepare, film.FilmSession.colour, file_job.PartRecorder.write

    def preparing(self: Any, pictures: Tensor) -> Any:
        decoded[0] += 1
        return prepare(self, pictures)

    def colouring(self: Any, *parts: Any) -> Any:
        time.sleep(0.05)  # the others have the time to run away, if nothing held them
        coloured[0] += 1
        lead.append(decoded[0] - coloured[0])
        return colour(self, *parts)

    def writing(self: Any, *parts: Any) -> Any:
        result = write(self, *parts)
        encoded[0] += 1
        return result

    monkeypatch.setattr(film.FilmSession, "prepare", preparing)
    monkeypatch.setattr(film.FilmSession, "colour", colouring)
    monkeypatch.setattr(file_job.PartRecorder, "write", writing)
    job = file_job.FileJob(tmp_path / "in.mp4", tmp_path / "out.mp4", FilmOptions(colour_size=32), quality=4)
    file_job.colorize_file(job, read_references([*frames(1)]))
    assert decoded[0] == coloured[0] == encoded[0] == 9
    assert 1 <= max(lead) <= file_job.AHEAD
    assert late[0].most <= file_job.AHEAD + 1
    assert {"decode", "MainThread"} <= late[0].threads
    # Encoding that is slower than all else holds the computing back.
    behind: list[int] = []

    def slowly(self: Any, *parts: Any) -> Any:
        behind.append(coloured[0] - encoded[0])
        time.sleep(0.1)
        return writing(self, *parts)

    decoded[0] = coloured[0] = encoded[0] = 0
    monkeypatch.setattr(file_job.PartRecorder, "write", slowly)
    monkeypatch.setattr(
        film.FilmSession, "colour", lambda self, *p: (coloured.__setitem__(0, coloured[0] + 1), colour(self, *p))[1]
    )
    file_job.colorize_file(job, read_references([*frames(1)]))
    assert 1 <= max(behind) <= file_job.AHEAD + 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((432, 768), 20), ((1080, 1920), 20), ((2160, 3840), 20), ((4320, 7680), 5), ((20000, 20000), 1)],
)
def test_portions_are_bounded_in_bytes(size: tuple[int, int], expected: int) -> None:
    assert clip_job.portion_frames(*size, 1) == expected


# Waiting


class Waits(TorchDispatchMode):
    """Notes every copy between devices outside of `transfers`, by the line of ours that made it. What else would wait,
    a number or a shape read off a tensor, raises by itself: these tensors have no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, out))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
        if "copy" in str(func) and len(devices) > 1:
            ours = [
                f for f in traceback.extract_stack() if "/colorization/" in f.filename or "/attention/" in f.filename
            ]
            if not ours or not ours[-1].filename.endswith("transfers.py"):
                self.found.append(f"{func}: {ours[-1].filename}:{ours[-1].lineno}" if ours else str(func))
        return out


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Tensors with shapes and a device, cuda, but without numbers. Kernels that exist only there are left out."""
    from hotpath.attention.best_match import MeasuredMatch, best_match
    from hotpath.colorization import stage_times
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(local_window, "triton_unavailable", lambda device: "left out")
    monkeypatch.setattr(engine, "attend", lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v))
    monkeypatch.setattr(MeasuredMatch, "__call__", lambda self, theta, phi: best_match(theta, phi))
    monkeypatch.setattr(film, "copies_for", DirectCopies)
    monkeypatch.setattr(film, "activations", lambda *_: (8, 0))
    monkeypatch.setattr(stage_times.StageTimes, "__init__", _without_events)
    original = GraphedStep.__init__

    def plain(self: GraphedStep, function: Any, device: torch.device, **_: Any) -> None:
        original(self, function, CPU)

    monkeypatch.setattr(GraphedStep, "__init__", plain)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield torch.device("cuda")


def _without_events(self: Any, device: torch.device) -> None:
    self._events, self._device, self._seconds, self._pending, self._lock = False, CPU, {}, [], threading.Lock()


def test_the_test_finds_what_waits(pretended_gpu: torch.device) -> None:
    on_gpu = torch.ones(3, device=pretended_gpu)
    with Waits() as waits:
        torch.tensor([1.0, 2.0, 3.0]).to(pretended_gpu)
        on_gpu.cpu()
    assert len(waits.found) == 2
    for reading in (lambda: on_gpu.sum().item(), lambda: bool(on_gpu.max() > 0), lambda: on_gpu[on_gpu > 0].sum()):
        with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero"):
            reading()


@pytest.mark.long
def test_memory_waits_only_when_long_term_memory_is_full(pretended_gpu: torch.device) -> None:
    """Which of the least used elements tie is a number only the device knows: once in a compression, and no sooner."""
    with pretended_gpu:
        network = ColorMNet(TINY).eval()
    luminance = torch.rand(5, 1, 112, 112, device=pretended_gpu) * 100
    reference = torch.rand(3, 112, 112)

    def film_of(long_term: int) -> ColorMNetSession:
        return ColorMNetSession(network, ColorMNetSettings(1, 3, 2, 8, long_term, 10), 112, 112, [reference])

    roomy = film_of(1000)
    roomy.colorize(luminance)
    assert roomy.memory.long > 16
    full = film_of(16)
    with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero"):
        full.colorize(luminance)
    assert full.memory.long == 16


@pytest.mark.parametrize("method", METHODS)
def test_what_is_compiled_is_kept_with_the_network(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second film compiles nothing anew, and what it says of its attention is about itself."""
    compiled: list[Any] = []

    def compile(function: Any, **_: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    options = FilmOptions(method=method, colour_size=32, compile=True)
    loaded = clip_job.load_method(options)
    references = read_references([*frames(1, seed=3)])
    reports = [clip_job.colorize_clip(loaded, frames(6), references, options).report for _ in range(2)]
    assert len(compiled) == 2
    first, second = ([line for line in r.splitlines() if line.startswith(("DINOv2", "torch.compile"))] for r in reports)
    assert first == second and "compiled" in first[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_card_nothing_waits_and_the_colours_are_the_same(
    method: str, colorizer_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotpath import host
    from hotpath.attention.best_match import MeasuredMatch, best_match
    from hotpath.host.headless import HeadlessHost

    # Measuring which search is faster waits, once per size.
    monkeypatch.setattr(MeasuredMatch, "__call__", lambda self, theta, phi: best_match(theta, phi))
    options = FilmOptions(method=method, colour_size=112, edge_filter="guided")
    references = read_references([*frames(1, 112, 128, seed=3)])
    pictures = frames(42, 112, 128)
    expected = clip_job.colorize_clip(clip_job.load_method(options), pictures, references, options).pictures
    before = host.use(HeadlessHost(models=colorizer_files, device="cuda", show_progress=False))
    try:
        loaded = clip_job.load_method(options, precision="float32")
        done = clip_job.colorize_clip(loaded, pictures, references, options)
        assert "captured, equal to the plain run" in done.report
        # Deep Exemplar's near ties may be settled otherwise there.
        assert ((done.pictures - expected).abs() < 0.02).float().mean() > 0.99
        with loaded.resident() as network:
            session = film.FilmSession(network, loaded, options, references, 112, 128)
            eight_bits = (pictures * 255).to(torch.uint8)
            session.colorize(eight_bits[:21])
            prepared = session.prepare(eight_bits[21:])
            torch.cuda.set_sync_debug_mode("error")
            try:
                queued = session.colour(prepared, prepared.segments[0])
                session.snapshot()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert queued.wait().pictures.shape == (21, 112, 128, 3)
    finally:
        host.use(before)
