"""The panel's routes on ComfyUI's server: what the browser may ask, and from where.

A page of another site that is open in the same browser can send requests here too. So every request must come from
ComfyUI's own pages (or from no page at all, such as curl); changes are POST with JSON, which a foreign form cannot
send; and what they name is looked up in a fixed table, so that no address and no path ever comes from the browser.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from ..cache import all_tiers, clear_all
from .downloads import DownloadDesk, Refused
from .libraries import LibraryReport, attention_backends
from .overview import caches, overview

log = logging.getLogger("hotpath.panel")

PREFIX = "/hotpath"
MAX_BODY = 4096
PORTS = {"http": 80, "https": 443}
THREADS = 4

Body = dict[str, Any]
Action = Callable[[Body], Any]


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from our own pages or from no page, by headers that a page cannot set itself."""
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("Origin")
    if origin is None:
        return True  # no browser sends a POST without it
    try:
        page, ours = urlsplit(origin), urlsplit(f"//{headers.get('Host', '')}")
        default = PORTS.get(page.scheme)
        return (
            bool(page.hostname) and page.hostname == ours.hostname and (page.port or default) == (ours.port or default)
        )
    except ValueError:  # a port that is no number
        return False


class PanelRoutes:
    """The handlers. Whatever touches a disk, a lock or a process runs in a thread, never in the server's loop."""

    def __init__(self, version: str, desk: DownloadDesk | None = None, report: LibraryReport | None = None) -> None:
        self.version = version
        self.desk = desk or DownloadDesk()
        self.report = report or LibraryReport()
        self._free = asyncio.Semaphore(THREADS)
        self.reads: dict[str, Action] = {
            "overview": lambda _: {**overview(self.version), "downloads": self.desk.states()},
            "caches": lambda _: {"caches": caches()},
            "downloads": lambda _: {"downloads": self.desk.states()},
            "libraries": lambda _: self.libraries(again=False),
        }
        self.changes: dict[str, Action] = {
            "caches/clear": self.clear,
            "downloads/start": lambda body: self.desk.start(text(body, "model"), body.get("accept_licence") is True),
            "downloads/stop": lambda body: self.desk.cancel(text(body, "model")),
            "libraries/look": lambda _: self.libraries(again=True),
        }

    def libraries(self, again: bool) -> dict[str, Any]:
        return {**self.report.read(again), "attention": attention_backends()}

    def clear(self, body: Body) -> dict[str, Any]:
        """Empty the cache called `name`, or all of them when it is null."""
        name = None if body.get("name") is None else text(body, "name")
        if name is not None and name not in {cache.name for cache in all_tiers()}:
            raise Refused("There is no cache of that name.", 404)
        return {"cleared": clear_all(name, disk=True), "caches": caches()}

    def add_to(self, table: Any) -> None:
        """Add the routes to an aiohttp RouteTableDef."""
        for path, action in self.reads.items():
            table.get(f"{PREFIX}/{path}")(self.handler(action, changes=False))
        for path, action in self.changes.items():
            table.post(f"{PREFIX}/{path}")(self.handler(action, changes=True))

    def handler(self, action: Action, changes: bool) -> Callable[[Any], Awaitable[Any]]:
        from aiohttp import web

        async def handle(request: web.Request) -> web.Response:
            try:
                if not same_origin(request.headers):
                    raise Refused("Only ComfyUI's own pages may ask this.", 403)
                body = await read_body(request) if changes else {}
                async with self._free:
                    answer = await in_thread(action, body)
            except Refused as refused:
                return web.json_response({"error": str(refused)}, status=refused.status)
            except Exception as error:
                log.exception("%s %s failed", request.method, request.path)
                sentence = f"Hotpath could not answer because of {type(error).__name__}; the log of ComfyUI tells more."
                return web.json_response({"error": sentence}, status=500)
            return web.json_response(answer, headers={"Cache-Control": "no-store"})

        return handle


async def in_thread(action: Action, body: Body) -> Any:
    """What `action` returns or raises.

    In a thread of its own: the server sends its files with the event loop's, looking at libraries takes minutes, and a pool's
    threads would hold up the end of the process as long.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(action(body))
        except BaseException as error:  # whatever it is, the handler answers for it
            future.set_exception(error)

    future.set_running_or_notify_cancel()  # a client that leaves does not stop it
    threading.Thread(target=work, name="hotpath-panel", daemon=True).start()
    return await asyncio.wrap_future(future)


async def read_body(request: Any) -> Body:
    """The JSON object of a POST. Raises Refused."""
    from aiohttp import web

    if request.content_type != "application/json":
        raise Refused("The request must be JSON, with the content type application/json.", 415)
    if request.content_length is None or request.content_length > MAX_BODY:
        raise Refused(f"The request must say its length, and have {MAX_BODY} bytes at most.", 413)
    try:
        body = json.loads(await request.read())  # whatever encoding its headers name
    except (OSError, web.RequestPayloadError):  # a client that leaves
        raise Refused("The request did not come whole.") from None
    except (ValueError, RecursionError):
        raise Refused("The request is not JSON.") from None
    if not isinstance(body, dict):
        raise Refused("The request must be a JSON object.")
    return body


def text(body: Body, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise Refused(f"The request must name its {key}.")
    return value


def attach(server: Any, version: str) -> bool:
    """Add the routes to ComfyUI's PromptServer; False when another copy of the pack has done so."""
    table = server.routes
    if any(getattr(route, "path", "").startswith(f"{PREFIX}/") for route in table):
        log.warning("Another copy of Hotpath is loaded; the panel shows that one.")
        return False
    PanelRoutes(version).add_to(table)
    return True
