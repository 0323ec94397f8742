"""The panel's routes: what they tell, whom they answer, what they refuse; downloads that run, stop and fail."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hotpath import panel
from hotpath.cache import named_cache
from hotpath.host import known_models
from hotpath.host.downloads import DownloadError
from hotpath.host.known_models import HubRepository, KnownModel, WebFile, ZipMember
from hotpath.panel.downloads import DownloadDesk, Refused
from hotpath.panel.libraries import LibraryReport
from hotpath.panel.routes import MAX_BODY, THREADS, PanelRoutes

ARCHIVE = WebFile("https://example.com/pack.zip")
TABLE = (
    KnownModel("free", "one", "one", "sub/model.bin", WebFile("https://example.com/model.bin"), "MIT", "a file"),
    KnownModel("bound", "two", "two", "x.onnx", ZipMember(ARCHIVE, "x.onnx"), "no trade", "a", non_commercial=True),
    KnownModel("mate", "two", "two", "y.onnx", ZipMember(ARCHIVE, "y.onnx"), "no trade", "b", non_commercial=True),
    KnownModel("folder", "three", "LLM", "Tiny", HubRepository("a/Tiny"), "MIT", "a folder"),
)


@pytest.fixture
def table(monkeypatch, headless_host):
    """Four made-up models in place of the real table, and empty folders."""
    monkeypatch.setattr(known_models, "KNOWN_MODELS", TABLE)
    monkeypatch.setattr(sys.modules["hotpath.panel.overview"], "KNOWN_MODELS", TABLE)
    return headless_host


class Bringer:
    """Stands for the downloader: reports 10 of 100 bytes, then waits for a word and does as it says."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.word = threading.Event()
        self.reported = threading.Event()
        self.error: Exception | None = None

    def __call__(self, models: Any, host: Any, progress: Any) -> list[Path]:
        self.asked.append([m.name for m in models])
        progress(10, 100)
        self.reported.set()
        assert self.word.wait(120)
        if self.error is not None:
            raise self.error
        progress(100, 100)
        paths = [host.model_folders(m.kind)[0] / m.file for m in models]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return paths


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120  # a machine may be busy with other things
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def state(desk: DownloadDesk, name: str) -> dict[str, Any]:
    return next(entry for entry in desk.states() if entry["name"] == name)


@contextlib.asynccontextmanager
async def client_of(routes: PanelRoutes) -> AsyncIterator[TestClient]:
    """Of a real aiohttp server."""
    found = web.RouteTableDef()
    routes.add_to(found)
    app = web.Application()
    app.add_routes(found)
    async with TestClient(TestServer(app)) as client:
        yield client


def ask(routes: PanelRoutes, *requests: tuple[str, str, dict[str, Any]]) -> list[tuple[int, Any]]:
    """Status and JSON of each request."""

    async def run() -> list[tuple[int, Any]]:
        answers = []
        async with client_of(routes) as client:
            for method, path, options in requests:
                async with client.request(method, f"/hotpath/{path}", **options) as answer:
                    answers.append((answer.status, await answer.json()))
        return answers

    return asyncio.run(run())


def get(path: str, **options: Any) -> tuple[str, str, dict[str, Any]]:
    return "GET", path, options


