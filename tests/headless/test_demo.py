"""The demo and its page: every workflow for itself, nothing of the user's emptied, everything escaped."""

from __future__ import annotations

import html.parser
import json
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote

import pytest
from hotpath import cli
from hotpath.headless import demo, launcher
from hotpath.headless.demo import DemoError, DemoFiles, run_demo
from PIL import Image


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


COPY = {
    "1": node("LoadImage", image="a b.png"),
    "2": node("SaveImage", images=["1", 0], filename_prefix="sub/copy"),
    "3": node("PreviewImage", images=["1", 0]),
    "4": node("PreviewAny", source="<script>alert('x')</script> & so on"),
    "5": node("CreateVideo", images=["1", 0], fps=4),
    "6": node("SaveVideo", video=["5", 0], filename_prefix="clip", format="auto"),
}
FAILS = {"1": node("LoadImage", image="no.png"), "2": node("SaveImage", images=["1", 0], filename_prefix="x")}
SAMPLES = {"1": node("KSampler"), "2": node("SaveImage", images=["1", 0], filename_prefix="x")}


@pytest.fixture
def files(tmp_path: Path) -> DemoFiles:
    found = DemoFiles(tmp_path / "wf", tmp_path / "in", tmp_path / "models", tmp_path / "nodes")
    for folder in (found.workflows, found.inputs, found.models, found.comfy_nodes):
        folder.mkdir()
    Image.new("RGB", (32, 16), "teal").save(found.inputs / "a b.png")
    for name, graph in {"a_fails": FAILS, "b_copy": COPY, "c_samples": SAMPLES}.items():
        (found.workflows / f"{name}.api.json").write_text(json.dumps(graph))
    (found.workflows / "b_copy.json").write_text("{}")  # the editor's file beside it
    return found


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.files.append(unquote(value))


def test_every_workflow_for_itself(files, tmp_path):
    said: list[str] = []
    output = tmp_path / "out"
    results = run_demo(output, files, None, said.append)
    assert [(r.name, r.state) for r in results] == [("a_fails", "failed"), ("b_copy", "done"), ("c_samples", "skipped")]
    assert "no file 'no.png'" in results[0].reason and results[2].reason == "it needs a ComfyUI for KSampler"
    assert (output / "b_copy" / "sub" / "copy_00001_.png").is_file()
    page = Links()
    page.feed((output / "index.html").read_text("utf-8"))
    assert page.files and all((output / name).is_file() for name in page.files), page.files
    assert {"b_copy/input/a b.png", "b_copy/clip_00001_.mp4"} <= set(page.files)
    assert "video" in page.tags and "script" not in page.tags
    data = json.loads((output / "results.json").read_text())
    assert data[1]["state"] == "done" and len(data[1]["nodes"]) == 6
    assert not list(files.models.iterdir())


def test_a_second_run_starts_clean(files, tmp_path):
    output = tmp_path / "out"
    run_demo(output, files, None, lambda _: None)
    run_demo(output, files, None, lambda _: None, ["copy"])
    assert sorted(p.name for p in output.iterdir()) == [demo.MARK, "b_copy", "index.html", "results.json"]
    assert (output / "b_copy" / "sub" / "copy_00001_.png").is_file()


def test_a_folder_of_the_users_is_left_alone(files, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(DemoError, match="did not make"):
        run_demo(output, files, None, lambda _: None)
    assert (output / "mine.txt").read_text() == "mine"


def test_a_comfyui_that_does_not_start_fails_the_demo_and_the_rest_runs(files, tmp_path, monkeypatch):
    import sys

    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    broken = tmp_path / "ComfyUI"
    (broken / "comfy_api").mkdir(parents=True)
    (broken / "main.py").write_text("raise SystemExit('no way')")
    results = run_demo(tmp_path / "out", files, broken, lambda _: None)
    assert results[0].state == "failed" and "no way" in results[0].reason
    assert results[2].state == "done" and results[2].outcome.where.startswith("headless")


def test_a_disk_for_temporary_files_that_is_full_is_named(files, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"^The disk with .*hotpath-demo-.* is full"):
        patch.setattr(shutil, "copy2", refuse)
        run_demo(tmp_path / "out", files, tmp_path, lambda _: None)
    monkeypatch.setattr(launcher, "_arguments", refuse)
    with (
        pytest.raises(OSError, match=r"^The disk with .*hotpath-comfyui-.* is full"),
        launcher.launched(tmp_path),
    ):
        pass
    assert not list((tmp_path / "temporary").iterdir())


def test_the_command(files, tmp_path, capsys, monkeypatch):
    from hotpath.commands import demo as command

    monkeypatch.setattr(command, "DemoFiles", lambda **_: files)
    output = tmp_path / "out"
    assert cli.main(["demo", "--headless", "--output-folder", str(output)]) == 1
    assert str(output / "index.html") in capsys.readouterr().out
    assert cli.main(["demo", "--headless", "--output-folder", str(output), "--only", "copy", "--only", "samples"]) == 0
    assert cli.main(["demo", "--headless", "--output-folder", str(output), "--only", "nothing_like_it"]) == 2
    assert "no workflow" in capsys.readouterr().err


@pytest.mark.parametrize("path", DemoFiles().graphs(), ids=lambda path: path.name)
def test_shipped_workflows_name_files_that_are_shipped(path):
    from hotpath.headless.graph import Graph

    files = DemoFiles()
    for entry in Graph.load(path).nodes.values():
        if entry.class_type in ("LoadImage", "LoadImageMask"):
            assert (files.inputs / entry.inputs["image"]).is_file()
        if entry.class_type == "LoadVideo":
            assert (files.inputs / entry.inputs["file"]).is_file()


def test_a_missing_package_is_no_failure(files, tmp_path, monkeypatch):
    from hotpath.headless import core_nodes

    def needs_more(self, **inputs):
        try:
            import a_package_nobody_has  # noqa: F401
        except ImportError as error:
            raise RuntimeError("Saving needs a_package_nobody_has: install it.") from error

    monkeypatch.setattr(core_nodes.SaveImage, "save_images", needs_more)
    results = run_demo(tmp_path / "out", files, None, lambda _: None, ["copy"])
    assert [(r.state, "install it" in r.reason) for r in results] == [("skipped", True)]


def test_stand_ins(tmp_path):
    from hotpath.headless.graph import Graph
    from hotpath.headless.stand_ins import StandIns

    path = tmp_path / "stand_ins.json"
    path.write_text(json.dumps({"nodes": {"Large": "Small"}, "values": {"Large.name": "tiny", "Large.source": 1}}))
    graph = Graph.parse({"1": node("Large", name="huge", other=2), "2": node("Large", source=["1", 0])})
    small = StandIns.read(path).apply(graph).prompt()
    assert small["1"] == {"class_type": "Small", "inputs": {"name": "tiny", "other": 2}}
    assert small["2"]["inputs"]["source"] == ["1", 0], "a link stays a link"
    assert (
        graph.nodes["1"].class_type == "Large"
        and StandIns.read(tmp_path / "none").apply(graph).prompt() == graph.prompt()
    )
