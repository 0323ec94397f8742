"""The command line: every way to start it, what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotpath import cli
from hotpath.commands import backends, doctor, progress
from hotpath.commands import map as map_command
from hotpath.headless import locate
from hotpath.headless.executor import NodeRun
from hotpath.headless.graph import Node
from hotpath.headless.selftest import Absent, Finding, run_checks
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
}
SAMPLE = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 2], "filename_prefix": "copy"}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture and two workflows, and no ComfyUI to be found."""
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "copy.json").write_text(json.dumps(COPY))
    (tmp_path / "sample.json").write_text(json.dumps(SAMPLE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(locate, "is_comfyui", lambda folder: (Path(folder) / "is_comfyui").is_file())
    return tmp_path


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def installed() -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version("comfyui-hotpath")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    "command", [pytest.param(".", marks=pytest.mark.long), "hotpath", pytest.param(str(ROOT), marks=pytest.mark.long)]
)
def test_every_way_to_start(command):
    if command == "hotpath" and not installed():
        pytest.skip("the pack is not installed in this environment")
    words = ["-m", "hotpath"] if command == "hotpath" else [command]
    command_line = [sys.executable, "-X", "importtime", *words, "--version"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hotpath ")
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line)
    assert not said  # no warning of Python's either
    assert "torch" not in {line.rpartition("|")[2].strip() for line in imported}  # it takes seconds to load


@pytest.mark.skipif(not installed(), reason="the pack is not installed in this environment")
def test_the_console_script():
    script = Path(sys.executable).with_name("hotpath")
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("run", "demo", "doctor", "models", "selftest"):
        assert command in done.stdout


def test_every_command_explains_itself(capsys):
    for words in (["run"], ["demo"], ["doctor"], ["models"], ["models", "download"], ["selftest"]):
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--help"])
        assert left.value.code == 0
        assert len(capsys.readouterr().out) > 200


def test_no_command_is_a_mistake_of_use(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2


def test_a_workflow_runs_here(place, capsys):
    assert run("run", "copy.json", "--headless") == 0
    saved = place / "output" / "copy_00001_.png"
    out, err = capsys.readouterr()
    assert out.strip() == str(saved.relative_to(place)) or out.strip() == str(saved)
    assert Image.open(saved).size == (6, 4)
    assert "LoadImage (#1)" in err and "headless, " in err


def test_values_can_be_set(place, capsys):
    Image.new("RGB", (3, 3)).save(place / "b.png")
    assert (
        run("run", "copy.json", "--headless", "-q", "--set", "LoadImage.image=b.png", "--set", "2.filename_prefix=x/y")
        == 0
    )
    assert Image.open(place / "output" / "x" / "y_00001_.png").size == (3, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.json"], "There is no file nothing.json"),
        (["a.png"], "not JSON"),
        (["copy.json", "--set", "1.image=c.png"], "LoadImage (#1): There is no file 'c.png'"),
        (["copy.json", "--set", "7.image=c.png"], "no node called '7'"),
        (["sample.json"], "CheckpointLoaderSimple (#1)"),
        (["copy.json", "--comfyui", "."], "is not a ComfyUI folder"),
    ],
)
def test_what_is_refused_before_it_runs(place, capsys, words, said):
    assert run("run", *words, *(() if "--comfyui" in words else ("--headless",))) == 2
    assert said in capsys.readouterr().err
    assert not (place / "output").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here(place, capsys, device):
    with pytest.raises(SystemExit) as left:
        run("caption", ".", "--device", device)
    assert left.value.code == 2
    assert f"'{device}' is no device torch can use here" in capsys.readouterr().err


def test_the_folder_of_captions_is_looked_at_before_a_model_is_fetched(place, capsys, monkeypatch):
    from hotpath.commands import caption

    monkeypatch.setattr(caption.MODELS, "get", lambda *_: pytest.fail("a model was asked for"))
    assert run("caption", "nowhere") == 2
    assert "There is no folder nowhere" in capsys.readouterr().err


def test_a_run_is_told_node_by_node(monkeypatch, capsys):
    node = Node("3", "SaveImage", {}, "")
    for quiet, said in ((False, f"[1/2] {node}\n[1/2] {node}: unchanged\n"), (True, "")):
        shown = progress.TerminalObserver(quiet)
        shown.started(node, 1, 2)
        shown.progress(node, 1, 2)  # not where nobody looks
        shown.finished(NodeRun(node, 1.0, cached=False), 1, 2)
        shown.finished(NodeRun(node, 1.0, cached=True), 1, 2)
        assert capsys.readouterr().err == said
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = progress.TerminalObserver()
    for done in (1, 4, 9):
        shown.progress(node, done, 4)
    shown.progress(node, 1, 0)
    bars = capsys.readouterr().err.split("\r")[1:]
    assert [(bar.count("#"), bar.count("."), bar.split()[-1]) for bar in bars] == [
        (8, 22, "1/4"),
        (30, 0, "4/4"),
        (30, 0, "9/4"),
    ]
    shown.started(node, 2, 2)
    shown.started(node, 2, 2)
    err = capsys.readouterr().err
    assert err.startswith("\n") and err.count("\n") == 3


def test_a_map_is_told_now_and_then(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(map_command.time, "monotonic", lambda: clock[0])
    status = SimpleNamespace(line=lambda: "3 of 9", total=9, position=3)
    line, quiet = map_command._Line(False), map_command._Line(True)
    for later in (0, 29, 1.5, 29, 1.5):
        clock[0] += later
        line.changed(status)
        quiet.changed(status)
    assert capsys.readouterr().err == "3 of 9\n" * 2
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock[0] += 0.1
    line.changed(status)
    assert capsys.readouterr().err == ""
    clock[0] += 0.15
    with line:
        line.changed(status)
        assert line._bar.n == 3 and "3 of 9" in capsys.readouterr().err


def test_the_folder_that_is_mapped_over_is_the_input_folder_where_it_lies_elsewhere(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    for over, named, found in (
        (here / "in", None, here),
        ("in", None, here),
        (there, None, there),
        (there / "film.MP4", None, there),
        (there / "list.txt", None, here),
        ("-", None, here),
        (there, here / "own", here / "own"),
    ):
        assert map_command._input_folder(SimpleNamespace(over=str(over), input_folder=named)) == found


def test_a_graph_that_needs_comfyui_says_how_to_get_one(place, capsys):
    assert run("run", "sample.json") == 2
    err = capsys.readouterr().err
    assert "--server" in err and "COMFYUI_PATH" in err


def test_a_node_that_fails(place, capsys):
    (place / "a.png").write_text("no picture")
    assert run("run", "copy.json", "--headless") == 1
    err = capsys.readouterr().err
    assert "LoadImage (#1): a.png is not a picture" in err and "Traceback" not in err


def test_a_server_that_does_not_answer(place, capsys):
    assert run("run", "copy.json", "--server", "http://127.0.0.1:9") == 1
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "file:///etc/passwd", "http://"])
def test_addresses_that_are_no_server(place, capsys, url):
    assert run("run", "copy.json", "--server", url) == 2, "nothing was run"
    assert "not the address of a server" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line(place, capsys, monkeypatch):
    from hotpath.commands import run as run_command

    def broken(options: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run_command, "run", broken)
    assert run("run", "copy.json") == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        run("-v", "run", "copy.json")


def test_a_terminal_gets_no_orders_from_a_file(monkeypatch):
    """A title in a workflow could set the clipboard, or write over what was said before; a pipe gets every byte."""
    import io

    from hotpath.commands.console import note

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return self is terminal

    terminal, pipe = Terminal(), Terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    title = "a\x1b]52;c;eA==\x07\rb"
    for stream, titled in ((terminal, "a\ufffd]52;c;eA==\ufffd\ufffdb"), (pipe, title)):
        monkeypatch.setattr("sys.stderr", stream)
        note(title)
        assert stream.getvalue() == f"{titled}\n"


def test_doctor_shows_everything(place, capsys, monkeypatch):
    monkeypatch.setenv("HOTPATH_MODELS", str(place / "models"))
    code = run("doctor", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert code == (1 if facts["failed_families"] or facts["unmet_requirements"] else 0)
    assert facts["comfyui"] is None and facts["model_folders"] == [str(place / "models")]
    assert {"triton", "onnxruntime", "insightface", "cv2", "transformers"} <= {b["name"] for b in facts["backends"]}
    for backend in facts["backends"]:
        assert backend["available"] or backend["detail"], backend
    adapter = next(m for m in facts["models"] if m["name"] == "instantid-adapter")
    assert adapter["found"] is None and adapter["belongs"] == str(place / "models" / "instantid" / "ip-adapter.bin")
    assert "ApplyInstantID" in facts["families"]["instantid"]
    monkeypatch.setattr(doctor, "examine", lambda host: facts)
    run("doctor")
    out = capsys.readouterr().out
    for text in ("Backends", "Nodes", "Model files", "none found", str(adapter["belongs"]), adapter["source"]):
        assert text in out


def test_doctor_fails_when_a_family_does(place, capsys, monkeypatch):
    from hotpath import nodes

    monkeypatch.setattr(backends, "LIBRARIES", ())
    monkeypatch.setitem(nodes.FAILED_FAMILIES, "instantid", "RuntimeError: a bug")
    assert run("doctor") == 1
    assert "instantid: failed, RuntimeError: a bug" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "told"), [("cachetools.keys", True), ("ray", False)])
