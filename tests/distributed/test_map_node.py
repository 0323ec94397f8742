"""HotpathMap in a graph, and `hotpath map` on the command line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hotpath import cli
from hotpath import host as hosts
from hotpath.distributed import in_graph, mapping
from hotpath.distributed.devices import choose_devices
from hotpath.distributed.film import Merged
from hotpath.distributed.mapping import EXECUTORS, MapOutcome
from hotpath.distributed.policy import POLICIES
from hotpath.distributed.status import Status
from hotpath.distributed.worker import WorkerHost
from hotpath.headless.executor import Executor, RunStopped
from hotpath.headless.graph import Graph
from hotpath.host.whole_paths import allowed
from hotpath.nodes import NODE_CLASS_MAPPINGS
from map_workflows import COPY, made, picture
from PIL import Image

TEXT = {"1": {"class_type": "PreviewAny", "inputs": {"source": "nothing"}}}
HERE = {"gpus": "none"}


@pytest.fixture
def map_node() -> Any:
    return NODE_CLASS_MAPPINGS["HotpathMap"]()


def test_the_form_offers_what_there_is(map_node, headless_host):
    folder = headless_host.input_folder() / "workflows" / "sub"
    folder.mkdir(parents=True)
    (folder / "w.json").write_text("{}")
    inputs = map_node.INPUT_TYPES()
    assert inputs["required"]["workflow"][0] == [in_graph.INLINE, "sub/w.json"]
    assert tuple(inputs["required"]["over"][0]) == in_graph.OVER
    assert tuple(inputs["optional"]["executor"][0]) == EXECUTORS and tuple(inputs["optional"]["policy"][0]) == POLICIES
    assert all(entry[1]["tooltip"] for part in ("required", "optional") for entry in inputs[part].values())
    assert math.isnan(map_node.IS_CHANGED())


def test_a_folder_of_its_own_for_the_results(map_node):
    for name in (".", "", "../x"):
        with pytest.raises(ValueError, match="is not a file name inside"):
            map_node.map(in_graph.INLINE, "lines", "a cat", json.dumps(TEXT), "1.source", name, **HERE)


def test_lines(map_node, headless_host):
    results, folder, report = map_node.map(
        in_graph.INLINE, "lines", "a cat\na dog", json.dumps(TEXT), "1.source", "words", **HERE
    )
    assert results == ["a cat", "a dog"]
    assert folder == str(headless_host.output_folder() / "words")
    assert report.startswith("2 done, 0 failed")
    assert headless_host.texts[-1][1] == report
    headless_host.input_folder().mkdir(exist_ok=True)
    (headless_host.input_folder() / "words.jsonl").write_text('"a cat"\n{"item": "a dog"}\n\n[1]\n')
    results, _, report = map_node.map(
        in_graph.INLINE, "JSON lines", "words.jsonl", json.dumps(TEXT), "1.source", "more", **HERE
    )
    assert results[:2] == ["a cat", "a dog"] and "line 4 is neither a value nor an object" in report


def test_films_shot_by_shot(map_node, headless_host, monkeypatch):
    asked, folder = [], headless_host.output_folder() / "films"
    headless_host.input_folder().mkdir()
    (headless_host.input_folder() / "film.mp4").write_bytes(b"a film")

    def run(request, *_):
        asked.append(request)
        films = [Merged("a", folder / "a.mp4"), Merged("b", folder / "b.mp4", "b: 1 of 2 shots are missing")]
        return MapOutcome(Status(1, done=1), folder, folder / "results.jsonl", "here", films=films)

    monkeypatch.setattr(in_graph, "run_map", run)
    results, _, report = map_node.map(
        in_graph.INLINE, "shots of a film", "film.mp4", json.dumps(TEXT), "1.source", "films", **HERE
    )
    assert results == [str(folder / "a.mp4")] and "b: 1 of 2 shots are missing" in report
    (request,) = asked
    assert request.shots and [item.value for item in request.source] == ["film.mp4"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_server_that_keeps_workflows_out_of_files_keeps_them_out_of_a_maps(
    map_node, pictures, headless_host, monkeypatch, kept
):
    monkeypatch.setattr(headless_host, "keeps_workflows", lambda: kept)
    results, _, _ = map_node.map(in_graph.INLINE, "lines", "in/p0.png", json.dumps(COPY), "1.image", **HERE)
    with Image.open(results[0]) as saved:
        assert ("prompt" in saved.info) is kept


def test_a_folder_and_a_workflow_file(map_node, pictures, headless_host):
    folder = headless_host.input_folder() / "workflows"
    folder.mkdir()
    (folder / "w.json").write_text(json.dumps(COPY))
    results, out, _ = map_node.map("w.json", "pictures of a folder", "in", **HERE)
    assert [r.rpartition("/")[2] for r in results] == [f"p{i}.png" for i in range(5)]
    assert sorted(made(headless_host.output_folder() / "map")) == [f"p{i}.png" for i in range(5)]
    again = map_node.map("w.json", "pictures of a folder", "in", **HERE)
    assert again[0] == results and again[2].startswith("0 done, 5 there already") and again[1] == out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"workflow": "../../secret.json"}, "is not a file name inside"),
        ({"workflow": "/etc/passwd"}, "is not a file name inside"),
        ({"items": "../.."}, "is not a file name inside"),
        ({"items": "/etc"}, "is not a file name inside"),
        ({"items": "leads_out"}, "is not a file name inside"),
        ({"folder": "../elsewhere"}, "is not a file name inside"),
        ({"folder": ""}, "is not a file name inside"),
        ({"items": "nothing"}, "There is no folder"),
        ({"workflow_text": ""}, "There is no workflow"),
        ({"workflow_text": "{"}, "workflow_text: "),
        ({"workflow_text": json.dumps({"1": {"class_type": "HotpathMap", "inputs": {}}})}, "maps a workflow itself"),
        ({"executor": "cloud"}, "There is no executor"),
        ({"workers": 1024}, "1024 workers are more than this machine has room for: choose"),
    ],
)
def test_a_graph_reaches_nothing_outside(map_node, pictures, headless_host, tmp_path, change, sentence):
    (tmp_path / "secret.json").write_text(json.dumps(COPY))
    picture(tmp_path / "elsewhere" / "x.png", 1)
    (headless_host.input_folder() / "leads_out").symlink_to(tmp_path / "elsewhere")
    given = {
        "workflow": in_graph.INLINE,
        "over": "pictures of a folder",
        "items": "in",
        "workflow_text": json.dumps(COPY),
        **HERE,
        **change,
    }
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        map_node.map(**given)
    assert not (tmp_path / "elsewhere" / "results.jsonl").exists()


@pytest.mark.parametrize("named", [None, "", "there"])
def test_whole_paths_in_a_workflow_go_where_the_servers_may(map_node, headless_host, tmp_path, monkeypatch, named):
    """A map is no way around the limit of a server that others reach."""
    if named is not None:
        monkeypatch.setenv("HOTPATH_FOLDERS", named and str(tmp_path / named))
    asked = []
    monkeypatch.setattr(in_graph, "run_map", lambda request, *_: asked.append(request) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        map_node.map(in_graph.INLINE, "lines", "a", json.dumps(TEXT), "1.source", "words", **HERE)
    with mapping._pool(asked[0], choose_devices("none"), tmp_path / "beacon", lambda: None) as pool:
        host = WorkerHost(pool.settings, lambda _: None, lambda: None)
    monkeypatch.delenv("HOTPATH_FOLDERS", raising=False)
    hosts.use(host)
    if named is None:
        assert allowed(tmp_path) == tmp_path
        return
    for inside in (
        headless_host.input_folder() / "a",
        headless_host.output_folder(),
        *([tmp_path / named] * bool(named)),
    ):
        assert allowed(inside) == inside
    with pytest.raises(ValueError, match="let whoever runs the server name it in HOTPATH_FOLDERS"):
        allowed(tmp_path / "elsewhere")


def test_the_address_of_a_cluster_comes_from_the_server_alone(map_node):
    inputs = map_node.INPUT_TYPES()
    assert not {"address", "token_file"} & {*inputs["required"], *inputs["optional"]}


def test_in_a_graph_it_stops_with_the_graph(pictures, headless_host):
    graph = {
        "1": {
            "class_type": "HotpathMap",
            "inputs": {
                "workflow": in_graph.INLINE, "over": "pictures of a folder", "items": "in",
                "workflow_text": json.dumps(COPY), **HERE,
            },
        },
    }  # fmt: skip
    texts = headless_host.show_text

    def stop_at_the_first_line(text: str, node_id: str | None = None) -> None:
        texts(text, node_id)
        headless_host.stop()

    headless_host.show_text = stop_at_the_first_line
    with pytest.raises(RunStopped):
        Executor(headless_host).run(Graph.parse(graph))
    headless_host.show_text = texts
    left = len(made(headless_host.output_folder()))
    assert left < 5
    result = Executor(headless_host).run(Graph.parse(graph))
    done_before = f", {left} there already" if left else ""
    assert result.shown("text")[0].startswith(f"{5 - left} done{done_before}, 0 failed")


class TestCommand:
    """Exit codes are those of docs/headless.md."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COMFYUI_PATH", "none")
        (tmp_path / "w.json").write_text(json.dumps(COPY))
        for i in range(2):
            picture(tmp_path / "in" / f"p{i}.png", i)

    def run(self, *more: str) -> int:
        return cli.main(["map", "w.json", "--gpus", "none", "--threads", "1", *more])

    def test_done_and_listed(self, tmp_path, capsys):
        assert self.run("--over", "in") == 0
        said = capsys.readouterr()
        assert said.out.strip() == str(tmp_path / "output" / "results.jsonl")
        assert "2 done, 0 failed" in said.err
        assert sorted(made(tmp_path / "output")) == ["p0.png", "p1.png"]
        assert self.run("--over", "in", "--quiet") == 0

    def test_one_that_fails(self, tmp_path, capsys):
        (tmp_path / "in" / "bad.png").write_text("x")
        assert self.run("--over", "in") == 1
        assert "in/bad.png: LoadImage (#1): bad.png is not a picture" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--over", "nothing.txt"], "There is no list"),
            (["--over", "in", "--input", "7.image"], "there is no node called '7'"),
            (
                ["--over", "in", "--executor", "ray", "--address", "10.0.0.9:1"],
                "another machine, and there is no token",
            ),
            (["--over", "in", "--items", "videos", "--shots"], "no input of the workflow takes a video"),
            (["--over", "in", "--input-folder", "elsewhere"], "outside the input folder"),
            (["--over", "in", "--gpus", "0"], "There is no GPU 0"),
        ],
    )
    def test_refused_before_anything_runs(self, tmp_path, capsys, monkeypatch, arguments, sentence):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        assert self.run(*arguments) == 2
        assert sentence in capsys.readouterr().err
        assert not made(tmp_path / "output") if (tmp_path / "output").exists() else True

    def test_a_workflow_that_needs_comfyui(self, tmp_path, capsys):
        (tmp_path / "w.json").write_text(json.dumps({**COPY, "9": {"class_type": "KSampler", "inputs": {}}}))
        assert self.run("--over", "in") == 2
        said = capsys.readouterr().err
        assert "KSampler" in said and "hotpath map --server URL" in said

    def test_standard_input_and_values(self, tmp_path, monkeypatch):
        import io

        (tmp_path / "w.json").write_text(json.dumps(TEXT))
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
        assert self.run("--over", "-", "--input", "PreviewAny.source") == 0
        assert sorted(made(tmp_path / "output").values()) == [b"one\n", b"two\n"]
