"""On Windows processes end with the one that started them; its kernel is played by objects that note what they are asked."""

from __future__ import annotations

import ctypes
import gc
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotpath.distributed import local_pool
from hotpath.distributed.worker import WorkerSettings
from hotpath.headless import launcher
from hotpath.host import tied_processes

JOB, PROCESS = 1 << 40, 1 << 41  # handles may be wider than an int


class Function:
    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __call__(self, *given: Any) -> int:
        # As C would take them: what no declared type takes is an error.
        for kind, value in zip(self.argtypes, given, strict=True):  # type: ignore[attr-defined]
            if kind is not ctypes.c_void_p or not hasattr(value, "_obj"):
                kind(value)
        self.kernel.asked.append((self.name, *given))
        return self.kernel.answers.get(self.name, 1)


class Kernel:
    def __init__(self, **answers: int) -> None:
        self.answers = {"CreateJobObjectW": JOB, "OpenProcess": PROCESS, **answers}
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Function:
        function = Function(self, name)
        setattr(self, name, function)
        return function

    def names(self) -> list[str]:
        return [name for name, *_ in self.asked]


class Process:
    pid, killed = 4711, 0

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch):
    def use(kernel: Kernel) -> Kernel:
        def library(name: str) -> Kernel:
            assert name == "kernel32"
            return kernel

        monkeypatch.setattr(tied_processes.ctypes, "CDLL", library)
        for module in (tied_processes, launcher, local_pool):
            monkeypatch.setattr(module, "os", SimpleNamespace(name="nt"))
        return kernel

    return use


def test_a_process_ends_with_the_job_that_it_is_in(on_windows) -> None:
    kernel, process = on_windows(Kernel()), Process()
    tied_processes.tie(process)
    (_, job, kind, limits, size), opened, assigned, closed = kernel.asked[1:]
    assert (job, kind, size) == (JOB, 9, 144), "as the system's header lays it out in 64 bits"
    assert bytes(limits._obj)[16:20] == (0x2000).to_bytes(4, "little") and bytes(limits._obj).count(0) == 143
    assert opened == ("OpenProcess", 0x0101, False, 4711)
    assert assigned == ("AssignProcessToJobObject", JOB, PROCESS) and closed == ("CloseHandle", PROCESS)
    for end in (launcher._kill, lambda process, _: local_pool._kill(process)):
        end(process, 9)
        assert kernel.asked[-1] == ("TerminateJobObject", JOB, 1) and not process.killed
    del process, end
    gc.collect()
    assert kernel.asked[-1] == ("CloseHandle", JOB)


@pytest.mark.parametrize(
    "refuses", ["CreateJobObjectW", "SetInformationJobObject", "OpenProcess", "AssignProcessToJobObject"]
)
def test_a_process_without_a_job_starts_and_is_killed_alone(refuses: str, on_windows) -> None:
    kernel, process = on_windows(Kernel(**{refuses: 0})), Process()
    tied_processes.tie(process)
    assert kernel.names().count("CloseHandle") == (refuses == "AssignProcessToJobObject")
    local_pool._kill(process)
    assert process.killed == 1 and "TerminateJobObject" not in kernel.names()


def test_a_job_that_does_not_end_leaves_its_process_to_be_killed(on_windows) -> None:
    on_windows(Kernel(TerminateJobObject=0))
    tied_processes.tie(process := Process())
    tied_processes.end(process)
    assert process.killed == 1


def test_what_a_run_starts_is_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied: list[object] = []

    class Started(Process):
        stdin, stdout, returncode = io.BytesIO(), io.BytesIO(), 1

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def wait(self, timeout: float | None = None) -> int:
            return 1

        poll = wait

    monkeypatch.setattr(tied_processes, "tie", tied.append)
    monkeypatch.setattr(launcher, "python_for", lambda comfyui: (Path("python"), None))
    monkeypatch.setattr(launcher, "_has_accelerator", lambda python: False)
    for module in (launcher, local_pool):
        monkeypatch.setattr(module, "_kill", lambda *_: None)
        monkeypatch.setattr(module.subprocess, "Popen", Started)
    with pytest.raises(launcher.LaunchError), launcher.launched(tmp_path):
        pass
    pool = local_pool.LocalPool(WorkerSettings(str(tmp_path)), [None])
    pool._start(0)
    pool.close()
    assert len(tied) == 2


def test_other_systems_are_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied_processes.ctypes, "CDLL", lambda name: pytest.fail(f"asked for {name}"))
    tied_processes.tie(Process())
