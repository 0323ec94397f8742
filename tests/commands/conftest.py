"""A folder to give commands in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hotpath.headless import locate
from PIL import Image

COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
}
SAMPLE = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 2], "filename_prefix": "copy"}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture and two workflows, and no ComfyUI to be found."""
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "copy.json").write_text(json.dumps(COPY))
    (tmp_path / "sample.json").write_text(json.dumps(SAMPLE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(locate, "is_comfyui", lambda folder: (Path(folder) / "is_comfyui").is_file())
    return tmp_path
