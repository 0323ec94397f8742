"""`hotpath compare`: folders, grids rendered without ComfyUI, exit codes and sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotpath import cli, demo
from hotpath.commands import compare as commands
from hotpath.commands.render_grid import Grid, Point, inputs_of
from hotpath.headless import executor
from hotpath.headless.graph import Graph, WorkflowError
from hotpath.host.held import held
from PIL import Image


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


PATTERN = {
    "1": node("TestPattern", seed=0, steps=4, weight=0.5, strength=0.0),
    "2": node("SaveImage", images=["1", 0], filename_prefix="x"),
}


class Pattern:
    """A picture that depends on all of its inputs, and a little on `strength`."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "steps": ("INT", {"default": 1}),
                "weight": ("FLOAT", {"default": 0.0}),
                "strength": ("FLOAT", {"default": 0.0}),
            }
        }

    def draw(self, seed: int, steps: int, weight: float, strength: float) -> tuple[Any]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        base, other = torch.rand(2, 32, 40, 3, generator=generator)
        return ((base * (1 - strength) + other * strength)[None] * (0.5 + 0.5 * weight),)


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from hotpath.commands import rendering
    from hotpath.headless.catalog import available_nodes

    catalog = {**available_nodes(), "TestPattern": Pattern}
    monkeypatch.setattr(executor, "available_nodes", lambda: catalog)
    monkeypatch.setattr(rendering, "available_nodes", lambda: catalog)
    path = tmp_path / "pattern.api.json"
    path.write_text(json.dumps(PATTERN))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def compare(*arguments: Any, out: Path, code: int) -> Any:
    empty = out.parent / "no models"
    empty.mkdir(exist_ok=True)
    base = [
        "compare",
        *map(str, arguments),
        "-o",
        str(out),
        "--models",
        str(empty),
        "--device",
        "cpu",
        "--headless",
        "-q",
    ]
    assert cli.main(base) == code
    file = out / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)


def test_two_folders(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("x", 1), ("y", 2)):
        picture(tmp_path / "a" / f"{name}.png", seed)
        picture(tmp_path / "b" / f"{name}.png", seed)
    data = compare(tmp_path / "a", tmp_path / "b", out=out, code=0)
    assert data["passed"] and all(pair["identical"] for pair in data["pairs"])
    assert "faces are not compared: there are no face models" in data["notes"][1]
    picture(tmp_path / "b" / "y.png", 3)
    data = compare(tmp_path / "a", tmp_path / "b", out=out, code=1)
    assert [pair["state"] for pair in data["pairs"]] == ["passed", "failed"]
    assert compare(tmp_path / "a", tmp_path / "b", "--min-ssim", "-1", out=out, code=0)["passed"]
    picture(tmp_path / "b" / "y.png", 2, (40, 32))
    data = compare(tmp_path / "a", tmp_path / "b", out=out, code=2)
    assert [pair["state"] for pair in data["pairs"]] == ["passed", "not comparable"]
    said = capsys.readouterr().out
    assert "The sizes differ: A is 32x32, B is 32x40" in said and str(out / "index.html") in said


@pytest.mark.parametrize(
    ("names", "arguments", "sentence"),
    [
        (("x", "y"), [], "A has 1 pictures and B has 2"),
        (("x",), ["--seeds", "1"], "--seeds is for workflows"),
        (("x",), ["--max-lpips", "0.1"], "--max-lpips was given. LPIPS is not measured"),
        (
            ("x",),
            ["--min-cosine", "0.9"],
            "--min-cosine was given, but faces are not compared: there are no face models",
        ),
        (("x",), ["--faces", "gone"], "gone"),
    ],
)
def test_folders_that_are_refused(
    tmp_path: Path, out: Path, capsys: Any, monkeypatch: Any, names: Any, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    picture(tmp_path / "a" / "x.png")
    for name in names:
        picture(tmp_path / "b" / f"{name}.png")
    compare(tmp_path / "a", tmp_path / "b", *arguments, out=out, code=2)
    assert sentence in capsys.readouterr().err


def test_a_picture_in_place_of_a_folder_is_refused_as_that(tmp_path: Path, out: Path, capsys: Any) -> None:
    picture(tmp_path / "a" / "x.png")
    compare(tmp_path / "a" / "x.png", tmp_path / "a", out=out, code=2)
    assert "x.png is a single picture: put it into a folder" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_not_emptied(tmp_path: Path, out: Path, capsys: Any) -> None:
    picture(tmp_path / "a" / "x.png")
    out.mkdir()
    (out / "precious").touch()
    compare(tmp_path / "a", tmp_path / "a", out=out, code=2)
    assert (out / "precious").is_file() and "did not make" in capsys.readouterr().err
    compare(tmp_path / "a", tmp_path / "a", out=tmp_path / "a" / "x.png", code=2)
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--min-ssim", "--min-cosine", "--max-lpips"])
def test_a_threshold_that_everything_passes_is_refused(tmp_path: Path, out: Path, option: str, capsys: Any) -> None:
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "x.png", seed=1)
    compare(tmp_path / "a", tmp_path / "b", option, "nan", out=out, code=2)
    assert f"{option} is no finite number" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["workflow", "input folder"])
