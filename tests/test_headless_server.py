"""The client for a ComfyUI that runs: against a stand-in that misbehaves on request, and against a real one."""

from __future__ import annotations

import asyncio
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
from hotpath.headless import launcher, server
from hotpath.headless.graph import Graph
from hotpath.headless.launcher import LaunchError, LaunchOptions, free_port, launched, link
from hotpath.headless.server import ServerRun, ServerStopped, run_on_server, server_url
from hotpath.headless.server_answers import ServerError, ServerRefused, failure, refusal
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
}


class StandIn:
    """As much of a ComfyUI server as a run needs. `behaviour` changes what it answers."""

    def __init__(self) -> None:
        self.behaviour: dict[str, Any] = {}
        self.posted: list[tuple[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.history: dict[str, Any] = {}
        self.queue: list[Any] = []
        self.asked: list[str] = []
        self.socket: Any = None
        self.interrupted = asyncio.Event()
        self.ready = threading.Event()
        self.url = ""

    def serve(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        from aiohttp import web

        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/ws", self.websocket)
        app.router.add_post("/prompt", self.prompt)
        app.router.add_get("/history/{id}", self.get_history)
        app.router.add_get("/view", self.view)
        app.router.add_get("/object_info/{name}", self.object_info)
        app.router.add_post("/upload/image", self.upload)
        app.router.add_get("/queue", self.get_queue)
        app.router.add_get("/api/jobs/{id}", self.get_job)
        for name in ("interrupt", "queue"):
            app.router.add_post(f"/{name}", self.control)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.ready.set()
        await self.stop.wait()
        await runner.cleanup()

    async def websocket(self, request: Any) -> Any:
        from aiohttp import web

        self.socket = socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.asked.append(f"socket {request.query['clientId']}")
        if self.behaviour.get("lose") == "for a moment" and len(self.asked) > 1:
            self.task = asyncio.ensure_future(self.go_on())
        async for _ in socket:
            pass
        return socket

    async def go_on(self) -> None:
        """What a client hears that came back."""
        await asyncio.sleep(0.2)
        await self.send("progress", node="2", value=3, max=4)
        self.keep()
        await self.send("executing", node=None)

    def keep(self) -> None:
        records = self.behaviour.get("records", [{"filename": "b.png", "subfolder": "", "type": "output"}])
        self.history["p"] = {"outputs": {"2": {"images": records, "text": ["hello"]}}, "status": {"messages": []}}
        self.queue = []

    async def send(self, kind: str, **data: Any) -> None:
        await self.socket.send_str(json.dumps({"type": kind, "data": {"prompt_id": "p", **data}}))

    async def prompt(self, request: Any) -> Any:
        from aiohttp import web

        body = await request.json()
        self.posted.append(("prompt", body))
        if refused := self.behaviour.pop("refuse once", None) or self.behaviour.get("refuse"):
            return web.json_response(refused, status=400)
        self.task = asyncio.ensure_future(self.run())
        return web.json_response({"prompt_id": "p", "number": 0, "node_errors": self.behaviour.get("node_errors", {})})

    async def run(self) -> None:
        self.queue = [[0, "p", {}, {}, []]]
        if self.behaviour.get("waits behind others"):
            await asyncio.sleep(0.2)
            if self.behaviour["waits behind others"] == "and is taken out":
                self.queue = []
            return
        await self.send("execution_cached", nodes=["1"])
        await self.send("executing", node="2")
        await self.send("progress", node="2", value=1, max=4)
        await self.socket.send_bytes((3).to_bytes(4, "big") + (1).to_bytes(4, "big") + b"2engine: tiny")
        if self.behaviour.get("wait"):
            await self.interrupted.wait()
            await self.send("execution_interrupted", node_id="2")
            return
        if error := self.behaviour.get("error"):
            await self.send("execution_error", node_id="2", node_type="SaveImage", **error)
            return
        if self.behaviour.get("lose"):
            if self.behaviour["lose"] == "everything":
                self.queue = []
            await self.socket.close()
            if self.behaviour["lose"] in ("everything", "for a moment"):
                return
            await asyncio.sleep(0.2)
        self.keep()
        if not self.behaviour.get("lose"):
            await self.send("executing", node=None)

    async def get_history(self, request: Any) -> Any:
        from aiohttp import web

        return web.json_response({k: v for k, v in self.history.items() if k == request.match_info["id"]})

    async def get_job(self, request: Any) -> Any:
        from aiohttp import web

        if self.behaviour.get("old"):
            raise web.HTTPNotFound
        state = "completed" if "p" in self.history else "in_progress" if self.queue else None
        return web.json_response(
            {"status": state} if state else {"error": "Job not found"}, status=200 if state else 404
        )

    async def get_queue(self, request: Any) -> Any:
        from aiohttp import web

        self.asked.append("queue")
        return web.json_response({"queue_running": self.queue, "queue_pending": []})

    async def view(self, request: Any) -> Any:
        from aiohttp import web

        if self.behaviour.get("wait at") == "view":
            await self.stop.wait()
        return web.Response(body=f"{request.query['type']}/{request.query['filename']}".encode())

    async def object_info(self, request: Any) -> Any:
        from aiohttp import web

        name = request.match_info["name"]
        inputs = {"image": [["x.png"], {"image_upload": True}], "text": ["STRING", {}]} if name == "LoadImage" else {}
        return web.json_response({name: {"input": {"required": inputs}}})

    async def upload(self, request: Any) -> Any:
        from aiohttp import web

        if self.behaviour.get("wait at") == "upload":
            await self.stop.wait()
        form = await request.post()
        name = f"{form['subfolder']}/{form['image'].filename}"
        self.uploads[name] = form["image"].file.read()
        return web.json_response({"name": form["image"].filename, "subfolder": form["subfolder"], "type": "input"})

    async def control(self, request: Any) -> Any:
        from aiohttp import web

        self.posted.append((request.path.strip("/"), await request.json()))
        self.interrupted.set()
        self.queue = []
        return web.Response()


@pytest.fixture
def stand_in():
    server = StandIn()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    assert server.ready.wait(60)
    yield server
    server.loop.call_soon_threadsafe(server.stop.set)
    thread.join(10)


class Watcher:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def started(self, node, position, total):
        self.seen.append(f"start {node.id} {position}/{total}")

    def progress(self, node, done, total):
        self.seen.append(f"progress {node.id} {done}/{total}")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def test_a_run(stand_in, inputs, tmp_path):
    watcher = Watcher()
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path / "out", inputs, watcher)
    assert [f.path for f in outcome.files] == [tmp_path / "out" / "b.png"]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"output/b.png"
    assert [(node.id, text) for node, text in outcome.texts] == [("2", "hello"), ("2", "engine: tiny")]
    assert watcher.seen == ["start 2 2/2", "progress 2 1.0/4.0"]
    assert [(t.node.id, t.seconds is None) for t in outcome.times] == [("1", True), ("2", False)]
    # The picture went up under a folder named by its content, and the prompt says so.
    ((name, content),) = stand_in.uploads.items()
    assert name.startswith("hotpath/") and name.endswith("/a.png") and content == (inputs / "a.png").read_bytes()
    assert stand_in.posted[0][1]["prompt"]["1"]["inputs"]["image"] == name


def test_a_prompt_longer_than_any_file_name_is_a_prompt(stand_in, inputs, tmp_path):
    long = {**COPY, "3": {"class_type": "PreviewAny", "inputs": {"source": "a lighthouse at dusk, " * 40}}}
    run_on_server(stand_in.url, Graph.parse(long), tmp_path / "out", inputs)
    assert stand_in.posted[0][1]["prompt"]["3"]["inputs"]["source"] == long["3"]["inputs"]["source"]
    assert len(stand_in.uploads) == 1


def test_nothing_is_overwritten_and_previews_go_apart(stand_in, tmp_path):
    stand_in.behaviour["records"] = [{"filename": "b.png", "type": "output"}, {"filename": "t.png", "type": "temp"}]
    for name in ("b.png", "b-2.png"):
        outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
        assert outcome.files[0].path == tmp_path / name
    assert outcome.files[1].temporary and outcome.files[1].path.parent == tmp_path / "preview"


def test_results_that_are_on_this_machine_stay_where_they_are(stand_in, tmp_path):
    (tmp_path / "b.png").write_bytes(b"mine")
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path, written_to=tmp_path)
    assert outcome.files[0].path == tmp_path / "b.png" and (tmp_path / "b.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "record",
    [
        {"filename": "../../evil.png", "subfolder": "", "type": "output"},
        {"filename": "evil.png", "subfolder": "../..", "type": "output"},
        {"filename": "/tmp/evil.png", "subfolder": "", "type": "output"},
        {"filename": "..\\..\\evil.png", "subfolder": "", "type": "temp"},
    ],
)
def test_a_server_cannot_write_outside_the_folder(stand_in, tmp_path, record):
    stand_in.behaviour["records"] = [record]
    with pytest.raises(ServerError, match="refused"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path / "a" / "out")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("old", [False, True])
def test_a_lost_connection_is_waited_out(stand_in, tmp_path, old):
    """Without asking for everybody's prompts, where the server knows of single ones."""
    stand_in.behaviour.update(lose=True, old=old)
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
    assert outcome.files[0].path.is_file()
    assert [t.node.id for t in outcome.times] == ["1", "2"], "what was heard before and what was asked for, once"
    assert ("queue" in stand_in.asked) <= old


def test_a_connection_that_comes_back_is_heard_again(stand_in, tmp_path):
    stand_in.behaviour["lose"] = "for a moment"
    watcher = Watcher()
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path, observer=watcher)
    assert outcome.files and watcher.seen[-1] == "progress 2 3.0/4.0"
    assert len(stand_in.asked) == 2 and len(set(stand_in.asked)) == 1, "as the same client, or nothing would be heard"


