"""The colour benchmark runs by itself, on small networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "colorization.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_both_methods_give_a_row_and_what_ran() -> None:
    done = run("--tiny", "--long", "10")
    assert done.returncode == 0, done.stderr[-2000:]
    for method in ("ColorMNet", "Deep Exemplar"):
        (row,) = (line for line in done.stdout.splitlines() if line.startswith(f"| {method} |"))
        film, alone = (float(cell) for cell in row.split("|")[4:6])
        assert film > 0 and alone > 0 and "ms per frame by tenths" in row
    assert "CUDA graph of the decoder" in done.stdout and "match: " in done.stdout


@pytest.mark.long
def test_nothing_begins_after_its_time_and_it_says_so() -> None:
    done = run("--tiny", "--seconds", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Left out after 0 seconds: ColorMNet 112x112 Hotpath float32" in done.stdout
