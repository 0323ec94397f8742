"""Large pages are asked for in processes of our own; what fresh memory costs is told with its cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hotpath import cli
from hotpath.distributed.local_pool import LocalPool
from hotpath.distributed.worker import WorkerSettings
from hotpath.host import fresh_memory
from hotpath.host.fresh_memory import NAME, ProcessorTime, advice, ask, environment, possible


@pytest.fixture(autouse=True)
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system that gives huge pages to who asks, and a process that has not asked."""
    state = tmp_path / "enabled"
    state.write_text("always [madvise] never\n", encoding="ascii")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(fresh_memory, "STATE", state)
    monkeypatch.delenv(NAME, raising=False)
    return state


def test_they_are_asked_for_where_the_system_has_them(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment() == {NAME: "1"}
    ask()
    assert os.environ.pop(NAME) == "1"
    monkeypatch.setenv(NAME, "0")
    ask()
    assert os.environ[NAME] == "0" and environment() == {}, "who has chosen keeps what he chose"
    monkeypatch.delenv(NAME)
    linux.write_text("always madvise [never]\n", encoding="ascii")
    assert not possible() and environment() == {}
    linux.unlink()
    assert not possible()
    linux.write_text("[always] madvise never\n", encoding="ascii")
    monkeypatch.setattr(sys, "platform", "win32")
    assert not possible()


def test_only_a_process_of_our_own_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(cli, "import_module", lambda *_: (seen.append(os.environ.get(NAME)), Nothing)[1])
    monkeypatch.setattr(sys, "argv", ["hotpath", "doctor"])
    assert cli.main(["doctor"]) == cli.main() == 0
    assert seen == [None, "1"]
    monkeypatch.delenv(NAME)


class Times(NamedTuple):
    user: float
    system: float


class Nothing:
    @staticmethod
    def run(options: Any) -> int:
        return 0


def test_workers_are_started_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, str]] = []

    def refuse(*_: Any, env: dict[str, str], **__: Any) -> Any:
        given.append(env)
        raise FileNotFoundError("not started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for there, wanted in ((None, "1"), ("0", "0")):
        if there is not None:
            monkeypatch.setenv(NAME, there)
        with pytest.raises(FileNotFoundError):
            LocalPool(WorkerSettings(str(tmp_path)), [None]).start()
        assert given[-1][NAME] == wanted


def test_advice_is_given_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    said = advice(6.0, 2.0)
    assert said.startswith("25 % of the processor's time") and "LD_PRELOAD=libtcmalloc_minimal.so.4" in said
    assert advice(9.9, 0.1) == advice(0.0, 0.0) == advice(1.0, 1.0) == ""
    times = iter([(1.0, 1.0), (9.0, 4.0), (9.0, 4.0)])
    monkeypatch.setattr(os, "times", lambda: Times(*next(times)))
    on_cpu, on_card = (ProcessorTime(torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_cpu.spent() == (8.0, 3.0) and on_card.spent() == (0.0, 0.0)
    assert on_cpu.advice().startswith("27 %") and on_card.advice() == ""
    times = iter([(1.0, 1.0), (9.0, 4.0)])
    meanwhile = ProcessorTime(torch.device("cpu"))
    monkeypatch.setattr(fresh_memory, "_graphs", lambda: meanwhile._graphs + 1)
    assert meanwhile.spent() == (0.0, 0.0)
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4")
    assert advice(6.0, 2.0) == ""
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert advice(6.0, 2.0) == ""


@pytest.mark.long
def test_torch_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of torch's that no longer heeds the name would be silent."""
    monkeypatch.undo()
    if not possible():
        pytest.skip("this system gives no huge pages")
    count = (
        "import resource, torch; f = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; "
        "torch.zeros(8); before = f(); [torch.ones(1 << 25) for _ in range(4)]; print(f() - before)"
    )
    base = {name: value for name, value in os.environ.items() if name != NAME}
    found = [
        int(subprocess.run([sys.executable, "-c", count], env=base | more, capture_output=True, check=True).stdout)
        for more in ({}, {NAME: "1"})
    ]
    if "[always]" not in fresh_memory.STATE.read_text(encoding="ascii"):
        assert found[1] < found[0] / 10
