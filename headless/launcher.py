"""Starts a ComfyUI that was found on this machine for as long as a run needs it, and always stops it afterwards.

It listens on a free port of the loopback address only. Its user, temporary and log files go into a folder of its own
that is removed at the end, so that nothing of a ComfyUI in daily use is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..host import fresh_memory, tied_processes
from ..host.headless import best_device
from ..host.held import held
from ..host.whole_files import refusal_told
from .locate import PACK, carries_pack, python_for
from .orphans import AT_WORK, STARTED_BY, STARTED_IN, WORK, sweep

PACK_FOLDER = "comfyui-hotpath"
LOG_TAIL = 25  # lines shown when it does not start
STOP_SECONDS = 10.0
POLL_SECONDS = 0.25
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal


class LaunchError(RuntimeError):
    """ComfyUI did not start; the message holds the end of its log."""


@dataclass(frozen=True)
class LaunchOptions:
    """How to start it.

    isolated: leave out the custom nodes, models and files of that ComfyUI, and use only what is given here.
    models: a folder with one sub-folder per kind of model, searched first.
    custom_nodes: more custom nodes beside this pack, as folders or .py files. brings_pack: it has this pack among its own,
    also where that is not seen from its folder. unwanted: asked while it starts; True ends it.
    """

    input_folder: Path | None = None
    output_folder: Path | None = None
    models: Path | None = None
    custom_nodes: Sequence[Path] = ()
    isolated: bool = False
    brings_pack: bool = False
    timeout: float = 300.0
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    unwanted: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class RunningServer:
    """A ComfyUI that answers at `url`; `log` is what it prints."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    output_folder: Path
    temp_folder: Path

    def log_tail(self) -> str:
        return _tail(self.log, LOG_TAIL)

    def kill(self) -> None:
        """End it and what it has started, at once."""
        _kill(self.process, getattr(signal, "SIGKILL", signal.SIGTERM))


