"""ComfyUI starts with every pack it has: importing this one is quick, light, and survives a broken family."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Seconds of the processor for this process, with torch and our own bytecode already there: neither a busy machine counts
# nor what a first start compiles. It takes a tenth of that here.
LIMIT = 1.0
HEAVY = (
    "accelerate",
    "cv2",
    "diffusers",
    "insightface",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "ray",
    "scenedetect",
    "skimage",
    "transformers",
)

# The way ComfyUI loads a custom node: by path, under a name made of the path, without the folder on sys.path.
LOAD = """
import gc, importlib.util, json, logging, sys, time
import torch
logging.basicConfig(format="%(message)s")
folder, heavy = sys.argv[1], sys.argv[2].split(",")
sys.pycache_prefix = sys.argv[3]  # after torch, which has its own
name = folder.replace(".", "_x_")
gc.disable()  # going over all that torch made is not the pack's cost
started = time.process_time()
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
ids = sorted(module.NODE_CLASS_MAPPINGS)
seconds = time.process_time() - started
assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(ids)
failed = sys.modules[name + ".nodes"].FAILED_FAMILIES
loaded = [h for h in heavy if h in sys.modules]
print(json.dumps({"seconds": seconds, "ids": ids, "failed": failed, "heavy": loaded}))
"""


def load(folder: Path, bytecode: Path) -> tuple[dict, str]:
    """What a fresh process finds, and what it logs. bytecode: folder that keeps what is compiled."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), ",".join(HEAVY), str(bytecode)],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def test_import_is_quick_and_light(tmp_path: Path):
    runs = [load(ROOT, tmp_path)[0] for _ in range(3)]
    best = min(run["seconds"] for run in runs)
    assert runs[0]["ids"], "no nodes"
    assert runs[0]["failed"] == {}
    assert runs[0]["heavy"] == [], "these wait until a node needs them"
    assert best < LIMIT, f"{best:.2f} s"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the pack in a folder whose name is no Python name, as users have it."""
    folder = tmp_path / "custom_nodes" / "comfyui-hotpath.main"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "tests", "demo", "docs", "benchmarks", "*.egg-info", "build")
    shutil.copytree(ROOT, folder, ignore=hidden)
    return folder


def add_family(copy: Path, name: str, source: str) -> None:
    """Write nodes/<name>.py into the copy and register it before the others."""
    (copy / "nodes" / f"{name}.py").write_text(source)
    families = copy / "nodes" / "__init__.py"
    text, start = families.read_text(), "FAMILIES: tuple[str, ...] = ("
    assert start in text
    families.write_text(text.replace(start, f"{start}{name!r}, "))


def test_a_broken_family_leaves_the_others(copy: Path, tmp_path: Path):
    whole, _ = load(copy, tmp_path / "bytecode")
    add_family(copy, "broken", "import a_library_that_is_not_installed\n")
    found, log = load(copy, tmp_path / "bytecode")
    assert found["ids"] == whole["ids"]
    assert list(found["failed"]) == ["broken"]
    assert "a_library_that_is_not_installed" in found["failed"]["broken"]
    said = [line for line in log.splitlines() if line.startswith("Hotpath:")]
    assert len(said) == 1 and "broken" in said[0] and "ModuleNotFoundError" in said[0]
    assert "Traceback (most recent call last)" in log
