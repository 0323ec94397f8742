"""What the tests of servers share."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from PIL import Image
from stand_in_comfyui import StandIn


@pytest.fixture
def stand_in():
    server = StandIn()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    assert server.ready.wait(60)
    yield server
    server.loop.call_soon_threadsafe(server.stop.set)
    thread.join(10)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "in" / "a.png")
    return tmp_path / "in"