def post(path: str, body: Any = None, **options: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", path, options if "data" in options else {"json": body if body is not None else {}, **options}


@pytest.fixture
def routes(table):
    bringer = Bringer()
    made = PanelRoutes("1.2.3", DownloadDesk(bringer), LibraryReport((sys.executable, "-c", "print('{}')")))
    yield made
    bringer.word.set()


def test_the_overview_tells_what_is_there_and_what_is_missing(routes, table):
    here = table.model_folders("one")[0] / "sub" / "model.bin"
    here.parent.mkdir(parents=True)
    here.write_bytes(b"x")
    broken = table.model_folders("LLM")[0] / "Tiny"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    ((status, found),) = ask(routes, get("overview"))
    assert status == 200
    assert found["versions"]["Hotpath"] == "1.2.3" and found["versions"]["torch"] == torch.__version__
    assert found["failed_families"] == {} and found["nodes"] > 20
    free, bound, _, folder = found["models"]
    assert free["found"] == str(here) and free["problem"] is None
    assert bound["found"] is None and bound["non_commercial"] and bound["licence"] == "no trade"
    assert bound["place"] == "models/two/x.onnx" and bound["free"] > 0 and bound["belongs"].endswith("x.onnx")
    assert folder["problem"] == "there are no weights (*.safetensors) in it."
    assert found["downloads"] == []


def test_a_model_may_be_a_link_to_another_disk(routes, table, tmp_path):
    elsewhere = tmp_path / "another disk"
    elsewhere.mkdir()
    (elsewhere / "model.bin").write_bytes(b"x")
    folder = table.model_folders("one")[0]
    folder.mkdir(parents=True)
    (folder / "sub").symlink_to(elsewhere)
    ((status, found),) = ask(routes, get("overview"))
    assert status == 200 and found["models"][0]["found"] == str(folder / "sub" / "model.bin")


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": "x"}}', b"[" * 100_000])
@pytest.mark.parametrize("index", [None, "[]", '{"weight_map": {"a": 1, "b": "c"}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_folder_is_told_and_the_rest_is_shown(routes, table, header, index):
    folder = table.model_folders("LLM")[0] / "Tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    ((status, found),) = ask(routes, get("overview"))
    assert status == 200 and "cannot be read" in found["models"][3]["problem"]


def test_a_disk_that_is_away(routes, monkeypatch):
    def away(_: Any) -> Any:
        raise FileNotFoundError("no such drive")

    monkeypatch.setattr("shutil.disk_usage", away)
    ((status, found),) = ask(routes, get("overview"))
    assert status == 200 and [model["free"] for model in found["models"]] == [None] * 4


def test_a_folder_is_read_again_only_when_it_changed(routes, table, monkeypatch):
    module = sys.modules["hotpath.panel.overview"]
    folder = table.model_folders("LLM")[0] / "Tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    read: list[Path] = []
    verify = module.verify
    monkeypatch.setattr(module, "verify", lambda path: (read.append(path), verify(path))[1])
    ask(routes, get("overview"), get("overview"))
    assert read == [folder]
    (folder / "model.safetensors").write_bytes(b"x")
    ((_, found),) = ask(routes, get("overview"))
    assert read == [folder, folder] and "model.safetensors" in found["models"][3]["problem"]


def test_caches_are_shown_and_cleared_by_name(routes):
    first, second = named_cache("panel test one", 1 << 20), named_cache("panel test two", 1 << 20)
    for cache in (first, second):
        cache.put("a", torch.zeros(256))
        cache.get("a")
        cache.get("b")
    (_, before), (status, cleared), (_, unknown), (_, everything) = ask(
        routes,
        get("caches"),
        post("caches/clear", {"name": "panel test one"}),
        post("caches/clear", {"name": "no such cache"}),
        post("caches/clear", {"name": None}),
    )
    shown = {entry["name"]: entry for entry in before["caches"]}["panel test one"]
    assert (shown["entries"], shown["nbytes"], shown["limit"], shown["hit_rate"]) == (1, 1024, 1 << 20, 0.5)
    assert status == 200 and cleared["cleared"] == 1
    assert {e["name"]: e["entries"] for e in cleared["caches"]}["panel test two"] == 1
    assert unknown["error"] == "There is no cache of that name."
    assert everything["cleared"] >= 1 and len(first) == len(second) == 0


def test_a_download_by_name_and_never_by_address(routes, table):
    bad = [
        {"model": "https://example.com/evil.bin"},
        {"model": "../free"},
        {"model": "FREE"},
        {"model": ""},
        {"model": 5},
        {"url": "https://example.com/evil.bin"},
        {},
    ]
    answers = ask(routes, *[post("downloads/start", body) for body in bad])
    assert [status for status, _ in answers] == [404, 404, 404, 400, 400, 400, 400]
    assert routes.desk._obtain.asked == []
    ((status, begun),) = ask(routes, post("downloads/start", {"model": "free", "url": "https://example.com/evil.bin"}))
    assert status == 200 and begun["name"] == "free" and begun["state"] in ("waiting", "running")
    routes.desk._obtain.word.set()
    until(lambda: state(routes.desk, "free")["state"] == "done")
    assert state(routes.desk, "free")["message"] == str(table.model_folders("one")[0] / "sub" / "model.bin")
    ((status, again),) = ask(routes, post("downloads/start", {"model": "free"}))
    assert status == 409 and "here already" in again["error"]


def test_a_licence_is_accepted_with_a_true_and_nothing_else(routes):
    answers = ask(
        routes,
        *[post("downloads/start", {"model": "bound", "accept_licence": v}) for v in (False, None, 1, "true")],
        post("downloads/start", {"model": "bound"}),
    )
    assert [status for status, _ in answers] == [403] * 5
    assert "may not be used commercially (no trade)" in answers[0][1]["error"]
    ((status, begun),) = ask(routes, post("downloads/start", {"model": "bound", "accept_licence": True}))
    assert status == 200 and begun["models"] == ["bound", "mate"]  # one archive, fetched once
    ((status, refused),) = ask(routes, post("downloads/start", {"model": "mate", "accept_licence": True}))
    assert status == 409 and "being downloaded already" in refused["error"]


def test_progress_and_stopping(routes):
    desk, bringer = routes.desk, routes.desk._obtain
    desk.start("free")
    desk.start("folder")
    assert bringer.reported.wait(120)
    running = state(desk, "free")
    assert (running["state"], running["done"], running["total"]) == ("running", 10, 100)
    (_, waiting), (_, stopping), (status, refused) = ask(
        routes,
        post("downloads/stop", {"model": "folder"}),
        post("downloads/stop", {"model": "free"}),
        post("downloads/stop", {"model": "mate"}),
    )
    assert waiting["state"] == "stopped" and stopping["state"] == "stopping"
    assert status == 409 and refused["error"] == "mate is not being downloaded."
    bringer.word.set()
    until(lambda: state(desk, "free")["state"] == "stopped")
    assert "goes on from there" in state(desk, "free")["message"]
    assert bringer.asked == [["free"]]  # what waited was never begun
    desk.start("free")  # and it can be asked for again
    until(lambda: state(desk, "free")["state"] == "done")
    ((status, refused),) = ask(routes, post("downloads/stop", {"model": "free"}))
    assert status == 409 and refused["error"] == "free is not being downloaded."


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DownloadError("The disk is full."), "The disk is full."),
        (PermissionError("no"), "because of PermissionError: no"),
    ],
)
def test_a_download_that_fails_says_why_and_the_next_one_runs(routes, error, sentence):
    desk, bringer = routes.desk, routes.desk._obtain
    bringer.error = error
    bringer.word.set()
    desk.start("free")
    until(lambda: state(desk, "free")["state"] == "failed")
    assert sentence in state(desk, "free")["message"]
    bringer.error = None
    desk.start("folder")
    until(lambda: state(desk, "folder")["state"] == "done")


def test_the_server_answers_while_a_disk_is_slow(routes):
    """A request that takes its time in a thread does not keep the next one waiting."""
    begun, release = threading.Event(), threading.Event()
    routes.reads["slow"] = lambda _: (begun.set(), {"slept": release.wait(120)})[1]

    async def run() -> bool:
        async with client_of(routes) as client:
            slow = asyncio.ensure_future(client.get("/hotpath/slow"))
            await asyncio.to_thread(begun.wait, 60)
            async with client.get("/hotpath/caches") as answer:
                assert answer.status == 200
            assert not slow.done()
            # Neither do many of them take the threads that the server sends its files with.
            more = [asyncio.ensure_future(client.get("/hotpath/slow")) for _ in range(40)]
            await asyncio.sleep(0.1)
            await asyncio.wait_for(asyncio.to_thread(int), 60)
            # Nor do they hold up the end of the process.
            waiting = [thread for thread in threading.enumerate() if thread.name == "hotpath-panel"]
            assert len(waiting) == THREADS and all(thread.daemon for thread in waiting)
            release.set()
            for one in more:
                (await one).release()
            return (await (await slow).json())["slept"]

    assert asyncio.run(run())


FOREIGN = {"Origin": "https://evil.example"}


def test_pages_of_other_sites_get_nothing(routes):
    answers = ask(
        routes,
        get("overview", headers=FOREIGN),
        post("caches/clear", {}, headers=FOREIGN),
        post("downloads/start", {"model": "free"}, headers={"Sec-Fetch-Site": "cross-site"}),
        post("downloads/start", {"model": "free"}, headers={"Sec-Fetch-Site": "same-site"}),
        post("downloads/start", {"model": "free"}, headers={"Origin": "null"}),
    )
    assert [status for status, _ in answers] == [403] * 5
    assert routes.desk.states() == []


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("caches/clear", data="name=x", headers={"Content-Type": "application/x-www-form-urlencoded"}), 415),
        (post("caches/clear", data='{"name": null}', headers={"Content-Type": "text/plain"}), 415),
        (post("caches/clear", data="{", headers={"Content-Type": "application/json"}), 400),
        (post("caches/clear", []), 400),
        (post("caches/clear", {"name": 3}), 400),
        (post("caches/clear", {"name": "x" * MAX_BODY}), 413),
        (post("caches/clear", data="[" * 4000, headers={"Content-Type": "application/json"}), 400),
        (post("caches/clear", data="{", headers={"Content-Type": "application/json; charset=nope"}), 400),
        (
            post("caches/clear", data="{}", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}),
            400,
        ),
    ],
)
def test_what_is_not_such_a_request(routes, request_, status):
    ((found, answer),) = ask(routes, request_)
    assert found == status and answer["error"].endswith(".")


