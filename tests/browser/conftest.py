"""A real ComfyUI with this pack, and a headless Chromium on it. Without either, these tests are skipped."""

from __future__ import annotations

import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest_paths import COMFYUI
from front_end import FrontEnd

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FRONT_END = os.environ.get("HOTPATH_FRONT_END")  # a folder with another front end, its `static`
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")


def chromium() -> str | None:
    """HOTPATH_CHROMIUM, else the first browser of this kind on the path."""
    return os.environ.get("HOTPATH_CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class SlowHub(BaseHTTPRequestHandler):
    """Stands for the hub: every file is 64 MB, of which a little comes at a time, until `closing` is set."""

    SIZE = 64_000_000
    closing = threading.Event()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.SIZE))
        self.send_header("ETag", '"' + "0" * 64 + '"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        try:
            for _ in range(self.SIZE // 1_000_000):
                self.wfile.write(bytes(1_000_000))
                if self.closing.wait(0.05):
                    return
        except OSError:  # the other side has stopped the download
            return

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="session")
def hub() -> Iterator[str]:
    web = ThreadingHTTPServer(("127.0.0.1", 0), SlowHub)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    SlowHub.closing.set()
    web.shutdown()
    web.server_close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, hub: str) -> Iterator[Any]:
    from hotpath.headless.launcher import LaunchOptions, launched

    work = tmp_path_factory.mktemp("front_end")
    shutil.copytree(ROOT / "demo" / "models", work / "models")  # downloads are written there
    options = LaunchOptions(
        input_folder=ROOT / "demo" / "inputs",
        models=work / "models",
        custom_nodes=[ROOT / "demo" / "comfy_nodes" / "hotpath_demo"],
        isolated=True,
        arguments=["--cpu", *(("--front-end-root", FRONT_END) if FRONT_END else ())],
        # No download of a test may reach the real hub.
        environment={"OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub, "no_proxy": "127.0.0.1"},
    )
    with launched(COMFYUI, options) as running:
        # Otherwise a first visit opens the templates.
        seen = urllib.request.Request(f"{running.url}/settings/Comfy.TutorialCompleted", b"true")
        urllib.request.urlopen(seen, timeout=30).close()
        yield running


@pytest.fixture(scope="module")
def front_end(request: pytest.FixtureRequest) -> Iterator[FrontEnd]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    browser_path = chromium()
    if browser_path is None:
        pytest.skip("no Chromium: apt install chromium, or name one in HOTPATH_CHROMIUM")
    server = request.getfixturevalue("server")  # started only now that there is something to look at it with
    shots = Path(folder) if (folder := os.environ.get("HOTPATH_SCREENSHOTS")) else None
    # Closed with the module: while it is open no other test of this process could run an event loop.
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        made = FrontEnd(page, server.url, shots)
        made.open()
        yield made
        browser.close()