def test_a_required_library_that_is_not_installed_is_named_with_the_command_that_installs_it(
    place, capsys, monkeypatch, name, told
):
    def examine(host):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(doctor, "examine", examine)
    assert run("doctor") == 1
    said = capsys.readouterr().err
    command = f'cachetools is not installed: "{sys.executable}" -m pip install -r "{ROOT / "requirements.txt"}"'
    assert (command in said) == told and ("ModuleNotFoundError" in said) != told


def test_a_library_that_is_missing_and_one_that_is_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "library_that_raises.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    (tmp_path / "library_that_needs.py").write_text("import something_else_entirely")
    missing, broken, needs = (
        backends._look(backends._Library(name, "tests", "pip install it"))
        for name in ("library_that_is_not", "library_that_raises", "library_that_needs")
    )
    assert not missing.available and missing.detail == "not installed; pip install it"
    assert not broken.available and "libcudart.so.12" in broken.detail
    assert not needs.available and "something_else_entirely" in needs.detail


def test_two_wheels_in_one_folder_are_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twice_over.py").write_text("")
    for name in ("twice-over", "twice-over-gpu"):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    found = backends._look(backends._Library("twice_over", "tests", "", ("twice-over", "twice-over-gpu")))
    assert "twice-over and twice-over-gpu share one folder" in found.detail
    assert found.version == "twice-over 1.0, twice-over-gpu 1.0"


