"""The package as it is installed: what is listed, what the wheel holds, what it asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from checkout_files import files
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "build", "dist", "benchmarks", "docs", "demo_output"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def requirement_name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", line)
    assert match is not None, line
    return match[0].lower().replace("_", "-")


def requirements() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line]


def test_every_folder_with_code_is_packaged(project):
    found = {"hotpath"}
    for init in files("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if not parts or parts[0] in NOT_SHIPPED or any(part.startswith(".") for part in parts):
            continue
        if parts[:2] != ("demo", "comfy_nodes"):  # custom nodes for the demo's ComfyUI: data, as the pack sees it
            found.add(".".join(["hotpath", *parts]))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_requirements_are_the_dependencies_without_torch(project):
    wanted = [d for d in project["project"]["dependencies"] if requirement_name(d) not in ("torch", "torchvision")]
    assert sorted(requirements()) == sorted(wanted)


def test_torch_is_new_enough_for_the_names_that_are_used(project):
    from hotpath.commands import doctor

    (line,) = (d for d in project["project"]["dependencies"] if requirement_name(d) == "torch")
    assert not Requirement(line).specifier.contains("2.4.1")  # which lacks torch.OutOfMemoryError
    assert line == doctor.TORCH  # requirements.txt does not name torch, so the doctor does


def test_comfyui_manager_is_never_asked_for_torch_or_an_onnxruntime():
    names = {requirement_name(line) for line in requirements()}
    assert not names & {"torch", "torchvision", "torchaudio", "xformers"}
    assert not [name for name in names if name.startswith("onnxruntime")]
    # insightface brings one flavour of onnxruntime with it.
    assert "insightface" not in names


def test_no_extra_brings_two_flavours_of_onnxruntime(project):
    for name, lines in project["project"]["optional-dependencies"].items():
        names = map(requirement_name, lines)
        # insightface brings the plain flavour with it.
        flavours = {
            "onnxruntime" if n == "insightface" else n for n in names if n.startswith(("onnxruntime", "insightface"))
        }
        assert len(flavours) <= 1, name


def test_versions_are_in_step(project):
    import hotpath

    version = project["project"]["version"]
    assert hotpath.__version__ == version
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None, "CHANGELOG.md has no section '## <version>'"
    assert newest[1] == version


def test_registry_fields(project):
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert project["project"]["urls"]["Repository"].startswith("https://")
    assert (ROOT / project["project"]["license-files"][0]).is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy, as setuptools would leave its build folder in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "demo_output")
    shutil.copytree(ROOT, work / "checkout", ignore=hidden)
    # In this environment: making one for the build would need a network. setuptools 77 is in the extra "dev".
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(work)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=work / "checkout", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    (archive,) = work.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        return opened.namelist()


def files_below(folder: str) -> set[str]:
    """Tracked-looking files below a folder of the checkout, as the wheel names them."""
    return {
        f"hotpath/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_wheel_holds_code_and_data(wheel):
    names = set(wheel)
    assert {"hotpath/__init__.py", "hotpath/nodes/__init__.py", "hotpath/headless/executor.py"} <= names
    for folder in ("web", "locales", "example_workflows", "demo/inputs", "demo/models", "demo/comfy_nodes"):
        missing = files_below(folder) - names
        assert not missing, f"package-data in pyproject.toml leaves out {sorted(missing)[:5]}"


def test_the_wheel_leaves_out_tests_and_tools(wheel):
    assert not [n for n in wheel if n.startswith(("hotpath/tests", "tests", "hotpath/benchmarks", "hotpath/build"))]
    assert not [n for n in wheel if "__pycache__" in n]


def test_the_console_script_points_at_a_function(project):
    from hotpath import cli

    module, _, name = project["project"]["scripts"]["hotpath"].partition(":")
    assert module == "hotpath.cli"
    assert callable(getattr(cli, name))