def test_everybodys_prompts_are_asked_for_ever_more_rarely(stand_in, tmp_path, monkeypatch):
    """A hundred clients that wait behind a long queue must not each fetch all of it every second."""
    monkeypatch.setattr(server, "SOONEST", 0.05)
    stand_in.behaviour.update({"old": True, "waits behind others": True})
    run = ServerRun(stand_in.url, Graph.parse(COPY), tmp_path, None, None, None)

    async def waited() -> None:
        work = asyncio.ensure_future(run.execute())
        await asyncio.sleep(1.5)
        run.stop.set()
        await work

    with pytest.raises(ServerStopped):
        asyncio.run(waited())
    assert 2 <= stand_in.asked.count("queue") <= 6  # after 0.05, 0.15, 0.35, 0.75, (1.55) s, and at the end


def test_a_prompt_that_somebody_takes_out_of_the_queue_is_missed(stand_in, tmp_path):
    """The server says nothing of it to anybody."""
    stand_in.behaviour["waits behind others"] = "and is taken out"
    with pytest.raises(ServerError, match="took the run out of the queue"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)


def test_a_name_in_any_script_goes_up_as_it_is(stand_in, tmp_path):
    name = 'ein "Bild", 写真 #1.png'
    Image.new("RGB", (6, 4), "red").save(tmp_path / name)
    graph = {**COPY, "1": {"class_type": "LoadImage", "inputs": {"image": name}}}
    run_on_server(stand_in.url, Graph.parse(graph), tmp_path / "out", tmp_path)
    assert [uploaded.partition("/")[2].partition("/")[2] for uploaded in stand_in.uploads] == [name]


