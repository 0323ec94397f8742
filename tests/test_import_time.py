"""ComfyUI starts with every pack it has: importing this one is quick, light, and survives a broken family."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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

# The way ComfyUI loads a custom node: by path, under a name made of the path, without the folder on sys.path. Where a
# process can split, torch is imported once for all folders, and each of them by a process of its own.
LOAD = """
import gc, importlib.util, json, logging, os, sys, time
import torch
logging.basicConfig(format="%(message)s")
heavy = sys.argv[1].split(",")
sys.pycache_prefix = sys.argv[2]  # after torch, which has its own
gc.disable()  # going over all that torch made is not the pack's cost

def load(folder):
    name = folder.replace(".", "_x_")
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
    print(json.dumps({"seconds": seconds, "ids": ids, "failed": failed, "heavy": loaded}), flush=True)
    print("end of", folder, file=sys.stderr, flush=True)

first, *others = sys.argv[3:]
for folder in others:
    child = os.fork()
    if child == 0:
        first = folder
        break
    assert os.waitpid(child, 0)[1] == 0
load(first)
"""


def load(bytecode: Path, *folders: Path) -> list[tuple[dict, str]]:
    """What fresh processes find in each of `folders`, and what they log. bytecode: folder that keeps what is compiled."""
    if len(folders) > 1 and not hasattr(os, "fork"):
        return [found for folder in folders for found in load(bytecode, folder)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    last_comes_first = [str(folder) for folder in (folders[-1], *folders[:-1])]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, ",".join(HEAVY), str(bytecode), *last_comes_first],
        capture_output=True,
        text=True,
        cwd=bytecode.parent,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = re.split(r"^end of .*\n", done.stderr, flags=re.MULTILINE)
    return [(json.loads(line), log) for line, log in zip(done.stdout.splitlines(), logs[:-1], strict=True)]


def test_import_is_quick_and_light(tmp_path: Path):
    runs = [found for found, _ in load(tmp_path / "bytecode", ROOT, ROOT)]
    best = min(run["seconds"] for run in runs)
    assert runs[0]["ids"], "no nodes"
    assert runs[0]["failed"] == {}
    assert runs[0]["heavy"] == [], "these wait until a node needs them"
    assert best < LIMIT, f"{best:.2f} s"


def copy_to(parent: Path) -> Path:
    """A copy of the pack in a folder whose name is no Python name, as users have it."""
    folder = parent / "custom_nodes" / "comfyui-hotpath.main"
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


def test_a_broken_family_leaves_the_others(tmp_path: Path):
    as_it_is, broken = copy_to(tmp_path / "a"), copy_to(tmp_path / "b")
    add_family(broken, "broken", "import a_library_that_is_not_installed\n")
    bare = copy_to(tmp_path / "c")
    for name in ("first", "second"):
        add_family(bare, name, "raise ModuleNotFoundError('no yaml', name='yaml.loader')\n")
    (whole, _), (found, log), (without, advice) = load(tmp_path / "bytecode", as_it_is, broken, bare)
    assert whole["failed"] == {}
    assert found["ids"] == whole["ids"]
    assert list(found["failed"]) == ["broken"]
    assert "a_library_that_is_not_installed" in found["failed"]["broken"]
    said = [line for line in log.splitlines() if line.startswith("Hotpath:")]
    assert len(said) == 1 and "broken" in said[0] and "ModuleNotFoundError" in said[0]
    assert "Traceback (most recent call last)" in log

    # What is required and not installed is said once, with the command that installs it for this Python.
    assert without["ids"] == whole["ids"] and set(without["failed"]) == {"first", "second"}
    command = f'"{sys.executable}" -m pip install -r "{bare / "requirements.txt"}"'
    assert without["failed"]["first"] == f"pyyaml is not installed: {command}"
    said = [line for line in advice.splitlines() if line]
    assert len(said) == 1 and "2 of" in said[0] and f"because pyyaml is not installed. Run {command} and" in said[0]
