"""`hotpath compare` end to end: a grid of a workflow's two settings, rendered by a real ComfyUI on the tiny SDXL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from example_workflows import FOLDER, ROOT, twin_path

pytestmark = [pytest.mark.comfy, pytest.mark.xdist_group("demo_comfyui")]
NAME = "instantid_identity"


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An example workflow on the demo's small models, as somebody exports his own."""
    from hotpath.headless.graph import Graph
    from hotpath.headless.stand_ins import StandIns

    graph = StandIns.read(ROOT / "demo" / "stand_ins.json").apply(Graph.load(twin_path(FOLDER / f"{NAME}.json")))
    for change in ("KSampler.steps=1", "EmptyLatentImage.width=128", "EmptyLatentImage.height=128"):
        graph.set_input(change)
    path = tmp_path_factory.mktemp("workflow") / "person.api.json"
    path.write_text(json.dumps(graph.prompt()))
    return path


@pytest.mark.long
def test_a_grid_in_two_settings(
    demo_comfyui: Any, workflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hotpath import cli
    from hotpath.headless.graph import Graph
    from hotpath.headless.server import run_on_server
    from skimage.metrics import structural_similarity

    out = tmp_path / "out"
    options = [
        "--server",
        demo_comfyui.url,
        "--seeds",
        "1,2",
        "--weights",
        "0.5,0.9",
        "--min-ssim",
        "0.0",
        "--min-cosine",
        "-1",
        "-q",
    ]
    options += ["--models", str(ROOT / "demo" / "models"), "-o", str(out), "--device", "cpu"]
    # 0 or 1: whether fewer blocks still draw a face that is found and alike is the model's matter.
    assert cli.main(["compare", str(workflow), "--set-b", "HotpathInstantID.patch_mode=fast", *options]) in (0, 1)
    data = json.loads((out / "results.json").read_text())
    assert [(p["seed"], p["weight"]) for p in data["pairs"]] == [(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)]
    assert "4 pairs" in capsys.readouterr().out and "Faces: antelopev2." in data["notes"]
    assert (out / "index.html").read_text().count("<article") == 4

    # The same two pictures, rendered and compared without any of this.
    pixels = []
    for mode in ("full", "fast"):
        graph = Graph.load(workflow)
        for change in (f"HotpathInstantID.patch_mode={mode}", "HotpathInstantID.weight=0.9", "KSampler.seed=2"):
            graph.set_input(change)
        (file,) = [f for f in run_on_server(demo_comfyui.url, graph, tmp_path / mode).files if f.kind == "image"]
        pixels.append(np.asarray(Image.open(file.path).convert("RGB"), np.float64) / 255)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(*pixels, channel_axis=-1, data_range=1.0, **options)
    assert data["pairs"][3]["ssim"] == pytest.approx(float(expected), abs=1e-6) and expected < 1
    assert data["pairs"][3]["max_difference"] == pytest.approx(np.abs(pixels[0] - pixels[1]).max(), abs=1e-6)
    saved = np.asarray(Image.open(out / data["pairs"][3]["files"]["b"]), np.float64) / 255
    assert np.array_equal(saved, pixels[1])


def test_a_failure_on_the_server_is_told_and_keeps_what_was_done(
    demo_comfyui: Any, workflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hotpath import cli

    change = ["--set-b", "HotpathInstantID.custom_blocks=output.9", "--set", "HotpathInstantID.patch_mode=custom"]
    change += [
        "--set-a",
        "HotpathInstantID.custom_blocks=output.1",
        "--server",
        demo_comfyui.url,
        "--faces",
        "off",
        "-q",
    ]
    assert cli.main(["compare", str(workflow), *change, "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "'output.9' names no SDXL block" in said.err
    assert "Not all was rendered" in json.loads((tmp_path / "out" / "results.json").read_text())["notes"][-1]