@pytest.mark.parametrize("old", [False, True])
def test_a_server_that_was_started_anew_does_not_know_the_run(stand_in, tmp_path, old):
    """It would be asked for ever."""
    stand_in.behaviour.update(lose="everything", old=old)
    with pytest.raises(ServerError, match=r"does not know this run any more.*Run the workflow again"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)


def test_an_error_names_node_and_inputs(stand_in, tmp_path):
    stand_in.behaviour["error"] = {
        "exception_message": "no room",
        "exception_type": "RuntimeError",
        "current_inputs": {"filename_prefix": ["copy"], "images": ["tensor(" + "0," * 100]},
    }
    with pytest.raises(ServerError) as caught:
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
    assert str(caught.value) == "SaveImage (#2) failed on the server: no room\n  its inputs: filename_prefix='copy'"


REASON = {"message": "Value not in list", "details": "image: 'a.png'", "extra_info": {"input_name": "image"}}
NODE_ERRORS = {"1": {"class_type": "LoadImage", "errors": [REASON], "dependent_outputs": ["2"]}}


def test_a_refusal_names_node_and_input(stand_in, tmp_path):
    stand_in.behaviour["refuse"] = {"error": {"message": "failed validation"}, "node_errors": NODE_ERRORS}
    with pytest.raises(ServerRefused, match=r"LoadImage \(#1\), input 'image': Value not in list"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)


