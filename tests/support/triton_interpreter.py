"""Triton kernels without a card, in a process of their own: whether Triton interprets is settled when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_apart(script: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`script` with `folders` as its arguments and `variables` in its environment, and what it printed."""
    pytest.importorskip("triton")
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def interpret(script: str, *folders: Path) -> None:
    """Run `script` with kernels interpreted; it ends by printing "equal" when all it compared was."""
    result = run_apart("import quick_interpreter\nquick_interpreter.hurry()\n" + script, *folders, TRITON_INTERPRET="1")
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr[-3000:]
