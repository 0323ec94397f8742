"""Lets tests say `import hotpath` in a bare checkout, whatever its folder is called, and finds a real ComfyUI."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Workers share the cores, and so do the processes they start; torch's own threads would only wait for each other.
# Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Python goes through its objects to find what is lost, and there are millions of them here: a sixth of all time. Tests that
# count what is held ask for it themselves.
gc.set_threshold(100_000, 20, 100)

# Of each graph that is compiled torch writes a trace for whoever collects it, which takes as long as compiling. pytest
# collects every log.
TRACES = logging.getLogger("torch.__trace")
TRACES.handlers.clear()
TRACES.addHandler = lambda handler: None  # type: ignore[method-assign]

ROOT = Path(__file__).resolve().parent.parent


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else the folders above the checkout (custom_nodes/ lies in one), else ~/ComfyUI."""
    if configured := os.environ.get("COMFYUI_PATH"):
        return Path(configured) if (Path(configured) / "comfy_api").is_dir() else None
    # Also by the path pytest was given: custom_nodes/<pack> is often a symlink.
    places = [*ROOT.parents, *Path(__file__).absolute().parents, Path.home() / "ComfyUI"]
    return next((p for p in places if (p / "comfy_api").is_dir()), None)


COMFYUI = find_comfyui()

# `python -m pytest` puts the checkout first on the path, where its `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]


def _controls() -> bool:
    """Whether this is xdist's controller. It runs no test, and the workers start when it is ready."""
    if "PYTEST_XDIST_WORKER" in os.environ or "-n" not in sys.argv:
        return False
    return sys.argv[sys.argv.index("-n") + 1 :][:1] not in ([], ["0"])


def _prepare() -> None:
    """torch, ComfyUI, the pack as `hotpath`, and the demo's ComfyUI nodes (a tiny SDXL and what goes with it)."""
    import torch

    torch.set_num_threads(1)
    if os.environ.get("HOTPATH_SIMULATED_CARD"):
        sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
        import simulated_card

        simulated_card.install()
    if COMFYUI is not None:
        sys.path.insert(0, str(COMFYUI))
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
    _load("hotpath", ROOT)
    if COMFYUI is not None:
        _load("hotpath_demo", ROOT / "demo" / "comfy_nodes" / "hotpath_demo")


def _load(name: str, folder: Path) -> None:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


# Where the pack is not installed, the folders' own conftest.py need it of the controller too.
if not _controls() or importlib.util.find_spec("hotpath") is None:
    _prepare()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what importing made stays for good


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="tests marked `long` as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="long: runs with --all (`make test-all`)")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
    if COMFYUI is None:
        skip = pytest.mark.skip(reason="no ComfyUI checkout: set COMFYUI_PATH, or put one at ~/ComfyUI")
        for item in items:
            if item.get_closest_marker("comfy"):
                item.add_marker(skip)


@pytest.fixture
def comfyui_path() -> Path:
    assert COMFYUI is not None
    return COMFYUI


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `demo_comfyui` has its models and input."""
    return tmp_path_factory.mktemp("demo_comfyui")


@pytest.fixture(scope="session")
def demo_comfyui(demo_folder: Path) -> Iterator[Any]:
    """A ComfyUI with the demo's models and the nodes of server_nodes.py, for the tests of the group "demo_comfyui": a start
    takes half a minute."""
    from example_workflows import demo_server

    assert COMFYUI is not None
    with demo_server(COMFYUI, demo_folder, Path(__file__).resolve().parent / "support" / "server_nodes.py") as running:
        yield running


@pytest.fixture
def own_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind of block is compiled yet, for a test that counts; those that others compiled are there again after it."""
    from collections import OrderedDict

    from hotpath.patches.compilation import regional

    monkeypatch.setattr(regional, "_kinds", OrderedDict())


@pytest.fixture
def headless_host(tmp_path: Path):
    """A headless host over empty folders, current for the test."""
    from hotpath import host
    from hotpath.host.headless import HeadlessHost

    mine = HeadlessHost(
        models=tmp_path / "models",
        input_folder=tmp_path / "input",
        output_folder=tmp_path / "output",
        device="cuda" if os.environ.get("HOTPATH_SIMULATED_CARD") else "cpu",
        show_progress=False,
    )
    mine._cache = tmp_path / "cache"
    before = host.use(mine)
    yield mine
    host.use(before)


@pytest.fixture(scope="session")
def colorizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with small ColorMNet and Deep Exemplar weights, which no test changes."""
    from tiny_colorizers import save_models

    return save_models(tmp_path_factory.mktemp("colorizers"))


@pytest.fixture
def colour_host(colorizer_files: Path, headless_host, monkeypatch: pytest.MonkeyPatch):
    """`headless_host` with `colorizer_files`, in one thread, as the networks are too small for two."""
    import torch

    monkeypatch.setattr(headless_host, "_models", [colorizer_files])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield headless_host
    torch.set_num_threads(threads)
