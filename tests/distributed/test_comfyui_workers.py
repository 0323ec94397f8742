"""`hotpath map` on ComfyUIs: at addresses, and started for it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hotpath.commands import map as command
from hotpath.distributed import comfyui_places, comfyui_worker, mapping
from hotpath.distributed.comfyui_places import ComfyUIs, Setting, Started
from hotpath.distributed.comfyui_worker import AGAIN, ComfyUIWorker
from hotpath.distributed.devices import VISIBLE, Devices
from hotpath.distributed.in_graph import INLINE
from hotpath.distributed.items import ListItems
from hotpath.distributed.jobs import BadMap, Target, guess_target
from hotpath.distributed.mapping import run_map
from hotpath.distributed.retry import DISK, ITEM, MEMORY, WORKER, RetryPlan, told_kind
from hotpath.headless import server
from hotpath.headless.graph import Graph
from hotpath.headless.launcher import free_port
from hotpath.headless.server import run_on_server
from hotpath.headless.server_answers import ServerLost
from hotpath.headless.server_nodes import offered_nodes
from hotpath.host.own_comfyui import OwnComfyUI, for_another
from hotpath.host.whole_paths import FOLDERS
from map_workflows import COPY, listed, made
from stand_in_comfyui import standing_in

SAVED = [{"filename": "b.png", "subfolder": "", "type": "output"}]
SHOWN = [{"filename": "t.png", "subfolder": "", "type": "temp"}]


@pytest.fixture
def stand_in():
    with standing_in() as server:
        yield server


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(mapping, "RetryPlan", partial(RetryPlan, base=0.01))
    monkeypatch.setattr(comfyui_places, "ASK_EVERY", 0.05)


@pytest.fixture
def at(request_for):
    """A request for a map on the servers at these addresses."""

    def make(source, *servers, **options):
        return replace(request_for(source, **options), comfyui=ComfyUIs(servers=servers))

    return make


def test_every_picture_goes_through_the_queue(stand_in, pictures, at):
    stand_in.behaviour["records"] = [*SAVED, *SHOWN]
    outcome = run_map(at(pictures, stand_in.url))
    assert outcome.whole and outcome.status.done == 5 and outcome.workers == "1 ComfyUI"
    assert made(outcome.folder) == {f"p{i}.png": b"output/b.png" for i in range(5)}, "saved pictures, and not the shown"
    assert len(stand_in.uploads) == 5
    assert [line["texts"] for line in listed(outcome.folder)] == [["hello", "engine: tiny"]] * 5
    # The same command again has nothing to do.
    again = run_map(at(pictures, stand_in.url))
    assert again.status.skipped == 5 and len([name for name, _ in stand_in.posted if name == "prompt"]) == 5


def test_every_repeat_has_seeds_of_its_own(stand_in, pictures, at):
    seeded = json.loads(json.dumps(COPY))
    seeded["1"]["inputs"]["seed"] = 5
    outcome = run_map(at(pictures, stand_in.url, graph=seeded, repeat=2))
    assert list(made(outcome.folder))[:3] == ["p0-v2.png", "p0.png", "p1-v2.png"] and outcome.status.total == 10
    assert len({body["prompt"]["1"]["inputs"]["seed"] for name, body in stand_in.posted if name == "prompt"}) == 10


def test_pictures_that_are_only_shown_are_the_result_when_nothing_else_is(stand_in, pictures, at):
    stand_in.behaviour.update(records=SHOWN, texts=[])
    outcome = run_map(at(pictures, stand_in.url))
    assert made(outcome.folder) == {f"p{i}.png": b"temp/t.png" for i in range(5)}


def test_what_is_wrong_for_all_items_ends_the_run_at_once(stand_in, pictures, at):
    errors = [{"message": "Value not in list", "details": "nope", "extra_info": {"input_name": "filename_prefix"}}]
    stand_in.behaviour["refuse"] = {"error": {}, "node_errors": {"2": {"class_type": "SaveImage", "errors": errors}}}
    with pytest.raises(
        BadMap, match=r"(?s)The ComfyUI at http.*SaveImage \(#2\), input 'filename_prefix': Value not in list"
    ):
        run_map(at(pictures, stand_in.url))
    assert len(stand_in.posted) == 1


def test_what_is_wrong_with_one_item_fails_that_one(stand_in, pictures, at):
    errors = [{"message": "Invalid image file", "details": "x", "extra_info": {"input_name": "image"}}]
    stand_in.behaviour["refuse once"] = {
        "error": {},
        "node_errors": {"1": {"class_type": "LoadImage", "errors": errors}},
    }
    outcome = run_map(at(pictures, stand_in.url))
    assert (outcome.status.done, outcome.status.failed) == (4, 1)
    assert "Invalid image file" in listed(outcome.folder)[0]["error"]


def test_out_of_memory_is_tried_again_on_an_emptied_card(stand_in, pictures, at, quick_retries):
    stand_in.behaviour["error once"] = {
        "exception_type": "torch.OutOfMemoryError",
        "exception_message": "CUDA out of memory.",
    }
    outcome = run_map(at(pictures, stand_in.url))
    assert outcome.whole and outcome.status.retried == 1
    assert ("free", {"unload_models": True, "free_memory": True}) in stand_in.posted


def test_a_broken_card_is_given_up_and_its_item_goes_elsewhere(pictures, at, quick_retries):
    broken = "CUDA error: an illegal memory access was encountered"
    with standing_in() as one, standing_in() as other:
        one.behaviour["error"] = {"exception_type": "torch.AcceleratorError", "exception_message": broken}
        outcome = run_map(at(pictures, one.url, other.url))
        assert outcome.whole and outcome.status.retried == 1
        assert len([name for name, _ in one.posted if name == "prompt"]) == 1
        with pytest.raises(BadMap, match="must be started anew"):
            # With nobody else there, what is lost is said once.
            raise BadMap(run_map(at(pictures, one.url, output="alone")).lost)


def test_a_server_that_forgets_its_run_is_asked_again(stand_in, pictures, at, quick_retries, monkeypatch):
    monkeypatch.setattr(server, "SOONEST", 0.02)
    stand_in.behaviour["forgets once"] = True
    outcome = run_map(at(pictures, stand_in.url))
    assert outcome.whole and outcome.status.retried == 1


def test_servers_without_the_nodes_or_without_an_answer_are_told(stand_in, pictures, at, monkeypatch):
    other = {**COPY, "3": {"class_type": "NobodyHasThis", "inputs": {"images": ["1", 0]}}}
    with pytest.raises(BadMap, match=r"does not have these nodes: NobodyHasThis. Install"):
        run_map(at(pictures, stand_in.url, graph=other))
    with pytest.raises(BadMap, match=r"at http://127.0.0.1:\d+ does not answer"):
        run_map(at(pictures, f"127.0.0.1:{free_port()}"))
    with pytest.raises(BadMap, match="is not the address of a server"):
        run_map(at(pictures, "ftp://here"))
    with pytest.raises(BadMap, match="leave --executor ray out with --server"):
        run_map(at(pictures, stand_in.url, executor="ray"))
    outcome = run_map(at(pictures, f"127.0.0.1:{free_port()}", stand_in.url))
    assert outcome.whole, "one that answers is enough"


def test_a_run_that_is_stopped_takes_its_prompt_out(stand_in, pictures, at):
    stand_in.behaviour["wait"] = True

    def interrupted() -> None:
        if any(name == "prompt" for name, _ in stand_in.posted):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_map(at(pictures, stand_in.url), interrupted=interrupted)
    assert {"interrupt", "queue"} <= {name for name, _ in stand_in.posted}


def test_no_comfyui_is_asked_for_nothing(stand_in, at, tmp_path):
    with pytest.raises(BadMap, match="nothing to map over"):
        run_map(at(ListItems("# nothing"), stand_in.url))
    assert not stand_in.asked


def payload(tmp_path: Path, number: int, **inputs: object) -> dict:
    prompt = json.loads(json.dumps(COPY))
    prompt["1"]["inputs"].update(inputs)
    return {
        "id": f"job{number}",
        "attempt": 1,
        "prompt": prompt,
        "staging": str(tmp_path / f"s{number}"),
        "touched": ["1"],
    }


def test_what_a_comfyui_of_our_own_writes_is_taken_away(stand_in, tmp_path, monkeypatch):
    """Also what lies beside the results, and never what a job left that came to nothing."""
    own = {"output": tmp_path / "output", "temp": tmp_path / "temp"}
    for folder in own.values():
        folder.mkdir()

    def makes() -> None:
        (own["output"] / "b.png").write_bytes(b"picture")
        (own["output"] / "b.txt").write_text(f"caption {len(stand_in.posted)}")
        (own["temp"] / "t.png").write_bytes(b"preview")

    stand_in.behaviour.update(makes=makes, records=[*SAVED, *SHOWN])
    worker = ComfyUIWorker(stand_in.url, frozenset({"SaveImage"}), None, own)
    told: list[float] = []

    def files(number: int) -> dict[str, bytes]:
        folder = tmp_path / f"s{number}" / "output"
        return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    assert worker.run(payload(tmp_path, 1), told.append)["status"] == "done"
    assert files(1) == {"b.png": b"picture", "b.txt": b"caption 1"} and told and max(told) <= 1
    assert not list(own["output"].iterdir()) and not list(own["temp"].iterdir())
    # The same again would be answered from what was kept, and its file is gone: it is marked.
    worker.run(payload(tmp_path, 2), told.append)
    worker.run(payload(tmp_path, 3, image="y.png"), told.append)
    marks = [body["prompt"]["2"]["inputs"].get(AGAIN) for name, body in stand_in.posted if name == "prompt"]
    assert marks == [None, "job2-1", None]
    assert files(2) == {"b.png": b"picture", "b.txt": b"caption 2"} and files(1)["b.txt"] == b"caption 1"
    (own["output"] / "half.png").write_bytes(b"half")
    stand_in.behaviour["error once"] = {"exception_type": "OSError", "exception_message": "[Errno 28] No space left"}
    assert worker.run(payload(tmp_path, 4), told.append)["kind"] == DISK
    assert not (own["output"] / "half.png").exists()
    monkeypatch.setattr(comfyui_worker, "REMEMBERED", 1)
    stand_in.behaviour["records"] = SHOWN
    stand_in.behaviour["makes"] = lambda: (own["temp"] / "t.png").write_bytes(b"preview")
    stand_in.behaviour["texts"] = []
    worker.run(payload(tmp_path, 5), told.append)
    assert files(5) == {"t.png": b"preview"} and len(worker._ran) == 1


@pytest.mark.parametrize(
    ("kind", "reason", "found"),
    [
        ("torch.OutOfMemoryError", "", MEMORY),
        ("RuntimeError", "MPS backend out of memory", MEMORY),
        ("torch.AcceleratorError", "CUDA error: an illegal memory access was encountered", WORKER),
        ("OSError", "[Errno 28] No space left on device: 'x.png'", DISK),
        ("ValueError", "no", ITEM),
        ("", "", ITEM),
    ],
)
def test_what_another_process_tells_of_an_error(kind, reason, found):
    assert told_kind(kind, reason) == found


def test_lines_go_into_the_positive_prompt(stand_in):
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}}
    sampler = {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "negative": ["2", 0]}}
    checkpoint = {"class_type": "CheckpointLoaderSimple", "inputs": {}}
    graph = Graph.parse({"1": text, "2": text, "3": sampler, "4": checkpoint})
    declared = {"required": {"text": ("STRING", {"multiline": True}), "clip": ("CLIP",)}}
    catalog = {"CLIPTextEncode": type("Encode", (), {"INPUT_TYPES": classmethod(lambda cls: declared)})}
    assert guess_target(graph, catalog, "text") == Target("1", "text")
    graph.nodes["3"].inputs["negative"] = graph.nodes["3"].inputs["positive"]
    with pytest.raises(BadMap, match=r"items could go into 1.text .*, 2.text"):
        guess_target(graph, catalog, "text")


def test_declarations_of_any_shape_are_read(stand_in, monkeypatch):
    assert offered_nodes(stand_in.url)["SaveImage"].OUTPUT_NODE
    from hotpath.headless import server_nodes

    odd = {"a": {}, "b": {"input": None}, "c": {"input": {"required": {"x": []}, "hidden": ["no mapping"]}}}
    monkeypatch.setattr(server_nodes, "ask", lambda *_: odd)
    assert [node.INPUT_TYPES() for node in offered_nodes("").values()] == [{}, {}, {"required": {}}]


def test_what_is_no_comfyui_is_told(stand_in):
    with pytest.raises(ServerLost, match="is no ComfyUI"):
        comfyui_places.ask(stand_in.url, "/view?type=a&filename=b", 5)


def options(**given: object):
    from hotpath.cli import parser

    words = ["map", "flow.json", "--over", str(given.pop("over", "prompts.txt"))]
    for name, value in given.items():
        words += [f"--{name}"] + ([str(value)] if value is not True else [])
    return parser().parse_args(words)


def test_a_comfyui_is_started_when_the_workflow_needs_one(monkeypatch, tmp_path):
    graph = Graph.parse({"1": {"class_type": "KSampler", "inputs": {}}})
    monkeypatch.setattr(command, "find_comfyui", lambda explicit=None: explicit or tmp_path)
    assert command._comfyui(options(), graph) == ComfyUIs(folder=tmp_path)
    assert command._comfyui(options(), Graph.parse(COPY)) is None
    assert command._comfyui(options(headless=True), graph) is None
    assert command._comfyui(options(server="a:1"), graph) == ComfyUIs(servers=("a:1",))
    there = command._comfyui(options(comfyui="elsewhere"), Graph.parse(COPY))
    assert there == ComfyUIs(folder=Path("elsewhere"))
    # Lines name no files of their own: what the workflow names lies where it was made.
    assert command._input_folder(options(), there) == Path("elsewhere/input")
    assert command._input_folder(options(over=tmp_path), there) == tmp_path


def test_others_like_this_one_are_started_with_its_folders_and_limits(tmp_path):
    given = "--listen 0.0.0.0 --port=80 --base-directory B --lowvram --user-directory U --extra-model-paths-config a b --fast"
    kept = "--base-directory B --lowvram --extra-model-paths-config a b --fast"
    assert " ".join(for_another(given.split())) == kept
    like = OwnComfyUI(tmp_path, ("--lowvram",))
    for open_folders, limit in ((None, {}), ((), {FOLDERS: ""}), ((tmp_path,), {FOLDERS: str(tmp_path)})):
        where = ComfyUIs(folder=tmp_path, like=like, open_folders=open_folders)
        one, other = comfyui_places.places(
            Setting(where, Devices(("0", "3"), (0, 3), 2), 0, 0, tmp_path, tmp_path), tmp_path
        )
        assert one.options.environment == {**limit, VISIBLE: "0"} and other.options.environment[VISIBLE] == "3"
        assert one.options.arguments == ("--lowvram",) and one.options.brings_pack
    (alone,) = comfyui_places.places(
        Setting(ComfyUIs(folder=tmp_path), Devices((), (), 1), 1, 4, tmp_path, tmp_path), tmp_path
    )
    assert alone.options.arguments == ("--cpu",) and alone.options.environment["OMP_NUM_THREADS"] == "4"


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.xdist_group("demo_comfyui")
def test_a_graph_maps_nodes_of_comfyui(demo_comfyui, tmp_path):
    workflow = {
        "1": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": ""}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    values = {"workflow": INLINE, "workflow_text": json.dumps(workflow), "target": "1.value", "over": "lines"}
    graph = {
        "1": {
            "class_type": "HotpathMap",
            "inputs": {**values, "items": "one\ntwo", "folder": "of_comfyui", "gpus": "none"},
        },
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    outcome = run_on_server(demo_comfyui.url, Graph.parse(graph), tmp_path)
    assert [text for node, text in outcome.texts if node.id == "2"] == ["one", "two"]


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_a_started_comfyui_that_is_killed_is_started_again(
    pictures, request_for, comfyui_path, monkeypatch, quick_retries
):
    graph = {
        **COPY,
        "3": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "sub/inverted"}},
        "5": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "same"}},
    }
    servers, opened = [], Started.opened

    def watched(self, unwanted):
        servers.append(self)
        return opened(self, unwanted)

    class Killer:
        def changed(self, status) -> None:
            if status.done == 2 and len(servers) == 1:
                os.killpg(servers[0]._server.process.pid, signal.SIGKILL)

    monkeypatch.setattr(Started, "opened", watched)
    request = replace(request_for(pictures, graph=graph, workers=1), comfyui=ComfyUIs(folder=comfyui_path))
    outcome = run_map(request, Killer())
    assert outcome.whole and len(servers) == 2
    names = ["copy_00001_.png", "same_00001_.png", "sub/inverted_00001_.png"]
    assert list(made(outcome.folder)) == [f"p{i}/{name}" for i in range(5) for name in names]
    assert not (outcome.folder / ".hotpath-map" / comfyui_places.FOLDER).exists()
