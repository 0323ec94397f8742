"""A server that answers like ComfyUI and misbehaves on request, and what is run on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
}
DECLARED = {
    "LoadImage": {
        "input": {
            "required": {"image": [["x.png"], {"image_upload": True}], "text": ["STRING", {}]},
            "optional": {"seed": ["INT", {}]},
        },
        "output": ["IMAGE", "MASK"],
    },
    "SaveImage": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {}]}, "hidden": {"prompt": "PROMPT"}},
        "output": [],
        "output_node": True,
    },
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
        app.router.add_get("/object_info", self.all_nodes)
        app.router.add_get("/system_stats", self.system_stats)
        app.router.add_post("/upload/image", self.upload)
        app.router.add_get("/queue", self.get_queue)
        app.router.add_get("/api/jobs/{id}", self.get_job)
        for name in ("interrupt", "queue", "free"):
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
        if makes := self.behaviour.get("makes"):
            makes()
        records = self.behaviour.get("records", [{"filename": "b.png", "subfolder": "", "type": "output"}])
        self.history["p"] = {"outputs": {"2": {"images": records, "text": self.texts()}}, "status": {"messages": []}}
        self.queue = []

    def texts(self) -> list[str]:
        return self.behaviour.get("texts", ["hello"])

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
        if self.behaviour.get("busy"):  # what is kept can be asked for before anything of it was said
            self.keep()
            while not self.behaviour.get("asked"):
                await asyncio.sleep(0.005)
        if self.behaviour.get("monitor"):  # of another pack; of the run the end was not heard
            self.keep()
            while not self.socket.closed:
                with contextlib.suppress(ConnectionError):
                    await self.send("monitor", prompt_id=None)
                await asyncio.sleep(0.01)
            return
        await self.send("execution_cached", nodes=["1"])
        await self.send("executing", node="2")
        await self.send("progress", node="2", value=1, max=4)
        if self.texts():
            await self.socket.send_bytes((3).to_bytes(4, "big") + (1).to_bytes(4, "big") + b"2engine: tiny")
        if self.behaviour.get("wait"):
            await self.interrupted.wait()
            await self.send("execution_interrupted", node_id="2")
            return
        if error := self.behaviour.pop("error once", None) or self.behaviour.get("error"):
            await self.send("execution_error", node_id="2", node_type="SaveImage", **error)
            return
        lose = "everything" if self.behaviour.pop("forgets once", False) else self.behaviour.get("lose")
        if lose:
            if lose == "everything":
                self.queue = []
            await self.socket.close()
            if lose in ("everything", "for a moment"):
                return
            await asyncio.sleep(0.2)
        self.keep()
        if not lose:
            await self.send("executing", node=None)

    async def get_history(self, request: Any) -> Any:
        from aiohttp import web

        self.behaviour["asked"] = True
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
        return web.json_response({name: DECLARED.get(name, {})})

    async def all_nodes(self, request: Any) -> Any:
        from aiohttp import web

        return web.json_response(DECLARED)

    async def system_stats(self, request: Any) -> Any:
        from aiohttp import web

        return web.json_response({})

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


@contextlib.contextmanager
def standing_in() -> Iterator[StandIn]:
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
