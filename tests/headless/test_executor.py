"""Running graphs: order, lists, lazy inputs, caching by content, hidden inputs, failures and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_nodes import CATALOG, Clock, Counted
from hotpath.headless.executor import Executor, NodeFailed, RunStopped
from hotpath.headless.graph import Graph
from hotpath.headless.interrupts import stopped_by_ctrl_c
from hotpath.headless.validation import NeedsComfyUI

ROOT = Path(__file__).resolve().parents[2]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def executor(headless_host) -> Executor:
    Counted.calls.clear()
    Clock.now = 0
    return Executor(headless_host, CATALOG)


def test_a_graph_runs_in_order(executor):
    result = executor.run(
        Graph.parse(
            {
                "9": node("Show", a=["3", 0]),
                "3": node("Add", a=["1", 0], b=["2", 0]),
                "1": node("Number", value=2),
                "2": node("Number", value=3),
            }
        )
    )
    assert Counted.calls == ["Number 2", "Number 3", "Add 2 3", "Show 5"]
    assert result.runs["9"].ui == {"text": ["9: 5"]}
    assert result.shown("text") == ["9: 5"]
    assert result.values["3"] == [[5]]


def test_a_shared_source_runs_once(executor):
    executor.run(
        Graph.parse(
            {"1": node("Number", value=2), "2": node("Add", a=["1", 0], b=["1", 0]), "3": node("Show", a=["2", 0])}
        )
    )
    assert Counted.calls.count("Number 2") == 1


def test_lists_run_a_node_once_per_entry(executor):
    result = executor.run(
        Graph.parse(
            {
                "1": node("Numbers", count=3),
                "2": node("Add", a=["1", 0], b=10),
                "3": node("Sum", values=["2", 0], plus=100),
                "4": node("Show", a=["3", 0]),
            }
        )
    )
    assert result.values["2"] == [[10, 11, 12]]
    assert result.values["3"] == [[133]]


def test_an_empty_list_is_explained(executor):
    with pytest.raises(NodeFailed, match=r"Add \(#2\): input 'a' received an empty list"):
        executor.run(
            Graph.parse(
                {"1": node("Numbers", count=0), "2": node("Add", a=["1", 0], b=1), "3": node("Show", a=["2", 0])}
            )
        )


@pytest.mark.parametrize("first", [True, False])
def test_only_the_lazy_input_that_is_asked_for_runs(executor, first):
    executor.run(
        Graph.parse(
            {
                "1": node("Number", value=1),
                "2": node("Number", value=2),
                "3": node("Choose", first=first, a=["1", 0], b=["2", 0]),
                "4": node("Show", a=["3", 0]),
            }
        )
    )
    assert Counted.calls == [f"Number {1 if first else 2}", "Choose", f"Show {1 if first else 2}"]


CHAIN = {"1": node("Number", value=1), "2": node("Add", a=["1", 0], b=1), "3": node("Show", a=["2", 0])}


def test_nothing_runs_twice_for_the_same_inputs(executor):
    executor.run(Graph.parse(CHAIN))
    Counted.calls.clear()
    result = executor.run(Graph.parse(CHAIN))
    assert Counted.calls == []
    assert result.runs["3"].cached and result.runs["3"].ui == {"text": ["3: 2"]}


def test_a_changed_value_runs_what_depends_on_it(executor):
    executor.run(Graph.parse(CHAIN))
    Counted.calls.clear()
    executor.run(Graph.parse({**CHAIN, "2": node("Add", a=["1", 0], b=5)}))
    assert Counted.calls == ["Add 1 5", "Show 6"]


def test_a_renumbered_graph_keeps_its_results_except_where_the_id_is_an_input(executor):
    executor.run(Graph.parse(CHAIN))
    Counted.calls.clear()
    renamed = {"x": CHAIN["1"], "y": node("Add", a=["x", 0], b=1), "z": node("Show", a=["y", 0])}
    executor.run(Graph.parse(renamed))
    assert Counted.calls == ["Show 2"]


@pytest.mark.parametrize(("answers", "runs"), [((1, 1), 1), ((1, 2), 2), ((float("nan"), float("nan")), 2)])
def test_is_changed(executor, answers, runs):
    for Clock.now in answers:
        executor.run(Graph.parse({"1": node("Clock"), "2": node("Show", a=["1", 0])}))
    assert Counted.calls.count("Clock") == runs


def test_a_failing_is_changed_runs_the_node_again(executor, caplog):
    Clock.now = RuntimeError("no clock")
    for _ in range(2):
        executor.run(Graph.parse({"1": node("Clock"), "2": node("Show", a=["1", 0])}))
    assert Counted.calls.count("Clock") == 2
    assert "no clock" in caplog.text


def test_what_a_graph_no_longer_has_is_forgotten(executor):
    executor.run(Graph.parse(CHAIN))
    executor.run(Graph.parse({"8": node("Number", value=5), "9": node("Show", a=["8", 0])}))
    assert len(executor._remembered) == 2
    Counted.calls.clear()
    executor.run(Graph.parse(CHAIN))
    assert "Number 1" in Counted.calls


def test_results_are_dropped_as_soon_as_nobody_wants_them(headless_host):
    result = Executor(headless_host, CATALOG, keep=False).run(Graph.parse(CHAIN))
    assert result.values == {}
    assert list(result.runs) == ["1", "2", "3"]


def test_a_failure_names_the_node_and_keeps_what_was_done(executor):
    graph = {
        "1": node("Number", value=1),
        "2": node("Show", a=["1", 0]),
        "3": node("Fails", a=["1", 0]),
        "4": node("Show", a=["3", 0]),
    }
    with pytest.raises(NodeFailed) as caught:
        executor.run(Graph.parse(graph))
    assert str(caught.value) == "Fails (#3): 1 is no good; use another number."
    assert isinstance(caught.value.__cause__, ValueError)
    assert list(caught.value.finished.runs) == ["1", "2"]
    Counted.calls.clear()
    with pytest.raises(NodeFailed):
        executor.run(Graph.parse(graph))
    assert Counted.calls == []  # what was done stays done


def test_text_under_a_node(executor):
    result = executor.run(Graph.parse({"1": node("Talks", a=3)}))
    assert result.runs["1"].ui["text"] == ["report 3"]


def test_asynchronous_nodes(executor):
    assert executor.run(Graph.parse({"1": node("Waits", a=3), "2": node("Show", a=["1", 0])})).values["1"] == [[4]]


def test_a_node_that_grows_others_is_refused(executor):
    with pytest.raises(NodeFailed, match="only ComfyUI can do"):
        executor.run(Graph.parse({"1": node("Grows", a=3), "2": node("Show", a=["1", 0])}))


def test_nothing_runs_when_a_node_is_missing(executor):
    with pytest.raises(NeedsComfyUI):
        executor.run(Graph.parse({**CHAIN, "9": node("KSampler")}))
    assert Counted.calls == []


def test_stop_in_the_middle_of_a_node(executor):
    graph = {**CHAIN, "4": node("Stops", a=["1", 0]), "5": node("Show", a=["4", 0])}
    with pytest.raises(RunStopped) as caught:
        executor.run(Graph.parse(graph))
    assert caught.value.node.id == "4"
    assert list(caught.value.finished.runs) == ["1", "2", "3"]
    executor.run(Graph.parse(CHAIN))  # the request is gone


def test_the_host_before_comes_back(executor, headless_host):
    from hotpath import host

    before = host.current()
    with pytest.raises(NodeFailed):
        executor.run(Graph.parse({"1": node("Fails", a=1), "2": node("Show", a=["1", 0])}))
    assert host.current() is before


def test_ctrl_c_becomes_a_stop_and_a_second_one_an_interrupt(headless_host):
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_ctrl_c(headless_host):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            headless_host.check_interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is before


LONG = """
import importlib.util, sys, time
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("hotpath", root + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["hotpath"] = module
spec.loader.exec_module(module)
from hotpath import cli, host
from hotpath.headless import catalog, core_nodes

class Long:
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "work"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}
    def work(self, image):
        sys.stderr.write("READY\\n"); sys.stderr.flush()
        with host.tracked(host.current(), 1000) as bar:
            for _ in range(1000):
                time.sleep(0.05); bar.update()
        return (image,)