@contextlib.contextmanager
def launched(comfyui: Path, options: LaunchOptions | None = None) -> Iterator[RunningServer]:
    """Start `comfyui`, wait until it answers, yield it, stop it. Raises LaunchError when it does not start."""
    options = options or LaunchOptions()
    python, missing = python_for(comfyui)
    if missing is not None:
        raise LaunchError(
            f"The ComfyUI in {comfyui} cannot be started with {python}: {missing} are missing. Install its "
            f"requirements (pip install -r {comfyui / 'requirements.txt'}) or name its Python in COMFYUI_PYTHON."
        )
    sweep()
    work = Path(tempfile.mkdtemp(prefix=WORK))
    process: subprocess.Popen[bytes] | None = None
    try:
        with ended_by_signal() as waiting, held(work / AT_WORK) as mark:
            port = free_port()
            output = options.output_folder or work / "output"
            log = work / "comfyui.log"
            with refusal_told(log):
                arguments = _arguments(comfyui, options, work, port, output, python)
            command = [str(python), str(comfyui / "main.py"), *arguments]
            started_by = {STARTED_BY: str(os.getpid()), STARTED_IN: str(work)}
            # Into a file Windows writes a letter that its code page lacks as an error in whichever node printed it.
            printed = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
            inherited = {**fresh_memory.environment(), **os.environ}
            environment = {**inherited, **printed, **started_by, **options.environment}
            # Else a process that has begun would be nobody's.
            with log.open("wb") as sink, waiting():
                process = subprocess.Popen(
                    command,
                    cwd=comfyui,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C is for us: we tell it to stop in its own way.
                    start_new_session=os.name != "nt",
                    # It holds the folder, too: should we be killed, it is in use until it has ended.
                    pass_fds=() if os.name == "nt" or mark is None else (mark,),
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
                tied_processes.tie(process)
            server = RunningServer(f"http://127.0.0.1:{port}", process, log, output, work / "temp" / "temp")
            _wait_until_ready(server, options)
            yield server
    finally:
        if process is not None:
            _stop(process)
        shutil.rmtree(work, ignore_errors=True)


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments(comfyui: Path, options: LaunchOptions, work: Path, port: int, output: Path, python: Path) -> list[str]:
    for name in ("user", "temp", "input", "custom_nodes"):
        (work / name).mkdir()
    output.mkdir(parents=True, exist_ok=True)
    arguments = [
        *("--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"),
        *("--output-directory", str(output), "--temp-directory", str(work / "temp")),
        *("--user-directory", str(work / "user"), "--database-url", f"sqlite:///{(work / 'comfyui.db').as_posix()}"),
        *(
            "--input-directory",
            str(options.input_folder or (work / "input" if options.isolated else comfyui / "input")),
        ),
    ]
    if options.isolated:
        base = work / "base"
        (base / "custom_nodes").mkdir(parents=True)
        (base / "models").mkdir()
        arguments += ["--base-directory", str(base), "--disable-api-nodes"]
    if options.isolated or not (options.brings_pack or carries_pack(comfyui)):
        link(PACK, work / "custom_nodes" / PACK_FOLDER)
    for extra in options.custom_nodes:
        link(extra.resolve(), work / "custom_nodes" / extra.name)
    paths = work / "paths.yaml"
    paths.write_text(yaml.safe_dump(_search_paths(work / "custom_nodes", options.models)), encoding="utf-8")
    arguments += ["--extra-model-paths-config", str(paths)]
    if "--cpu" not in options.arguments and not _has_accelerator(python):
        arguments.append("--cpu")
    return [*arguments, *options.arguments]


def _search_paths(custom_nodes: Path, models: Path | None) -> dict[str, Any]:
    config: dict[str, Any] = {"hotpath_nodes": {"custom_nodes": str(custom_nodes)}}
    if models is not None and models.is_dir():
        kinds = {kind.name: kind.name for kind in sorted(models.iterdir()) if kind.is_dir()}
        if kinds:
            config["hotpath_models"] = {"base_path": str(models.resolve()), "is_default": True, **kinds}
    return config


def link(source: Path, target: Path) -> None:
    """Make `target` stand for the custom node `source`: a symbolic link, or a small package where those need rights."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_file():
            shutil.copyfile(source, target)
            return
        target.mkdir()
        root = json.dumps(str(source))
        (target / "__init__.py").write_text(
            "import importlib.util, sys\n"
            f"root = {root}\n"
            "spec = importlib.util.spec_from_file_location(__name__ + '.pack', root + '/__init__.py',\n"
            "                                              submodule_search_locations=[root])\n"
            "pack = importlib.util.module_from_spec(spec)\n"
            "sys.modules[spec.name] = pack\n"
            "spec.loader.exec_module(pack)\n"
            "NODE_CLASS_MAPPINGS = pack.NODE_CLASS_MAPPINGS\n"
            "NODE_DISPLAY_NAME_MAPPINGS = pack.NODE_DISPLAY_NAME_MAPPINGS\n",
            encoding="utf-8",
        )


def _has_accelerator(python: Path) -> bool:
    if python == Path(sys.executable):
        return best_device().type != "cpu"
    # Another Python has another torch, so it is asked.
    question = (
        "import torch; x = getattr(torch, 'xpu', None); "
        "print(torch.cuda.is_available() or torch.backends.mps.is_available() or bool(x and x.is_available()))"
    )
    answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=False)
    return answer.stdout.strip() != "False"


def _wait_until_ready(server: RunningServer, options: LaunchOptions) -> None:
    # A proxy, which the environment may name for all of HTTP, does not know this machine's own ports.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + options.timeout
    while time.monotonic() < deadline:
        if options.unwanted():
            raise LaunchError("ComfyUI was stopped while it started.")
        if server.process.poll() is not None:
            raise LaunchError(
                f"ComfyUI ended with code {server.process.returncode} while it started. The end of its log:\n"
                f"{server.log_tail()}"
            )
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            opener.open(f"{server.url}/system_stats", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(POLL_SECONDS)
    raise LaunchError(
        f"ComfyUI did not answer within {options.timeout:.0f} s. The end of its log:\n{server.log_tail()}"
    )


def _tail(path: Path, lines: int) -> str:
    text = COLOURS.sub("", path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (it is empty)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and everything it started."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        _kill(process, number)
        try:
            process.wait(STOP_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
        except BaseException:  # a second Ctrl-C while it takes its time
            _kill(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            raise


def _kill(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "nt":
            tied_processes.end(process)
        else:
            os.killpg(process.pid, number)


@contextlib.contextmanager
def ended_by_signal() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Turn SIGTERM and SIGHUP into SystemExit while inside, so that `finally` runs and nothing is left behind. What it gives
    is for what must not be broken off: the signal waits for its end."""
    if threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    waits, came = False, list[int]()

    def on_signal(number: int, frame: Any) -> None:
        if not waits:
            raise SystemExit(128 + number)
        came.append(number)

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        nonlocal waits
        waits = True
        try:
            yield
        finally:
            waits = False
        if came:
            raise SystemExit(128 + came[0])

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
