"""Queues a workflow on a ComfyUI that runs and follows it: progress over its websocket, errors by node, results fetched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from .graph import Graph, Node
from .outcome import NodeTime, Outcome, OutputFile, is_file_record
from .server_answers import ServerError, ServerLost, ServerRefused, failure, plain_names, refusal
from .server_files import ServerFiles

CONNECT_SECONDS = 15.0
ASK_SECONDS = 30.0  # for an answer to a question; a server that computes may be slow to give one
PATIENCE = 30.0  # seconds without any sign of the server until it is given up
INTERRUPT_SECONDS = 60.0
LAST_WORDS = 0.5  # for what a server still has to say of a run that is over by its history
SOONEST, LATEST = 1.0, 60.0  # seconds between two questions how a run stands, which double from the one to the other

Result = TypeVar("Result")


class ServerStopped(KeyboardInterrupt):
    """The user stopped the run; the message says what becomes of it on the server."""


class ServerObserver(Protocol):
    """Is told what happens on the server."""

    def started(self, node: Node, position: int, total: int) -> None: ...
    def progress(self, node: Node, done: float, total: float) -> None: ...


def server_url(text: str) -> str:
    """`text` as a base URL. Raises ServerRefused for anything but http and https."""
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        right = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:  # a port that is no number, half a pair of brackets
        right = False
    if not right:
        raise ServerRefused(f"{text!r} is not the address of a server; give one such as http://127.0.0.1:8188.")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def run_on_server(
    url: str,
    graph: Graph,
    output_folder: Path,
    input_folder: Path | None = None,
    observer: ServerObserver | None = None,
    at_hand: Mapping[str, Path] | None = None,
) -> Outcome:
    """Run `graph` on the server and fetch what it made into `output_folder`.

    Files that inputs name are uploaded from `input_folder` when they are there. at_hand: as ServerFiles has it. Raises
    ServerError or ServerStopped.
    """
    run = ServerRun(server_url(url), graph, output_folder, input_folder, observer, at_hand)
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
        at_hand: Mapping[str, Path] | None = None,
    ) -> None:
        self.url, self.graph, self.observer = url, graph, observer
        self.output_folder, self.input_folder, self.at_hand = output_folder, input_folder, at_hand or {}
        self.prompt = graph.prompt()
        self.prompt_id = ""
        self.outcome = Outcome(f"ComfyUI at {url}")
        self.current: tuple[Node, float] | None = None
        self.seen = 0
        self.heard = 0.0  # when the server last gave a sign of itself
        self.stop = asyncio.Event()
        self._halted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.queueing = asyncio.Lock()
        self.texts: dict[str, str] = {}

    async def execute(self) -> Outcome:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
        self._loop = asyncio.get_running_loop()
        if self._halted:
            self.stop.set()
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                self.session = session
                self.files = ServerFiles(session, self.url, self.output_folder, self.at_hand)
                with _stop_on_signal(self.stop):
                    return await self._execute()
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__
            raise ServerLost(f"The ComfyUI at {self.url} does not answer: {reason}.") from error
        except OSError as error:
            raise ServerError(f"A file cannot be read or written here: {error}.") from error

    def halt(self) -> None:
        """Stop the run as Ctrl-C does, from another thread; also one that has not begun."""
        self._halted = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self.stop.set)

    async def _execute(self) -> Outcome:
        if self.input_folder is not None:
            uploads = self.files.upload_inputs(self.graph, self.prompt, self.input_folder)
            await self._unless_stopped(uploads, "Stopped before the workflow was queued.")
        started = time.perf_counter()
        await self._unless_stopped(self._follow(), "Stopped; the server was told to interrupt.", self._stop_run)
        self._end_current()
        self.outcome.seconds = time.perf_counter() - started
        await self._unless_stopped(self._fetch(), "Stopped; the results stay on the server.")
        return self.outcome

    async def _unless_stopped(
        self,
        work: Awaitable[Result],
        message: str,
        before: Callable[[asyncio.Future[Result]], Awaitable[None]] | None = None,
    ) -> Result:
        """The result of `work`. Raises ServerStopped when the person stops it first; `before` is done before that."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if before is not None:
                await before(task)
            raise ServerStopped(message)
        finally:
            stopping.cancel()
            task.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    async def _follow(self) -> None:
        """Queue the prompt and listen until its run is over. A connection that is lost is made anew, and what happened
        meanwhile is asked for. Raises ServerError."""
        import aiohttp

        client, wait = uuid.uuid4().hex, SOONEST
        while True:
            try:
                async with self.session.ws_connect(
                    f"{self.url}/ws", params={"clientId": client}, max_msg_size=0
                ) as socket:
                    if not self.prompt_id:
                        await self._queue(client)
                    elif await self._is_over():
                        return
                    if await self._listen(socket):
                        return
            except aiohttp.ClientError:
                # A network or a tunnel may come back in a moment.
                if not self.prompt_id or time.monotonic() - self.heard > PATIENCE:
                    raise
            await asyncio.sleep(wait)
            wait = min(2 * wait, LATEST)

    async def _queue(self, client: str) -> None:
        answer = await self._post(client)
        if answer.get("node_errors") and plain_names(answer, self.prompt):
            if answer.get("prompt_id"):
                await self._interrupt()
            answer = await self._post(client)
        if answer.get("node_errors") or answer.get("error"):
            # ComfyUI runs the outputs that are right and drops the others; the person asked for all of them.
            if answer.get("prompt_id"):
                await self._interrupt()
            raise ServerRefused(refusal(answer, self.graph), answer.get("node_errors") or ())

    async def _post(self, client: str) -> dict[str, Any]:
        """What the server answers to the prompt; `prompt_id` is that of the queued one."""
        body = {"prompt": self.prompt, "client_id": client}
        async with self.queueing, self.session.post(f"{self.url}/prompt", json=body) as response:
            try:
                answer = await response.json(content_type=None)
            except json.JSONDecodeError:
                raise ServerError(f"{self.url} answered {response.status}; is it a ComfyUI?") from None
            if response.status != 200:
                return {"error": "It gave no reason.", **answer}
            self.prompt_id, self.heard = answer["prompt_id"], time.monotonic()
            return dict(answer)

    async def _listen(self, socket: Any) -> bool:
        """Hear how the run goes on; True when it is over, False when the connection was lost. Raises ServerError.

        Now and then it is asked for as well: the server says nothing when somebody takes a prompt out of its queue. A busy one
        answers before it has told what its nodes did and reported.
        """
        import aiohttp

        wait = SOONEST
        ask_at = time.monotonic() + wait
        over = False
        while True:
            try:
                message = await socket.receive(timeout=max(0.001, ask_at - time.monotonic()))
            except asyncio.TimeoutError:
                if over:
                    return True
                over = await self._is_over()
                wait = LAST_WORDS if over else min(2 * wait, LATEST)
                ask_at = time.monotonic() + wait
                continue
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED):
                return over
            if message.type == aiohttp.WSMsgType.ERROR:
                return over
            self.heard = time.monotonic()
            if message.type == aiohttp.WSMsgType.BINARY:
                self._binary(message.data)
            elif message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                data = event.get("data") or {}
                if over and data.get("prompt_id") == self.prompt_id:  # other packs' monitors never cease
                    ask_at = time.monotonic() + LAST_WORDS
                ours = data.get("prompt_id", self.prompt_id) == self.prompt_id
                if ours and self._event(str(event.get("type")), data):
                    return True

    def _event(self, kind: str, data: Mapping[str, Any]) -> bool:
        """Take note of one event; True when nothing runs any more. Raises ServerError."""
        match kind:
            case "execution_cached":
                told = {entry.node.id for entry in self.outcome.times}
                for node_id in data.get("nodes", []):
                    if node_id not in told:
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
                raise failure(data, self.graph)
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

    async def _is_over(self) -> bool:
        """Ask how the run stands. Raises ServerError when it failed, or the server does not know it any more."""
        import aiohttp

        try:
            if await self._waits():
                return False
            entry = await self._history()
        except aiohttp.ClientError:
            raise
        except asyncio.TimeoutError:
            return False  # it is there, and busy
        if entry is None:
            raise ServerLost(
                f"The ComfyUI at {self.url} does not know this run any more: it was started anew, its history was "
                "cleared, or somebody took the run out of the queue. Run the workflow again."
            )
        for kind, data in (entry.get("status") or {}).get("messages", []):
            self._event(kind, data)
        return True

    async def _waits(self) -> bool:
        """Whether the run is in the queue or at work; also when the server does not say."""
        status, answer = await self._ask(f"/api/jobs/{self.prompt_id}")
        if status == 200 or (status == 404 and isinstance(answer, dict)):
            return status == 200 and answer.get("status") in ("pending", "in_progress")
        if await self._history() is not None:
            return False
        # A ComfyUI from before that route tells of nothing less than everybody's prompts.
        status, answer = await self._ask("/queue")
        if status != 200:
            return True
        entries = [*answer.get("queue_running", []), *answer.get("queue_pending", [])]
        # One that has just ended is in neither; the history is asked next.
        return any(self.prompt_id in entry[:2] for entry in entries)

    async def _history(self) -> dict[str, Any] | None:
        _, answer = await self._ask(f"/history/{self.prompt_id}")
        found = answer.get(self.prompt_id) if isinstance(answer, dict) else None
        return dict(found) if found else None

    async def _ask(self, path: str) -> tuple[int, Any]:
        """Status and JSON of an answer, None for one that is no JSON."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=ASK_SECONDS, connect=CONNECT_SECONDS)
        async with self.session.get(f"{self.url}{path}", timeout=timeout) as response:
            answer = await response.json() if response.content_type == "application/json" else None
            self.heard = time.monotonic()
            return response.status, answer

    async def _stop_run(self, following: asyncio.Future[None]) -> None:
        """Take our prompt out of the queue, or stop it and wait until it has stopped."""
        async with self.queueing:  # one that is being queued at this moment gets its number first
            if not self.prompt_id:
                return
        await self._interrupt()
        end, wait = time.monotonic() + INTERRUPT_SECONDS, 0.2
        while time.monotonic() < end and await self._waits():
            if (await asyncio.wait({following}, timeout=wait))[0]:
                return
            wait = min(2 * wait, 5.0)

    async def _interrupt(self) -> None:
        """Other people's prompts go on."""
        await self.session.post(f"{self.url}/queue", json={"delete": [self.prompt_id]})
        await self.session.post(f"{self.url}/interrupt", json={"prompt_id": self.prompt_id})

    async def _fetch(self) -> None:
        entry = await self._history()
        if entry is None:
            raise ServerLost(f"The ComfyUI at {self.url} has forgotten what this run gave; its files are still there.")
        shown: set[tuple[str, str]] = set()
        for node_id, output in (entry.get("outputs") or {}).items():
            node = self.graph.nodes.get(node_id, Node(node_id, "a node made while it ran", {}))
            for key, records in output.items():
                for record in records if isinstance(records, list) else []:
                    if is_file_record(record) and record.get("type") != "input":  # what it was given is no result
                        path = await self.files.download(record)
                        self.outcome.files.append(OutputFile(node, path, record.get("type") == "temp"))
                    elif key == "text":
                        shown.add((node_id, str(record)))
                        self.outcome.texts.append((node, str(record)))
        for node_id, text in self.texts.items():
            if node_id in self.graph.nodes and (node_id, text) not in shown:
                self.outcome.texts.append((self.graph.nodes[node_id], text))


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