def test_what_a_run_needs_is_not_emptied_with_an_earlier_run(
    workflow: Path, out: Path, inside: str, capsys: Any
) -> None:
    changed = ["--set-b", "1.weight=0.6", "--min-ssim", "-1"]
    compare(workflow, *changed, out=out, code=0)
    kept = out / "mine" / "pattern.api.json"
    kept.parent.mkdir()
    kept.write_bytes(workflow.read_bytes())
    arguments = [kept] if inside == "workflow" else [workflow, "--input-folder", kept.parent]
    compare(*arguments, *changed, out=out, code=2)
    assert kept.is_file() and "lies in the output folder" in capsys.readouterr().err


def test_a_grid_is_rendered_in_two_settings(workflow: Path, out: Path) -> None:
    grid = ["--seeds", "1,2", "--weights", "0.5,1", "--weight-input", "1.weight"]
    data = compare(workflow, *grid, "--set-b", "1.strength=0.02", out=out, code=0)
    assert [(p["seed"], p["weight"]) for p in data["pairs"]] == [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]
    assert data["b"] == "pattern.api.json, 1.strength=0.02" and data["a"] == "pattern.api.json"
    # What was compared is what the node draws, in eight bits.
    for pair, (seed, weight) in zip(data["pairs"], ((1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)), strict=True):
        for side, strength in (("a", 0.0), ("b", 0.02)):
            drawn = (Pattern().draw(seed, 4, weight, strength)[0][0].numpy() * 255).round()
            saved = np.asarray(Image.open(out / pair["files"][side]), np.float32)
            assert np.abs(drawn - saved).max() <= 1
        assert 0.95 < pair["ssim"] < 1 and not pair["identical"]
    data = compare(workflow, *grid, "--set-b", "1.strength=0.9", out=out, code=1)
    assert {pair["state"] for pair in data["pairs"]} == {"failed"}
    assert not list(out.glob(".renders-*"))


def test_an_earlier_run_is_the_reference_for_a_new_one(workflow: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    compare(workflow, "--seeds", "1,2,3", "--set-b", "1.strength=0.02", out=out, code=0)
    data = compare(out / "b", workflow, "--seeds", "3,1", "--set-b", "1.strength=0.02", out=tmp_path / "again", code=0)
    assert [p["seed"] for p in data["pairs"]] == [3, 1] and all(p["identical"] for p in data["pairs"])
    compare(out / "b", workflow, "--seeds", "3,1", out=out, code=2)
    assert "lies in the output folder, which is emptied" in capsys.readouterr().err and (out / "b").is_dir()
    compare(out / "a", workflow, "--seeds", "4", out=tmp_path / "again", code=2)
    assert "has no picture for seed 4: its name would end in seed_4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Both sides are the same workflow in the same setting"),
        (["--set-b", "1.gone=1"], "has no input 'gone'"),
        (["--set-b", "1.strength=1", "--weights", "1"], "name its input with --weight-input NODE.INPUT"),
        (["--set-b", "1.strength=1", "--controlnet-strengths", "1"], "name its input with --strength-input"),
        (["--set-b", "1.strength=1", "--picture-from", "1"], "gave no picture"),
        (["--set-b", "1.strength=1", "--picture-from", "9"], "there is no node called '9'"),
    ],
)
def test_workflows_that_are_refused(
    workflow: Path, out: Path, capsys: Any, arguments: list[str], sentence: str
) -> None:
    compare(workflow, *arguments, out=out, code=2)
    assert sentence in capsys.readouterr().err


def test_what_needs_comfyui_says_so(tmp_path: Path, out: Path, capsys: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"1": node("KSampler", seed=1, steps=3)}))
    compare(path, "--set-b", "1.seed=2", out=out, code=2)
    assert "KSampler" in capsys.readouterr().err
    picture(tmp_path / "pictures" / "x.png")
    compare(tmp_path / "pictures", out=out, code=2)
    assert "name another one, or a workflow, to compare it with" in capsys.readouterr().err
    compare(tmp_path / "gone.json", out=out, code=2)
    assert "There is no file" in capsys.readouterr().err