def test_half_a_workflow_is_not_run(stand_in, tmp_path):
    stand_in.behaviour.update(node_errors=NODE_ERRORS, wait=True)
    with pytest.raises(ServerRefused, match="input 'image'"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
    assert ("queue", {"delete": ["p"]}) in stand_in.posted and ("interrupt", {"prompt_id": "p"}) in stand_in.posted


def test_an_older_comfyui_gets_its_names_of_inputs(stand_in, tmp_path):
    """Inputs that depend on a choice were plain ones: Save Video's `format.codec` was `codec`."""
    missing = {"type": "required_input_missing", "extra_info": {"input_name": "codec"}}
    stand_in.behaviour["refuse once"] = {"error": {}, "node_errors": {"2": {"errors": [missing]}}}
    newer = json.loads(json.dumps(COPY))
    newer["2"]["inputs"] |= {"format": "mp4", "format.codec": "h264"}
    run_on_server(stand_in.url, Graph.parse(newer), tmp_path)
    inputs = [body["prompt"]["2"]["inputs"] for name, body in stand_in.posted if name == "prompt"][-1]
    assert inputs == {**COPY["2"]["inputs"], "format": "mp4", "codec": "h264"}


def test_refusals_in_other_shapes():
    graph = Graph.parse(COPY)
    assert refusal({"error": "go away"}, graph) == "The server refused the workflow. go away"
    assert "LoadImage (#1): not found" in refusal(
        {"error": {"message": "not found", "extra_info": {"node_id": "1"}}}, graph
    )
    assert "gave no reason" in refusal({}, graph)
    assert failure({"node_id": "9", "node_type": "Made", "exception_type": "E"}, graph).startswith("Made (#9) failed")


def test_ctrl_c_interrupts_only_our_prompt(stand_in, tmp_path):
    stand_in.behaviour["wait"] = True
    run = ServerRun(stand_in.url, Graph.parse(COPY), tmp_path, None, None, None)

    async def stopped() -> None:
        work = asyncio.ensure_future(run.execute())
        while not run.prompt_id:
            await asyncio.sleep(0.01)
        run.stop.set()
        await work

    with pytest.raises(ServerStopped):
        asyncio.run(stopped())
    assert ("interrupt", {"prompt_id": "p"}) in stand_in.posted


@pytest.mark.parametrize(
    ("moment", "told"),
    [
        ("upload", "before the workflow was queued"),
        ("in the queue", "was told to interrupt"),
        ("view", "results stay on the server"),
    ],
)
def test_ctrl_c_at_any_time(stand_in, inputs, tmp_path, moment, told):
    """One is enough, and what is left behind is said."""
    stand_in.behaviour.update({"wait at": moment, "waits behind others": moment == "in the queue"})
    run = ServerRun(stand_in.url, Graph.parse(COPY), tmp_path / "out", inputs, None, None)

    async def stopped() -> None:
        work = asyncio.ensure_future(run.execute())
        await asyncio.sleep(0.7)
        run.stop.set()
        await work

    started = time.monotonic()
    with pytest.raises(ServerStopped, match=told):
        asyncio.run(stopped())
    assert time.monotonic() - started < 10.0
    assert (("queue", {"delete": ["p"]}) in stand_in.posted) == (moment == "in the queue")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("given", "url"),
    [("127.0.0.1:8188", "http://127.0.0.1:8188"), ("https://a.example/comfy/", "https://a.example/comfy")],
)
def test_addresses(given, url):
    assert server_url(given) == url


