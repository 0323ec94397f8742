"""What the tests of servers share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from stand_in_comfyui import standing_in


@pytest.fixture
def stand_in():
    with standing_in() as server:
        yield server


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "in" / "a.png")
    return tmp_path / "in"