def test_what_was_done_before_a_failure_is_kept(workflow: Path, out: Path, monkeypatch: Any, capsys: Any) -> None:
    draw = Pattern.draw

    def fails_at_three(self: Any, seed: int, **inputs: Any) -> Any:
        if seed == 3:
            raise ValueError("three is too many")
        return draw(self, seed, **inputs)

    monkeypatch.setattr(Pattern, "draw", fails_at_three)
    data = compare(workflow, "--seeds", "1,2,3", "--set-b", "1.strength=0.01", out=out, code=1)
    assert len(data["pairs"]) == 2 and "three is too many" in data["notes"][-1]
    assert (out / "index.html").is_file()


def test_a_point_without_counterparts_is_told_and_the_rest_goes_on(
    workflow: Path, out: Path, monkeypatch: Any, capsys: Any
) -> None:
    draw = Pattern.draw

    def twice_at_two(self: Any, seed: int, strength: float, **inputs: Any) -> Any:
        (drawn,) = draw(self, seed=seed, strength=strength, **inputs)
        return (drawn.repeat(2 if seed == 2 and strength else 1, 1, 1, 1),)

    monkeypatch.setattr(Pattern, "draw", twice_at_two)
    changed = ["--set-b", "1.strength=0.01"]
    data = compare(workflow, "--seeds", "1,2,3", *changed, out=out, code=2)
    assert [pair["state"] for pair in data["pairs"]] == ["passed", "not comparable", "passed"]
    assert data["pairs"][1]["problem"] == "At seed 2, A has 1 pictures and B has 2: each needs a counterpart."
    assert [pair["seed"] for pair in data["pairs"]] == [1, 2, 3]
    assert compare(workflow, "--seeds", "2,3", *changed, out=out, code=2) == data, "refused at once, nothing to keep"
    assert "A has 1 pictures and B has 2" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_told_and_the_rest_goes_on(
    tmp_path: Path, out: Path, monkeypatch: Any, capsys: Any
) -> None:
    for number in range(3):
        for side in "ab":
            picture(tmp_path / side / f"{number}.png", number)
    broken = tmp_path / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    data = compare(tmp_path / "a", tmp_path / "b", out=out, code=2)
    assert [pair["state"] for pair in data["pairs"]] == ["passed", "not comparable", "passed"]
    assert data["pairs"][1]["problem"].startswith("B: 1.png cannot be read as a picture")
    judge, judged = commands.compare_pair, []

    def fails_at_the_second(*arguments: Any) -> Any:
        judged.append(arguments)
        if len(judged) == 2:
            raise RuntimeError("out of memory\nand a page of it")
        return judge(*arguments)

    monkeypatch.setattr(commands, "compare_pair", fails_at_the_second)
    data = compare(tmp_path / "a", tmp_path / "a", out=tmp_path / "again", code=1)
    assert len(data["pairs"]) == 1 and data["notes"][-1] == "Not all was compared: RuntimeError: out of memory"


def test_only_face_models_that_were_named_have_to_work(tmp_path: Path, out: Path, capsys: Any) -> None:
    folder = tmp_path / "no models" / "insightface" / "models" / "antelopev2"
    folder.mkdir(parents=True)
    detector = Path(demo.__file__).parent / "models/insightface/models/antelopev2/scrfd_10g_bnkps.onnx"
    (folder / detector.name).write_bytes(detector.read_bytes())
    picture(tmp_path / "a" / "x.png")
    sides = tmp_path / "a", tmp_path / "a"
    data = compare(*sides, out=out, code=0)
    assert any(n.startswith("faces are not compared: ") and "has no recogniser" in n for n in data["notes"])
    compare(*sides, "--faces", "antelopev2", out=out, code=2)
    assert "has no recogniser" in capsys.readouterr().err
    compare(*sides, "--min-cosine", "0.5", out=out, code=2)
    assert "--min-cosine was given, but faces are not compared: " in capsys.readouterr().err