def test_requirements_that_are_not_met():
    unmet = backends.unmet_requirements(["# a comment", "numpy>=1", "torch>=99", "no-such-thing-here>=1"])
    assert [line.partition(" ")[0] for line in unmet] == ["torch>=99", "no-such-thing-here>=1"]


def test_a_comfyui_is_found_in_order(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "comfy_api").mkdir(parents=True)
        (folder / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(second))
    assert locate.find_comfyui() == second
    assert locate.find_comfyui(first) == first
    monkeypatch.setenv("COMFYUI_PATH", "none")
    assert locate.find_comfyui() is None
    assert locate.find_comfyui(first) == first
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="not a ComfyUI folder"):
        locate.find_comfyui()
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(locate, "PACK", first / "custom_nodes" / "pack")
    assert locate.find_comfyui() == first
    # A wheel lies in no ComfyUI: the one whose folder this is.
    monkeypatch.setattr(locate, "PACK", tmp_path / "site-packages" / "hotpath")
    monkeypatch.setattr(locate, "__file__", str(tmp_path / "site-packages" / "hotpath" / "headless" / "locate.py"))
    for here in (second, second / "custom_nodes"):
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        assert locate.find_comfyui() == second


def test_models_of_a_comfyui(tmp_path, monkeypatch):
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "comfy_api").mkdir(parents=True)
    (comfyui / "main.py").touch()
    (comfyui / "extra_model_paths.yaml").write_text(
        f"big:\n  base_path: {tmp_path}/big\n  is_default: true\n  insightface: face\n  LLM: |\n    a\n    b\n"
        "other:\n  instantid: models/elsewhere\n  unet: old\n  clip: text\nempty:\n"
        "again:\n  base_path: ~nobody-of-that-name\n  instantid: ./x/../y\n"
        "twice:\n  clip: ./models/text_encoders\n"
    )
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.delenv("HOTPATH_MODELS", raising=False)
    from hotpath.commands.models_folder import headless_host

    host = headless_host(device="cpu")
    models, big = comfyui / "models", tmp_path / "big"
    # In ComfyUI's order: what is default comes before the models folder, and the last of it first.
    assert host.model_folders("insightface") == [big / "face", models / "insightface"]
    assert host.model_folders("LLM") == [big / "b", big / "a", models / "LLM"]
    unknown = comfyui / "~nobody-of-that-name" / "y"
    assert host.model_folders("instantid") == [models / "instantid", models / "elsewhere", unknown]
    # Under the names that the kinds have now.
    assert host.model_folders("diffusion_models") == [models / "unet", models / "diffusion_models", comfyui / "old"]
    assert host.model_folders("text_encoders") == [models / "text_encoders", models / "clip", comfyui / "text"]
    monkeypatch.setenv("HOTPATH_MODELS", str(tmp_path / "mine"))
    first = headless_host(device="cpu").model_folders("insightface")
    assert first == [tmp_path / "mine" / "insightface", models / "insightface", big / "face"]
    assert headless_host(tmp_path, device="cpu").model_folders("LLM") == [tmp_path / "LLM"]


