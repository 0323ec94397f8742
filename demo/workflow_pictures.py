"""Pictures that the example workflows of InstantID make in a real ComfyUI on the demo's portrait model."""

from __future__ import annotations

import atexit
import contextlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from .picture_rows import labelled, stacked

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "example_workflows" / "api"
HEIGHT = 152


@cache
def _server() -> Any:
    """A ComfyUI with the demo's nodes and models, until this process ends."""
    from ..headless.launcher import LaunchOptions, launched
    from ..headless.locate import find_comfyui

    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("These pictures are sampled, which needs a ComfyUI: name one in COMFYUI_PATH.")
    options = LaunchOptions(
        input_folder=HERE / "inputs",
        models=HERE / "models",
        custom_nodes=[HERE / "comfy_nodes" / "hotpath_demo"],
        isolated=True,
        arguments=["--cpu"],
        environment={"OMP_NUM_THREADS": "1"},  # small layers: more threads would only wait for each other
    )
    open_until_the_end = contextlib.ExitStack()
    atexit.register(open_until_the_end.close)
    return open_until_the_end.enter_context(launched(comfyui, options))


@cache
def made(name: str, *changes: str) -> dict[str, Image.Image]:
    """The pictures that the example `name` makes, by the beginning of each file's name; what else it makes is not kept.

    changes: "node.input=value" or "Class.input=value", as `hotpath run --set` takes them.
    """
    from ..headless.graph import Graph
    from ..headless.server import run_on_server
    from ..headless.stand_ins import StandIns

    graph = StandIns.read(HERE / "stand_ins.json").apply(Graph.load(EXAMPLES / f"{name}.api.json"))
    for change in changes:
        graph.set_input(change)
    with tempfile.TemporaryDirectory() as work:
        files = run_on_server(_server().url, graph, Path(work)).files
        return {f.path.name.rsplit("_", 2)[0]: Image.open(f.path).convert("RGB") for f in files if f.kind == "image"}


def sampled(name: str, *changes: str) -> Image.Image:
    """What the example saves first, previews aside."""
    return next(image for file, image in made(name, *changes).items() if not file.startswith("ComfyUI_temp"))


def sized(image: Image.Image, height: int = HEIGHT) -> Image.Image:
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)


def given(name: str) -> Image.Image:
    return Image.open(HERE / "inputs" / f"{name}.png").convert("RGB")


def instantid_weights() -> Image.Image:
    """Two people, a weight to a column; same seed, same words, same pose."""
    rows = []
    for person in ("portrait_ana", "portrait_ben"):
        row = [("given", sized(given(person)))]
        for weight in (0.0, 0.4, 0.8):
            shown = sampled("instantid_identity", f"LoadImage.image={person}.png", f"HotpathInstantID.weight={weight}")
            row.append((f"weight {weight:g}", sized(shown)))
        rows.append(labelled(row))
    return stacked(rows)
