"""A ComfyUI that is started for a run: it shows its log, and never outlives who started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotpath.headless import launcher
from hotpath.headless.launcher import LaunchError, LaunchOptions, free_port, launched, link
from stand_in_comfyui import COPY

ROOT = Path(__file__).resolve().parents[2]


def fake_comfyui(folder: Path, source: str) -> Path:
    (folder / "comfy_api").mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    (folder / "main.py").write_text(source)
    return folder


def test_a_comfyui_that_does_not_start_shows_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    comfyui = fake_comfyui(tmp_path / "c", "print('no module named chaos'); raise SystemExit(3)")
    with pytest.raises(LaunchError, match=r"(?s)ended with code 3.*no module named chaos"), launched(comfyui):
        pass


SLEEPS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); time.sleep(300)"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_proxy_for_all_of_http_is_not_asked_about_this_machine(monkeypatch):
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.01)
    web = HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=web.handle_request, daemon=True).start()
    process = SimpleNamespace(poll=lambda: None, returncode=None)
    launcher._wait_until_ready(
        launcher.RunningServer(f"http://127.0.0.1:{web.server_port}", process, Path("none"), Path(), Path()),
        LaunchOptions(timeout=1.0),
    )
    web.server_close()


def test_a_comfyui_that_hangs_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    comfyui = fake_comfyui(tmp_path / "c", SLEEPS)
    with pytest.raises(LaunchError, match="did not answer within 1 s"), launched(comfyui, LaunchOptions(timeout=1)):
        pass
    assert not processes_with(str(comfyui))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_run_that_is_ended_takes_its_comfyui_with_it(tmp_path):
    comfyui = fake_comfyui(tmp_path / "c", SLEEPS)
    (tmp_path / "wf.json").write_text(json.dumps(COPY))
    process = subprocess.Popen(
        [sys.executable, str(ROOT), "run", str(tmp_path / "wf.json"), "--comfyui", str(comfyui)],
        env={**os.environ, "COMFYUI_PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any("main.py" in line for line in processes_with(str(comfyui))) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not processes_with(str(comfyui))
    assert not list(tmp_path.glob("hotpath-comfyui-*"))


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_a_signal_waits_until_a_process_that_begins_is_known():
    done = []
    with pytest.raises(SystemExit) as ended, launcher.ended_by_signal() as waiting, waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("begun")
    assert ended.value.code == 128 + signal.SIGTERM and done == ["begun"]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_a_second_ctrl_c_leaves_no_comfyui_behind(monkeypatch):
    """One that takes its time to end is killed then."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline()

    def pressed(timeout: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(process, "wait", pressed)
        launcher._stop(process)
    assert process.wait(10) == -signal.SIGKILL


STARTER = """
import os, subprocess, sys, time
child = '''
import signal, time
from hotpath.headless.orphans import end_with_starter
signal.signal(signal.SIGTERM, signal.SIG_IGN)
assert end_with_starter(every=0.05, grace=0.2)
print("watches", flush=True)
time.sleep(300)
'''
environment = {**os.environ, "HOTPATH_STARTED_BY": str(os.getpid()), "HOTPATH_STARTED_IN": sys.argv[1]}
if len(sys.argv) > 2:  # it is gone before its child has come so far
    child = "import sys; sys.stdin.read(); sys.stdout = sys.stderr" + child
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
started = subprocess.Popen([sys.executable, "-c", child, sys.argv[1] + "/user"], env=environment, start_new_session=True, **pipes)
print(started.pid, started.stdout.readline() if len(sys.argv) == 2 else b"", flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(os.name != "posix", reason="a process is told of its parent's end on POSIX only")
@pytest.mark.parametrize("early", [(), ("early",)])
def test_a_comfyui_ends_with_who_started_it_however_that_ended(monkeypatch, tmp_path, early):
    import psutil
    from hotpath.headless.orphans import STARTED_BY, STARTED_IN, end_with_starter

    folder = tmp_path / "work"
    folder.mkdir()
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(folder), *early], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    number, said = starter.stdout.readline().split()
    assert early or "watches" in said
    child = psutil.Process(int(number))
    starter.kill()
    starter.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(10)
    assert not folder.exists()
    # What such a ComfyUI starts has the variables, too.
    for variable, value in ((STARTED_BY, "1"), (STARTED_IN, str(folder))):
        monkeypatch.setenv(variable, value)
        assert not end_with_starter()


@pytest.mark.skipif(os.name != "posix", reason="times and locks as POSIX has them")
def test_what_runs_left_that_were_killed_with_their_comfyui_goes(tmp_path, monkeypatch):
    from hotpath.headless import orphans
    from hotpath.host.held import held

    monkeypatch.setattr(orphans.tempfile, "gettempdir", lambda: str(tmp_path))
    marks = [tmp_path / f"{orphans.WORK}{name}" / orphans.AT_WORK for name in ("old", "young", "at work")]
    with held(marks[2]):
        for mark in marks:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
            (mark.parent / "comfyui.log").write_text("log")
            if "young" not in mark.parent.name:
                os.utime(mark, (1, 1))
        orphans.sweep()
    assert [mark.parent.exists() for mark in marks] == [False, True, True]


def processes_with(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


def test_links_where_they_are_not_allowed(tmp_path, monkeypatch):
    pack = tmp_path / "a pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {'A': 1}\nNODE_DISPLAY_NAME_MAPPINGS = {}\n")

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refused)
    link(pack, tmp_path / "linked")
    done = subprocess.run(
        [sys.executable, "-c", "import linked; print(linked.NODE_CLASS_MAPPINGS)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "{'A': 1}", done.stderr