def test_changes_are_never_made_by_get(routes):
    async def run() -> list[int]:
        async with client_of(routes) as client:
            return [(await client.get(f"/hotpath/{path}")).status for path in routes.changes]

    assert set(asyncio.run(run())) == {405}


def test_attention_backends_say_why_not(routes):
    ((status, found),) = ask(routes, get("libraries"))
    backends = {entry["name"]: entry for entry in found["attention"]}
    assert status == 200 and backends["sdpa"]["reason"] is None
    if not torch.cuda.is_available():
        assert "cuda" in backends["flash2"]["reason"]
    assert all(entry["what"] for entry in backends.values())


def test_unknown_names_are_refused_without_a_server(table):
    with pytest.raises(Refused) as refused:
        DownloadDesk(Bringer()).cancel("x")
    assert refused.value.status == 404


def test_two_copies_of_the_pack_share_one_panel(caplog):
    server = type("Server", (), {"routes": web.RouteTableDef()})
    assert panel.attach(server, "1")
    count = len(server.routes)
    assert not panel.attach(server, "1") and len(server.routes) == count
    assert "Another copy" in caplog.text


def test_an_answer_that_fails_is_a_sentence(routes):
    def fail(_: Any) -> Any:
        raise OSError("secret detail")

    routes.reads["overview"] = fail
    ((status, answer),) = ask(routes, get("overview"))
    assert status == 500 and "OSError" in answer["error"] and "secret" not in answer["error"]