@pytest.mark.parametrize("given", ["ftp://a", "file:///x", "http://", "javascript:alert(1)", "http://[::1"])
def test_addresses_that_are_refused(given):
    with pytest.raises(ServerError, match="not the address"):
        server_url(given)


def test_a_server_that_is_no_comfyui(tmp_path):
    with pytest.raises(ServerError, match="does not answer"):
        run_on_server(f"http://127.0.0.1:{free_port()}", Graph.parse(COPY), tmp_path)


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
        launcher.RunningServer(f"http://127.0.0.1:{web.server_port}", process, Path("none"), Path()), 1.0
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
    with pytest.raises(SystemExit) as ended, launcher._ended_by_signal() as waiting, waiting():
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
environment = {**os.environ, "HOTPATH_STARTED_BY": str(os.getpid())}
started = subprocess.Popen([sys.executable, "-c", child], env=environment, start_new_session=True, stdout=subprocess.PIPE)
print(started.pid, started.stdout.readline(), flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(os.name != "posix", reason="a process is told of its parent's end on POSIX only")
def test_a_comfyui_ends_with_who_started_it_however_that_ended(monkeypatch):
    import psutil
    from hotpath.headless.orphans import STARTED_BY, end_with_starter

    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    number, said = starter.stdout.readline().split()
    assert "watches" in said
    child = psutil.Process(int(number))
    starter.kill()
    starter.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(10)
    # What such a ComfyUI starts has the variable too, and another parent.
    monkeypatch.setenv(STARTED_BY, "1")
    assert os.getppid() == 1 or not end_with_starter()
    monkeypatch.delenv(STARTED_BY)
    assert not end_with_starter()


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


# One real ComfyUI for the tests below.


@pytest.fixture
def comfyui(demo_comfyui):
    return demo_comfyui


@pytest.mark.comfy
@pytest.mark.xdist_group("demo_comfyui")
class TestRealComfyUI:
    def test_a_graph_runs(self, comfyui, inputs, tmp_path):
        watcher = Watcher()
        outcome = run_on_server(comfyui.url, Graph.parse(COPY), tmp_path / "out", inputs, watcher)
        (saved,) = outcome.files
        assert Image.open(saved.path).size == (6, 4) and "prompt" in Image.open(saved.path).info
        assert [entry.split()[1] for entry in watcher.seen if entry.startswith("start")] == ["1", "2"]
        again = run_on_server(comfyui.url, Graph.parse(COPY), tmp_path / "out", inputs)
        assert all(t.seconds is None for t in again.times)  # the same content has the same name, so nothing ran

    def test_our_nodes_are_there(self, comfyui):
        import urllib.request

        with urllib.request.urlopen(f"{comfyui.url}/object_info") as answer:
            known = json.load(answer)
        from hotpath.nodes import NODE_CLASS_MAPPINGS

        assert set(NODE_CLASS_MAPPINGS) <= set(known)

    def test_bad_graphs(self, comfyui, tmp_path):
        graph = {
            **COPY,
            "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": -8, "batch_size": 1, "color": 0}},
        }
        with pytest.raises(ServerError, match=r"EmptyImage \(#1\), input 'height': .*smaller than min"):
            run_on_server(comfyui.url, Graph.parse(graph), tmp_path)
        graph = {**COPY, "1": {"class_type": "NobodyHasThis", "inputs": {}}}
        with pytest.raises(ServerError, match=r"NobodyHasThis \(#1\)"):
            run_on_server(comfyui.url, Graph.parse(graph), tmp_path)

    def test_a_node_that_fails(self, comfyui, inputs, tmp_path):
        graph = json.loads(json.dumps(COPY))
        graph["2"]["inputs"]["filename_prefix"] = "../../out"
        with pytest.raises(
            ServerError, match=r"(?s)SaveImage \(#2\) failed on the server: .*filename_prefix='../../out'"
        ) as caught:
            run_on_server(comfyui.url, Graph.parse(graph), tmp_path, inputs)
        assert "Traceback" not in str(caught.value)

    def test_an_interrupt(self, comfyui, inputs, tmp_path):
        graph = Graph.parse({"1": COPY["1"], "2": {"class_type": "Slow", "inputs": {"image": ["1", 0]}}})
        watcher = Watcher()
        run = ServerRun(comfyui.url, graph, tmp_path, inputs, watcher, None)

        async def stopped() -> None:
            work = asyncio.ensure_future(run.execute())
            while not any(entry.startswith("progress 2") for entry in watcher.seen):
                await asyncio.sleep(0.05)
            run.stop.set()
            await work

        started = time.monotonic()
        with pytest.raises(ServerStopped):
            asyncio.run(asyncio.wait_for(stopped(), 60))
        assert time.monotonic() - started < 30
        # And it takes the next one.
        assert run_on_server(comfyui.url, Graph.parse(COPY), tmp_path / "out", inputs).files

    def test_a_queue_and_a_connection_that_breaks(self, comfyui, inputs, tmp_path):
        """Who comes back hears on; a prompt that waits can be stopped at once, and is missed when somebody removes it."""

        class Breaks(ServerRun):
            connections = 0

            async def _listen(self, socket):
                self.connections, self.loop = self.connections + 1, asyncio.get_running_loop()
                if self.connections == 1:
                    self.loop.call_later(0.5, lambda: asyncio.ensure_future(socket.close()))
                return await super()._listen(socket)

        slow = Graph.parse({"1": COPY["1"], "2": {"class_type": "Slow", "inputs": {"image": ["1", 0]}}})
        watcher = Watcher()
        long = Breaks(comfyui.url, slow, tmp_path, inputs, watcher, None)
        ended: list[BaseException] = []

        def run_it() -> None:
            try:
                asyncio.run(long.execute())
            except BaseException as error:
                ended.append(error)

        def wait_for(condition) -> None:
            end = time.monotonic() + 30
            while not condition():
                assert time.monotonic() < end and not ended
                time.sleep(0.02)

        async def queued(until) -> None:
            run = ServerRun(comfyui.url, Graph.parse(COPY), tmp_path, inputs, None, None)

            async def then() -> None:
                while not run.prompt_id:
                    await asyncio.sleep(0.02)
                await until(run)

            task = asyncio.ensure_future(then())
            await run.execute()
            await task

        async def stop(run) -> None:
            run.stop.set()

        async def remove(run) -> None:
            await run.session.post(f"{comfyui.url}/queue", json={"delete": [run.prompt_id]})

        thread = threading.Thread(target=run_it)
        thread.start()
        wait_for(lambda: watcher.seen and watcher.seen[-1].startswith("progress 2"))
        with pytest.raises(ServerStopped):
            asyncio.run(queued(stop))
        with pytest.raises(ServerError, match="somebody took the run out of the queue"):
            asyncio.run(queued(remove))
        wait_for(lambda: long.connections == 2)
        heard = len(watcher.seen)
        wait_for(lambda: len(watcher.seen) > heard + 2)
        long.loop.call_soon_threadsafe(long.stop.set)
        thread.join(30)
        assert isinstance(ended[0], ServerStopped)

    def test_a_name_in_another_script(self, comfyui, tmp_path):
        """As long as a name can be, which no longer fits when it is quoted on its way."""
        name = "写" * 80 + " 1.png"
        Image.new("RGB", (6, 4), "red").save(tmp_path / name)
        graph = Graph.parse({**COPY, "1": {"class_type": "LoadImage", "inputs": {"image": name}}})
        assert run_on_server(comfyui.url, graph, tmp_path / "out", tmp_path).files

    def test_ctrl_c_on_the_command_line(self, comfyui, inputs, tmp_path):
        graph = {"1": COPY["1"], "2": {"class_type": "Slow", "inputs": {"image": ["1", 0]}}}
        (tmp_path / "wf.json").write_text(json.dumps(graph))
        command = [sys.executable, str(ROOT), "run", str(tmp_path / "wf.json"), "--server", comfyui.url]
        process = subprocess.Popen(
            [*command, "--input-folder", str(inputs)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Slow" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130, rest
        assert "Traceback" not in "".join(lines) + rest and "told to interrupt" in rest
