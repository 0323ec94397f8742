"""The command line: every way to start it, what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotpath import cli
from hotpath.commands import map as map_command
from hotpath.commands import progress
from hotpath.headless.executor import NodeRun
from hotpath.headless.graph import Node
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


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


def commands_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield name, command
                yield from commands_of(command)


@pytest.mark.parametrize(("name", "command"), commands_of(cli.parser()))
def test_help_says_what_every_option_does_and_its_default(name, command):
    told = " ".join(command.format_help().split())
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, f"nothing is said of {name}'s {action.dest}"
        text = command._get_formatter()._expand_help(action)
        if action.default not in (None, "", argparse.SUPPRESS) and not isinstance(action.default, bool):
            assert "default" in text, f"{action.dest}: {text}"
        assert " ".join(text.split()) in told


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
        assert map_command._input_folder(SimpleNamespace(over=str(over), input_folder=named), None) == found


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


def test_ctrl_c_while_a_command_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch alone takes seconds to import."""

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", pressed)
    assert cli.main(["doctor"]) == 130
    monkeypatch.setattr(cli, "parser", pressed)
    assert cli.main(["doctor"]) == 130
