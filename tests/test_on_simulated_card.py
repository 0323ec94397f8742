"""What runs on CUDA, on a simulated card: in a process of its own, which has to be told before torch is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent / "on_simulated_card"


LANGUAGE = (
    "test_answers.py",
    "test_fused_decode.py",
    "test_mixed_models.py",
    "test_packed_weights.py",
    "test_prefill.py",
    "test_tower.py",
)
REST = tuple(sorted(path.name for path in HERE.glob("test_*.py") if path.name not in LANGUAGE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real card")
@pytest.mark.parametrize("files", [LANGUAGE, REST], ids=["language", "rest"])  # workers share them
def test_on_simulated_card(files: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if request.config.getoption("--all"):
        command.append("--all")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        command, env={**environment, "HOTPATH_SIMULATED_CARD": "1"}, capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