@pytest.mark.parametrize("stopped_by", [ValueError, KeyboardInterrupt])
def test_an_earlier_comparison_stays_until_the_new_one_is_whole(
    workflow: Path, out: Path, monkeypatch: Any, capsys: Any, stopped_by: type[BaseException]
) -> None:
    draw = Pattern.draw

    def stops_at_two(self: Any, seed: int, **inputs: Any) -> Any:
        if seed == 2:
            raise stopped_by("no more")
        return draw(self, seed, **inputs)

    seeds = ["--seeds", "1,2,3", "--set-b", "1.strength=0.01"]
    earlier = compare(workflow, *seeds, out=out, code=0)
    with monkeypatch.context() as broken:
        broken.setattr(Pattern, "draw", stops_at_two)
        code = 1 if stopped_by is ValueError else 130
        assert compare(workflow, *seeds, out=out, code=code) == earlier
    assert all((out / pair["files"]["a"]).is_file() for pair in earlier["pairs"])
    said = capsys.readouterr()
    assert (
        f"what was done of this one is in {out / 'partial'}" in said.err
        and str(out / "partial" / "index.html") in said.out
    )
    assert len(json.loads((out / "partial" / "results.json").read_text())["pairs"]) == 1
    # Nor does one that is refused on the way take it along.
    assert compare(workflow, *seeds, "--picture-from", "1", out=out, code=2) == earlier
    assert [p["seed"] for p in compare(workflow, "--seeds", "5", *seeds[2:], out=out, code=0)["pairs"]] == [5]
    assert (
        not {"partial", ".unfinished"} & {path.name for path in out.iterdir()} and len(list((out / "a").iterdir())) == 1
    )


def test_a_comparison_is_not_lost_to_one_beside_it_nor_to_an_earlier_one_that_stays(
    tmp_path: Path, out: Path, monkeypatch: Any, capsys: Any
) -> None:
    for side in "ab":
        picture(tmp_path / side / "x.png")
    (out / ".unfinished").mkdir(parents=True)
    sides = (tmp_path / "a", tmp_path / "b")
    with held(out / ".at-work"):
        (out / ".hotpath-comparison").touch()
        assert compare(*sides, out=out, code=2) is None
        assert "Another comparison is made in" in capsys.readouterr().err and (out / ".unfinished").exists()
    compare(*sides, out=out, code=0)
    old, unlink = out / "index.html", Path.unlink

    def opened_elsewhere(path: Path, *arguments: Any, **options: Any) -> None:
        if path == old:
            raise PermissionError(13, "it is used by another process", str(path))
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", opened_elsewhere)
    compare(*sides, out=out, code=0)
    assert "The earlier comparison was not replaced (" in capsys.readouterr().err
    assert json.loads((out / ".unfinished" / "results.json").read_text())["passed"]


class TestGrid:
    def graph(self, **nodes: Any) -> Graph:
        return Graph.parse(nodes)

    def test_the_seed_of_the_noise_and_not_another(self) -> None:
        graph = self.graph(
            a=node("HotpathDemoSDXL", seed=0), b=node("KSampler", seed=5, steps=3), c=node("N", noise_seed=1)
        )
        assert [(n.id, name) for n, name in inputs_of(graph, "seed")] == [("b", "seed"), ("c", "noise_seed")]
        assert [n.id for n, _ in inputs_of(self.graph(a=node("X", seed=1)), "seed")] == ["a"]
        with pytest.raises(WorkflowError, match="has a seed that is known here"):
            inputs_of(self.graph(a=node("X", seed=1), b=node("Y", seed=1)), "seed")
        with pytest.raises(WorkflowError, match="seed"):
            inputs_of(self.graph(b=node("KSampler", seed=["c", 0], steps=3), c=node("Int")), "seed")

    def test_weights_and_strengths_of_the_identity_first(self) -> None:
        graph = self.graph(
            a=node("HotpathIdentities", weight_1=1.0, weight_2=1.0, cn_strength=0.5),
            b=node("ControlNetApplyAdvanced", strength=1.0),
        )
        assert [name for _, name in inputs_of(graph, "weight")] == ["weight_1", "weight_2"]
        assert [(n.id, name) for n, name in inputs_of(graph, "controlnet_strength")] == [("a", "cn_strength")]
        del graph.nodes["a"]
        assert [(n.id, name) for n, name in inputs_of(graph, "controlnet_strength")] == [("b", "strength")]

    def test_a_point_leaves_the_graph_it_was_made_of(self) -> None:
        graph = self.graph(a=node("KSampler", seed=5, steps=3))
        grid = Grid({"seed": [1, 2], "weight": []})
        assert [point.name for point in grid.points()] == ["seed 1", "seed 2"]
        assert grid.at(graph, Point({"seed": 2})).nodes["a"].inputs["seed"] == 2
        assert graph.nodes["a"].inputs["seed"] == 5
        assert [point.name for point in Grid({}).points()] == ["as it is"]