core_nodes.NODES["Long"] = Long
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_on_the_command_line_keeps_what_was_saved(tmp_path):
    import json

    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "wf.json").write_text(
        json.dumps(
            {
                "1": node("LoadImage", image="a.png"),
                "2": node("SaveImage", images=["1", 0], filename_prefix="kept"),
                "3": node("Long", image=["1", 0]),
                "4": node("SaveImage", images=["3", 0], filename_prefix="never"),
            }
        )
    )
    command = [sys.executable, "-c", LONG, str(ROOT), "run", str(tmp_path / "wf.json")]
    command += [
        "--headless",
        "--input-folder",
        str(tmp_path),
        "--output-folder",
        str(tmp_path / "out"),
        "--models",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if "READY" in line:
            break
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    log = "".join(lines) + rest
    assert process.returncode == 130, log
    assert "Traceback" not in log and "Stopped at Long (#3)" in log
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["kept_00001_.png"]
    assert "kept_00001_.png" in out


def test_a_prompt_of_an_older_layout_gets_its_present_inputs(headless_host: Any) -> None:
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    asked: dict[str, Any] = {}

    class Listening(NODE_CLASS_MAPPINGS["Qwen2.5VL"]):  # type: ignore[misc]
        OUTPUT_NODE = True

        def listen(self, **inputs: Any) -> tuple[str]:
            asked.update(inputs)
            return ("",)

    Listening.FUNCTION = "listen"
    catalog = {"Qwen2.5VL": Listening, "LoadImage": LoadPixel}
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {}},
        "2": {"class_type": "Qwen2.5VL", "inputs": {"text": "What is it?", "image": ["1", 0]}},
    }
    Executor(headless_host, catalog).run(Graph.parse(prompt))
    assert asked["text"] == "What is it?"
    assert asked["image1"].shape == (1, 1, 1, 3)


class LoadPixel:
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "load"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[torch.Tensor]:
        return (torch.zeros(1, 1, 1, 3),)
