"""The example workflows: their twins in API format, and a ComfyUI with the demo's small models to run them in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ui_workflows import to_prompt

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))
SUFFIX = ".api.json"


def twin_path(path: Path) -> Path:
    return FOLDER / "api" / f"{path.stem}{SUFFIX}"


def twin_of(path: Path, object_info: dict[str, Any]) -> dict[str, Any]:
    """The workflow in API format, titles in `_meta` as the front end writes them."""
    workflow = json.loads(path.read_text("utf-8"))
    titles = {str(node["id"]): node["title"] for node in workflow["nodes"] if node.get("title")}
    prompt = to_prompt(workflow, object_info)
    for node_id, entry in prompt.items():
        if title := titles.get(node_id):
            entry["_meta"] = {"title": title}
    return prompt


@contextlib.contextmanager
def demo_server(comfyui: Path, work: Path, *nodes: Path) -> Iterator[Any]:
    """A ComfyUI with the demo's models, and a small Z-Image of random weights, which the demo lacks.

    work: its files come to lie there, in models and input. nodes: more custom nodes.
    """
    from hotpath.demo.z_image_model import write_checkpoint
    from hotpath.headless.launcher import LaunchOptions, launched

    models = work / "models"
    shutil.copytree(ROOT / "demo" / "models", models)
    for kind in ("checkpoints", "controlnet"):  # so that files which come later are found
        (models / kind).mkdir()
    write_checkpoint(models / "diffusers" / "Z-Image-Turbo")
    shutil.copytree(ROOT / "demo" / "inputs", work / "input")
    options = LaunchOptions(
        input_folder=work / "input",
        models=models,
        custom_nodes=[ROOT / "demo" / "comfy_nodes" / "hotpath_demo", *nodes],
        isolated=True,
        arguments=["--cpu"],
        environment={"OMP_NUM_THREADS": "1"},
    )
    with launched(comfyui, options) as running:
        yield running


def run_example(server: Any, path: Path, output: Path) -> Any:
    """The outcome of the twin of `path`, with the demo's small models in place of the large ones."""
    from hotpath.headless.graph import Graph
    from hotpath.headless.server import run_on_server
    from hotpath.headless.stand_ins import StandIns

    small = StandIns.read(ROOT / "demo" / "stand_ins.json")
    # That it runs needs fewer steps than a picture to look at; what is drawn is test_portraits' matter.
    small = dataclasses.replace(small, values={**small.values, "KSampler.steps": 3})
    graph = small.apply(Graph.load(twin_path(path)))
    return run_on_server(server.url, graph, output)


def get(server: Any, path: str) -> Any:
    with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as answer:
        return json.load(answer)