def test_selftest_without_models(place, capsys):
    assert run("selftest", "--models", place / "models", "--device", "cpu") == 3
    out = capsys.readouterr().out
    assert "skipped  faces" in out and "skipped  instantid" in out


def test_selftest_with_an_unknown_name(place, capsys):
    assert run("selftest", "nonsense", "--models", place) == 2
    assert "faces" in capsys.readouterr().err


def test_checks_stand_alone(headless_host):
    def good(host):
        yield Finding("a", 0.1, 0.2, seconds=0.001, reference_seconds=0.002)

    def bad(host):
        yield Finding("b", float("nan"), 0.2)

    def broken(host):
        yield Finding("c", 0, 0)
        raise RuntimeError("a bug")

    def absent(host):
        raise Absent("no files")
        yield

    results = run_checks(headless_host, [("good", good), ("bad", bad), ("broken", broken), ("absent", absent)])
    assert [r.passed for r in results] == [True, False, False, True]
    assert results[2].failure == "RuntimeError: a bug" and len(results[2].findings) == 1
    assert results[3].absent == "no files"
    assert "1.0 ms (reference 2.0 ms)" in str(results[0].findings[0])


@pytest.mark.skipif(not (ROOT / "demo" / "models" / "insightface").is_dir(), reason="no demo models")
def test_the_demo_models_pass_the_selftest(place, capsys):
    assert run("selftest", "--models", ROOT / "demo" / "models", "--device", "cpu", "--json") == 0
    results = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    assert all(results[name]["findings"] for name in ("faces", "instantid", "colorization", "vision-language"))
    assert [finding["what"].split(" (")[0] for finding in results["colorization"]["findings"]] == [
        "ColorMNet",
        "Deep Exemplar",
    ]


def test_a_colorizer_that_computes_something_else_fails_the_selftest(place, capsys, monkeypatch):
    from hotpath.colorization import networks

    def slightly_off(network):
        for parameter in network.parameters():
            parameter.data *= 1.05
        return network

    monkeypatch.setattr(networks, "laid_out", slightly_off)
    monkeypatch.setattr(networks, "_networks", lambda: FreshCache())
    assert run("selftest", "color", "--models", ROOT / "demo" / "models", "--device", "cpu") == 1
    assert capsys.readouterr().out.count("FAILED") == 2


class FreshCache:
    def get_or_compute(self, key, make):
        return make()


def test_a_batch_read_in_the_wrong_layout_fails_the_selftest_and_every_folder_is_looked_at(place, capsys, monkeypatch):
    """Faces of interleaved rows would be other pictures'."""
    from hotpath.face.detection import Detector

    models = place / "models" / "insightface" / "models"
    demo_models = ROOT / "demo" / "models" / "insightface" / "models" / "antelopev2"
    for folder, name in (("a_recogniser", "glintr100.onnx"), ("detector", "scrfd_10g_bnkps.onnx")):
        (models / folder).mkdir(parents=True)
        (models / folder / name).write_bytes((demo_models / name).read_bytes())
    right = Detector._probe
    other = {"batch inside": "batch outside", "batch outside": "batch inside"}
    monkeypatch.setattr(Detector, "_probe", lambda self: other[right(self)])
    assert run("selftest", "faces", "--models", place / "models", "--device", "cpu", "--json") == 1
    (result,) = json.loads(capsys.readouterr().out)
    assert "a_recogniser holds no face detector" in result["failure"]
    (wrong,) = [f for f in result["findings"] if not f["passed"]]
    assert wrong["what"] == "detector: two pictures at once (batch outside) against one by one" and wrong["error"] > 0.1
    assert len(result["findings"]) >= 2 and all(f["what"].startswith("detector") for f in result["findings"])


def test_a_wrong_file_fails_the_selftest(place, capsys):
    import torch

    folder = place / "models" / "instantid"
    folder.mkdir(parents=True)
    torch.save({"something": torch.zeros(1)}, folder / "wrong.bin")
    assert run("selftest", "instantid", "--models", place / "models", "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "wrong.bin" in out


def test_ctrl_c_while_a_command_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch alone takes seconds to import."""

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", pressed)
    assert cli.main(["doctor"]) == 130


def test_a_ray_that_is_not_used_says_why() -> None:
    assert "no token authentication" in backends._ray(SimpleNamespace(__version__="2.51.3"))
    assert backends._ray(SimpleNamespace(__version__="2.52.0")) == ""
