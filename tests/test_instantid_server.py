"""InstantID end to end: a real ComfyUI server, its API prompt queue, a tiny SDXL, and the workflows people share."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from ui_workflows import to_prompt

pytestmark = [pytest.mark.comfy, pytest.mark.xdist_group("demo_comfyui")]

HERE = Path(__file__).resolve().parent
SHARED = sorted((HERE / "data" / "workflows").glob("InstantID_*.json"))


@pytest.fixture(scope="module")
def server(demo_comfyui: Any, demo_folder: Path) -> Any:
    """With models and pictures for these tests, which are files like those that come while a server runs."""
    from hotpath_demo import tiny_sdxl

    models, inputs = demo_folder / "models", demo_folder / "input"
    # Only the names matter for files that the shared workflows load: they are validated, not run.
    for name in (
        "checkpoints/sdxl/AlbedoBaseXL.safetensors",
        "controlnet/instantid/diffusion_pytorch_model.safetensors",
    ):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    state = tiny_sdxl.make_adapter_state(dim=64)
    flat = {f"{part}.{key}": value for part, weights in state.items() for key, value in weights.items()}
    save_file(flat, models / "instantid" / "tiny.safetensors")
    shutil.copy(models / "instantid" / "tiny.safetensors", models / "instantid" / "ip-adapter.bin")
    save_file(
        {"controlnet_cond_embedding.conv_in.weight": flat["image_proj.proj_in.bias"]},
        models / "instantid" / "wrong.safetensors",
    )
    noise = np.random.default_rng(1).integers(0, 255, (96, 80, 3), np.uint8)
    for name in ("face.png", "joseph-gonzalez-iFgRcqHznqg-unsplash.jpg", "miranda.jpg"):
        Image.fromarray(noise).save(inputs / name)
    Image.new("RGB", (64, 64)).save(inputs / "nobody.png")
    return demo_comfyui


def get(server: Any, path: str) -> Any:
    with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as answer:
        return json.load(answer)


def graph(**changes: Any) -> dict[str, Any]:
    """Apply InstantID by API, changed inputs by "node.input"."""
    prompt: dict[str, Any] = {
        "photo": ("LoadImage", {"image": "face.png"}),
        "faces": ("TestForeignFaces", {}),
        "adapter": ("InstantIDModelLoader", {"instantid_file": "tiny.safetensors"}),
        "sdxl": ("HotpathDemoSDXL", {"seed": 0}),
        "positive": ("HotpathDemoText", {"text": "a portrait"}),
        "negative": ("HotpathDemoText", {"text": "blurry"}),
        "apply": (
            "ApplyInstantID",
            {
                "instantid": ["adapter", 0],
                "insightface": ["faces", 0],
                "control_net": ["sdxl", 1],
                "image": ["photo", 0],
                "model": ["sdxl", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "weight": 0.8,
                "start_at": 0.0,
                "end_at": 1.0,
            },
        ),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sampler": (
            "KSampler",
            {
                "model": ["apply", 0],
                "positive": ["apply", 1],
                "negative": ["apply", 2],
                "latent_image": ["latent", 0],
                "seed": 1,
                "steps": 3,
                "cfg": 4.5,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        ),
        "decode": ("HotpathDemoDecode", {"samples": ["sampler", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "instantid"}),
    }
    nodes = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in prompt.items()}
    for path, value in changes.items():
        node, name = path.split("__")
        nodes[node]["inputs"][name] = value
    return nodes


def run(server: Any, prompt: dict[str, Any], folder: Path) -> Any:
    from hotpath.headless.graph import Graph
    from hotpath.headless.server import run_on_server

    return run_on_server(server.url, Graph.parse(prompt), folder)


def test_the_nodes_are_there(server: Any) -> None:
    info = get(server, "/object_info")
    contract = json.loads((HERE / "data" / "contracts" / "instantid.json").read_text())
    assert contract["nodes"].keys() <= info.keys()
    assert info["InstantIDModelLoader"]["input"]["required"]["instantid_file"][0] == [
        "demo_adapter.safetensors",
        "ip-adapter.bin",
        "tiny.safetensors",
        "wrong.safetensors",
    ]
    start = server.log.read_text("utf-8", "replace").partition("To see the GUI")[0]
    assert "hotpath" in start and "Traceback" not in start


def test_a_prompt_becomes_a_picture_and_says_what_it_did(server: Any, tmp_path: Path) -> None:
    outcome = run(server, graph(), tmp_path)
    (picture,) = [file for file in outcome.files if file.kind == "image"]
    assert Image.open(picture.path).size == (128, 128)
    assert any("60 of 70 blocks" in text for _, text in outcome.texts)
    again = run(server, graph(apply__weight=0.3), tmp_path)
    (other,) = [file for file in again.files if file.kind == "image"]
    assert np.asarray(Image.open(picture.path)).tolist() != np.asarray(Image.open(other.path)).tolist()


def test_the_identity_makes_a_difference_and_the_seed_none(server: Any, tmp_path: Path) -> None:
    def pixels(folder: str, **changes: Any) -> np.ndarray:
        (file,) = [f for f in run(server, graph(**changes), tmp_path / folder).files if f.kind == "image"]
        return np.asarray(Image.open(file.path))

    first = pixels("a", save__filename_prefix="a")
    assert np.array_equal(first, pixels("b", save__filename_prefix="b"))
    without = pixels("c", sampler__model=["sdxl", 0], save__filename_prefix="c")
    assert not np.array_equal(first, without)


@pytest.mark.parametrize(
    ("changes", "node", "sentence"),
    [
        ({"photo__image": "nobody.png"}, "ApplyInstantID", "No face was found in the reference picture"),
        ({"adapter__instantid_file": "gone.safetensors"}, "InstantIDModelLoader", "'gone.safetensors' was not found"),
        ({"adapter__instantid_file": "../tiny.safetensors"}, "InstantIDModelLoader", "is not a file name inside"),
        ({"adapter__instantid_file": "wrong.safetensors"}, "InstantIDModelLoader", "looks like a ControlNet"),
    ],
)
def test_bad_input_is_answered_with_the_node_and_the_cure(
    server: Any, tmp_path: Path, changes: dict[str, Any], node: str, sentence: str
) -> None:
    from hotpath.headless.server_answers import ServerError

    with pytest.raises(ServerError, match=sentence) as error:
        run(server, graph(**changes), tmp_path)
    assert node in str(error.value)
    # The server is as good as before.
    assert run(server, graph(), tmp_path).files


@pytest.mark.parametrize("path", SHARED, ids=lambda p: p.stem)
def test_shared_workflows_load_and_validate(server: Any, path: Path) -> None:
    prompt = to_prompt(json.loads(path.read_text()), get(server, "/object_info"))
    apply = next(n for n in prompt.values() if n["class_type"] == "ApplyInstantID")
    assert (apply["inputs"]["weight"], apply["inputs"]["start_at"], apply["inputs"]["end_at"]) == (0.8, 0, 1)
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{server.url}/prompt", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            accepted = json.load(answer)
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())
    assert accepted["node_errors"] == {}
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/interrupt", b"{}"), timeout=60).close()


def test_old_prompts_with_unknown_extras_still_run(server: Any, tmp_path: Path) -> None:
    assert run(server, graph(apply__some_widget_of_a_fork=3), tmp_path).files
