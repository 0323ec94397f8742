"""Queues a workflow on a ComfyUI that runs: uploads, progress over its websocket, errors by node, results fetched.

What the server says is not trusted with paths: a file it names is only ever written inside the output folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from .files import inside
from .graph import Graph, Node
from .outcome import NodeTime, Outcome, OutputFile, is_file_record

CONNECT_SECONDS = 15.0
INTERRUPT_SECONDS = 60.0
POLL_SECONDS = 1.0
UPLOAD_FOLDER = "hotpath"
PREVIEWS = "preview"  # sub-folder of the output folder for what a workflow only shows


class ServerError(RuntimeError):
    """The server could not be reached, refused the workflow, or failed in it; the message names node and input."""


class ServerStopped(KeyboardInterrupt):
    """The user stopped the run, and the server was told."""


class ServerObserver(Protocol):
    """Is told what happens on the server."""

    def started(self, node: Node, position: int, total: int) -> None: ...
    def progress(self, node: Node, done: float, total: float) -> None: ...


def server_url(text: str) -> str:
    """`text` as a base URL. Raises ServerError for anything but http and https."""
    url = urlsplit(text if "://" in text else f"http://{text}")
    try:
        right = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:  # a port that is no number
        right = False
    if not right:
        raise ServerError(f"{text!r} is not the address of a server; give one such as http://127.0.0.1:8188.")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def run_on_server(
    url: str,
    graph: Graph,
    output_folder: Path,
    input_folder: Path | None = None,
    observer: ServerObserver | None = None,
    written_to: Path | None = None,
) -> Outcome:
    """Run `graph` on the server and fetch what it made into `output_folder`.

    Files that inputs name are uploaded from `input_folder` when they are there. written_to: the server's own output
    folder when it is on this machine and is where results should stay. Raises ServerError or ServerStopped.
    """
    run = ServerRun(server_url(url), graph, output_folder, input_folder, observer, written_to)
    return asyncio.run(run.execute())


class ServerRun:
    """One workflow on one server."""

    def __init__(
        self,
        url: str,
        graph: Graph,
        output_folder: Path,
        input_folder: Path | None,
        observer: ServerObserver | None,
        written_to: Path | None,
    ) -> None:
        self.url = url
        self.graph = graph
        self.output_folder = output_folder
        self.input_folder = input_folder
        self.observer = observer
        self.written_to = written_to
        self.prompt = graph.prompt()
        self.prompt_id = ""
        self.outcome = Outcome(f"ComfyUI at {url}")
        self.current: tuple[Node, float] | None = None
        self.seen = 0
        self.stop = asyncio.Event()
        self.texts: dict[str, str] = {}

    async def execute(self) -> Outcome:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                self.session = session
                with _stop_on_signal(self.stop):
                    return await self._execute()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"The ComfyUI at {self.url} does not answer: {reason}.") from error

    async def _execute(self) -> Outcome:
        await self._upload_inputs()
        client = uuid.uuid4().hex
        started = time.perf_counter()
        async with self.session.ws_connect(f"{self.url}/ws", params={"clientId": client}, max_msg_size=0) as socket:
            await self._queue(client)
            listening = asyncio.ensure_future(self._listen(socket))
            stopping = asyncio.ensure_future(self.stop.wait())
            await asyncio.wait({listening, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not listening.done():
                await self._interrupt()
                await asyncio.wait({listening}, timeout=INTERRUPT_SECONDS)
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError, ServerError):
                    await listening
                raise ServerStopped("Stopped; the server was told to interrupt.")
            stopping.cancel()
            finished = await listening
        if not finished:
            await self._poll()
        self._end_current()
        self.outcome.seconds = time.perf_counter() - started
        await self._fetch()
        return self.outcome

    async def _queue(self, client: str) -> None:
        body = {"prompt": self.prompt, "client_id": client}
        async with self.session.post(f"{self.url}/prompt", json=body) as response:
            try:
                answer = await response.json(content_type=None)
            except json.JSONDecodeError:
                raise ServerError(f"{self.url} answered {response.status}; is it a ComfyUI?") from None
            if response.status != 200 or answer.get("error"):
                raise ServerError(refusal(answer, self.graph))
            self.prompt_id = answer["prompt_id"]
            if answer.get("node_errors"):
                # ComfyUI runs the outputs that are right and drops the others; the person asked for all of them.
                await self._interrupt()
                raise ServerError(refusal(answer, self.graph))

    async def _listen(self, socket: Any) -> bool:
        """Follow the run; True when it ended well, False when the connection was lost. Raises ServerError."""
        import aiohttp

        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                self._binary(message.data)
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id", self.prompt_id) != self.prompt_id:
                continue
            if self._event(str(event.get("type")), data):
                return True
        return False

    def _event(self, kind: str, data: Mapping[str, Any]) -> bool:
        match kind:
            case "execution_cached":
                for node_id in data.get("nodes", []):
                    self.seen += 1
                    if node_id in self.graph.nodes:
                        self.outcome.times.append(NodeTime(self.graph.nodes[node_id], None))
            case "executing" if data.get("node") is not None:
                self._begin(str(data["node"]))
            case "executing" if "prompt_id" in data:
                return True  # nothing runs any more, and the results are in the history
            case "progress" if self.observer is not None and str(data.get("node")) in self.graph.nodes:
                node = self.graph.nodes[str(data["node"])]
                self.observer.progress(node, float(data.get("value", 0)), float(data.get("max", 1)))
            case "execution_error":
                self._end_current()
                raise ServerError(failure(data, self.graph))
            case "execution_interrupted":
                raise ServerError("The run was interrupted on the server.")
        return False

    def _binary(self, data: bytes) -> None:
        # Event 3 is text under a node: a length, the node's id, the text.
        if len(data) < 8 or int.from_bytes(data[:4], "big") != 3:
            return
        length = int.from_bytes(data[4:8], "big")
        node_id = data[8 : 8 + length].decode("utf-8", "replace")
        self.texts[node_id] = data[8 + length :].decode("utf-8", "replace")

    def _begin(self, node_id: str) -> None:
        node = self.graph.nodes.get(node_id)
        if node is None or (self.current is not None and self.current[0].id == node_id):
            return
        self._end_current()
        self.seen += 1
        self.current = (node, time.perf_counter())
        if self.observer is not None:
            self.observer.started(node, self.seen, len(self.graph.nodes))

    def _end_current(self) -> None:
        if self.current is not None:
            node, since = self.current
            self.outcome.times.append(NodeTime(node, time.perf_counter() - since))
            self.current = None

    async def _history(self) -> dict[str, Any] | None:
        async with self.session.get(f"{self.url}/history/{self.prompt_id}") as response:
            found = (await response.json()).get(self.prompt_id)
        return dict(found) if found else None

    async def _queued(self) -> bool:
        """Whether the run waits or is at work; also when the server does not say."""
        async with self.session.get(f"{self.url}/queue") as response:
            if response.status != 200:
                return True
            answer = await response.json()
        entries = [*answer.get("queue_running", []), *answer.get("queue_pending", [])]
        return any(self.prompt_id in entry[:2] for entry in entries)

    async def _poll(self) -> None:
        """Wait for the end by asking, after the websocket was lost."""
        while True:
            # In this order: a run that ends in between is in the history then.
            queued = await self._queued()
            if (entry := await self._history()) is not None:
                break
            if not queued:
                raise ServerError(
                    f"The ComfyUI at {self.url} does not know this run any more; it was started anew or its history was "
                    "cleared. Run the workflow again."
                )
            if self.stop.is_set():
                await self._interrupt()
                raise ServerStopped("Stopped; the server was told to interrupt.")
            await asyncio.sleep(POLL_SECONDS)
        for kind, data in (entry.get("status") or {}).get("messages", []):
            self._event(kind, data)

    async def _interrupt(self) -> None:
        """Take our prompt out of the queue, or stop it when it runs; other people's prompts go on."""
        await self.session.post(f"{self.url}/queue", json={"delete": [self.prompt_id]})
        await self.session.post(f"{self.url}/interrupt", json={"prompt_id": self.prompt_id})

    async def _upload_inputs(self) -> None:
        """Upload files that inputs with an upload button name, each under a folder made of its content's hash."""
        if self.input_folder is None:
            return
        for node in self.graph.nodes.values():
            named = {name: value for name, value in node.inputs.items() if isinstance(value, str) and value.strip()}
            local = {name: path for name, value in named.items() if (path := self._local(value)) is not None}
            if not local:
                continue
            for name in local.keys() & await self._upload_buttons(node.class_type):
                self.prompt[node.id]["inputs"][name] = await self._upload(local[name])

    def _local(self, value: str) -> Path | None:
        assert self.input_folder is not None
        try:
            path = inside(self.input_folder, value)
            # A prompt may be longer than any file's name, which the system answers with an error.
            return path if path.is_file() else None
        except (ValueError, OSError):
            return None

    async def _upload_buttons(self, class_type: str) -> set[str]:
        async with self.session.get(f"{self.url}/object_info/{class_type}") as response:
            entry = (await response.json()).get(class_type) if response.status == 200 else None
        found: set[str] = set()
        for section in ((entry or {}).get("input") or {}).values():
            for name, declaration in section.items() if isinstance(section, dict) else ():
                options = declaration[1] if isinstance(declaration, list) and len(declaration) > 1 else {}
                if isinstance(options, dict) and any(k.endswith("_upload") and v is True for k, v in options.items()):
                    found.add(name)
        return found

    async def _upload(self, path: Path) -> str:
        import aiohttp

        content = await asyncio.to_thread(path.read_bytes)
        form = aiohttp.FormData()
        form.add_field("image", content, filename=path.name, content_type="application/octet-stream")
        form.add_field("subfolder", f"{UPLOAD_FOLDER}/{hashlib.md5(content, usedforsecurity=False).hexdigest()[:12]}")
        form.add_field("overwrite", "true")
        async with self.session.post(f"{self.url}/upload/image", data=form) as response:
            if response.status != 200:
                raise ServerError(f"{self.url} refused the upload of {path.name}: {response.status} {response.reason}.")
            answer = await response.json()
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])

    async def _fetch(self) -> None:
        entry = await self._history() or {}
        shown: set[tuple[str, str]] = set()
        for node_id, output in (entry.get("outputs") or {}).items():
            node = self.graph.nodes.get(node_id, Node(node_id, "a node made while it ran", {}))
            for key, records in output.items():
                for record in records if isinstance(records, list) else []:
                    if is_file_record(record):
                        path = await self._download(record)
                        self.outcome.files.append(OutputFile(node, path, record.get("type") == "temp"))
                    elif key == "text":
                        shown.add((node_id, str(record)))
                        self.outcome.texts.append((node, str(record)))
        for node_id, text in self.texts.items():
            if node_id in self.graph.nodes and (node_id, text) not in shown:
                self.outcome.texts.append((self.graph.nodes[node_id], text))

    async def _download(self, record: Mapping[str, Any]) -> Path:
        name, subfolder = str(record["filename"]), str(record.get("subfolder") or "")
        kind = str(record.get("type", "output"))
        root = self.output_folder / PREVIEWS if kind == "temp" else self.output_folder
        try:
            target = inside(root, f"{subfolder}/{name}" if subfolder else name)
        except ValueError as error:
            raise ServerError(f"The server names a result {subfolder}/{name}, which is refused: {error}") from None
        if self.written_to is not None and kind == "output":
            written = inside(self.written_to, f"{subfolder}/{name}" if subfolder else name)
            if written.is_file():
                return written
        params = {"filename": name, "subfolder": subfolder, "type": kind}
        async with self.session.get(f"{self.url}/view", params=params) as response:
            if response.status != 200:
                raise ServerError(f"The result {name} could not be fetched: {response.status} {response.reason}.")
            target.parent.mkdir(parents=True, exist_ok=True)
            target = _free_name(target)
            part = target.with_name(target.name + ".part")
            with part.open("wb") as file:
                async for chunk in response.content.iter_chunked(1 << 20):
                    file.write(chunk)
            part.replace(target)
        return target


