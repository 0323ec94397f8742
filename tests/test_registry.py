"""What ComfyUI's registry asks of a pack: its fields, its pictures, what is shipped, and its security standards."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout_files import files
from PIL import Image

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RAW = "https://raw.githubusercontent.com/hotpath-nodes/comfyui-hotpath/main/"
# The registry reads these words and no others; a wrong one voids all of its kind.
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
NOT_SHIPPED = ("tests", "benchmarks", "demo_output", "build", "dist")
# Modules that start a process: a ComfyUI for a run, workers, and a look at a library that may crash.
MAY_START_PROCESSES = {"headless/launcher.py", "distributed/local_pool.py", "panel/libraries.py"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def shipped() -> list[Path]:
    return [path for path in files("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", *NOT_SHIPPED))]


def test_the_fields_are_complete(project):
    comfy, urls = project["tool"]["comfy"], project["project"]["urls"]
    for field in ("PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"):
        assert comfy[field], field
    for field in ("Repository", "Documentation", "Bug Tracker"):
        assert urls[field].startswith("https://"), field
    name = project["project"]["name"]
    assert len(name) < 100 and re.fullmatch(r"[a-z][a-z0-9-]*", name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert len(project["project"]["description"]) <= 200
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"]), "major.minor.patch, or it is not read"


def test_classifiers_are_those_the_registry_reads(project):
    classifiers = project["project"]["classifiers"]
    systems = [c.removeprefix("Operating System :: ") for c in classifiers if c.startswith("Operating System")]
    assert systems and all(s.startswith(("Microsoft", "POSIX", "MacOS", "OS Independent")) for s in systems)
    cards = [c.removeprefix("Environment :: ") for c in classifiers if c.startswith("Environment ::")]
    assert set(cards) <= ACCELERATORS


@pytest.mark.parametrize(("field", "shape"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_icon_and_banner(project, field, shape):
    address = project["tool"]["comfy"][field]
    assert address.startswith(RAW)
    with Image.open(ROOT / address.removeprefix(RAW)) as picture:
        assert abs(picture.width / picture.height - shape[0] / shape[1]) < 0.01
        assert field != "Icon" or picture.width <= 400, "at most 400x400"


def test_the_archive_leaves_out_tests_and_benchmarks():
    ignored = [line for line in (ROOT / ".comfyignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert {"tests/", "benchmarks/"} <= set(ignored)
    for needed in (
        "web/docs/HotpathVLM.md",
        "locales/zh/main.json",
        "demo/models/x",
        "nodes/cache.py",
        "requirements.txt",
    ):
        assert not any(fnmatch.fnmatch(needed, f"{i}*" if i.endswith("/") else i) for i in ignored), needed


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_security_standards(path):
    """No eval or exec, no shell, nothing installed at run time, no pickle read, no hidden code."""
    source = path.read_text("utf-8")
    for name, call in calls(ast.parse(source)):
        where = f"line {call.lineno}: {name}"
        assert name not in ("eval", "exec", "compile", "__import__"), where
        assert name not in ("os.system", "os.popen", "os.execv", "os.spawnv", "pty.spawn", "runpy.run_path"), where
        assert name not in ("pickle.load", "pickle.loads", "marshal.loads", "dill.load"), where
        keywords = {k.arg: k.value for k in call.keywords}
        assert not isinstance(keywords.get("shell"), ast.Constant) or not keywords["shell"].value, where
        if name == "torch.load":
            assert getattr(keywords.get("weights_only"), "value", False) is True, where
        if name.startswith("subprocess."):
            assert path.relative_to(ROOT).as_posix() in MAY_START_PROCESSES, where
            assert "pip" not in ast.unparse(call), where
    assert not re.search(r"[A-Za-z0-9+/=]{400,}", source), "a long block of encoded data"


def test_importing_the_nodes_starts_nothing():
    """ComfyUI imports every pack at its start: no process, no network, no heavy library."""
    code = (
        "import sys, socket, subprocess\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest, torch\n"  # torch may start ldconfig
        "def refuse(*a, **k): raise AssertionError('not at import')\n"
        "subprocess.Popen.__init__ = refuse; socket.socket.connect = refuse\n"
        "import hotpath; hotpath.NODE_CLASS_MAPPINGS\n"
        "heavy = {'transformers', 'diffusers', 'onnxruntime', 'insightface', 'cv2', 'ray'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_are_pinned_and_ask_for_little(path):
    text = path.read_text("utf-8")
    data = yaml.safe_load(text)
    assert data["permissions"] == {"contents": "read"}
    for used in re.findall(r"uses: (\S+)", text):
        assert re.search(r"@v\d+(\.\d+)*$", used), f"{used} is not pinned to a version"
    for name, job in data["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        assert job.get("permissions", {"contents": "read"}) == {"contents": "read"}, name
    assert text.count("actions/checkout") == text.count("persist-credentials: false")


def test_nobody_is_told_to_install_the_pack_from_a_package_index():
    """It is published in ComfyUI's registry alone; a cure names the packages themselves."""
    pages = [*shipped(), *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/**/*.md"), ROOT / "README.md"]
    told = [p.relative_to(ROOT).as_posix() for p in pages if re.search(r"comfyui-hotpath\[", p.read_text("utf-8"))]
    assert not told, told
