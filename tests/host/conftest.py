"""Hosts to test, ComfyUI's and each of the two in turn; and a server of model files."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hosted import KIND
from hotpath.host import Host, downloads
from hotpath.host.headless import HeadlessHost
from model_server import CONTENT, Handler


@pytest.fixture
def comfy_host() -> Any:
    from hotpath.host.comfyui import ComfyUIHost

    return ComfyUIHost()


@pytest.fixture
def comfy_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's folder_paths over an empty models folder, with nothing known of our kind."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop(KIND, None)
    return folder_paths


@pytest.fixture(params=["headless", pytest.param("comfyui", marks=pytest.mark.comfy)])
def either_host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    if request.param == "headless":
        return HeadlessHost(models=tmp_path / "models", device="cpu", show_progress=False)
    request.getfixturevalue("comfy_folders")
    return request.getfixturevalue("comfy_host")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts of a download."""
    monkeypatch.setattr(downloads, "PAUSE", 0)


@pytest.fixture
def server():
    Handler.files, Handler.behaviour, Handler.requests = {"/model.bin": CONTENT}, {}, []
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()