def _free_name(path: Path) -> Path:
    """`path`, or name-2, name-3 and so on: a result that is already here is not overwritten."""
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free


def _named(graph: Graph, node_id: str, class_type: str) -> str:
    return str(graph.nodes.get(node_id, Node(node_id, class_type, {})))


def refusal(answer: Mapping[str, Any], graph: Graph) -> str:
    """Why the server did not take the prompt, one line per node and input."""
    error = answer.get("error") or {}
    if isinstance(error, str):
        error = {"message": error}
    lines = []
    for node_id, entry in (answer.get("node_errors") or {}).items():
        for reason in entry.get("errors", []):
            name = (reason.get("extra_info") or {}).get("input_name")
            place = _named(graph, node_id, str(entry.get("class_type")))
            where = f"{place}, input {name!r}" if name else place
            lines.append(f"  - {where}: {reason.get('message')} ({reason.get('details')})")
    if not lines:
        node_id = str((error.get("extra_info") or {}).get("node_id", ""))
        at = f"{_named(graph, node_id, '')}: " if node_id in graph.nodes else ""
        return f"The server refused the workflow. {at}{error.get('message', 'It gave no reason.')}"
    return "The server refused the workflow:\n" + "\n".join(lines)


def failure(data: Mapping[str, Any], graph: Graph) -> str:
    """What went wrong in which node, and the values that it was given."""
    node = _named(graph, str(data.get("node_id")), str(data.get("node_type")))
    message = str(data.get("exception_message", "")).strip() or str(data.get("exception_type"))
    given = {
        name: values[0] if isinstance(values, list) and len(values) == 1 else values
        for name, values in (data.get("current_inputs") or {}).items()
    }
    plain = {name: v for name, v in given.items() if isinstance(v, str | int | float | bool) and len(str(v)) <= 60}
    shown = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    return f"{node} failed on the server: {message}" + (f"\n  its inputs: {shown}" if shown else "")


@contextlib.contextmanager
def _stop_on_signal(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` on Ctrl-C while inside; on a second one the program ends as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(stop.set)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
