"""The client for a ComfyUI that runs, against a stand-in that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hotpath.headless import server
from hotpath.headless.graph import Graph
from hotpath.headless.launcher import free_port
from hotpath.headless.server import ServerRun, ServerStopped, run_on_server, server_url
from hotpath.headless.server_answers import ServerError, ServerRefused, failure, refusal
from PIL import Image
from stand_in_comfyui import COPY, Watcher


def test_a_run(stand_in, inputs, tmp_path):
    watcher = Watcher()
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path / "out", inputs, watcher)
    assert [f.path for f in outcome.files] == [tmp_path / "out" / "b.png"]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"output/b.png"
    assert [(node.id, text) for node, text in outcome.texts] == [("2", "hello"), ("2", "engine: tiny")]
    assert watcher.seen == ["start 2 2/2", "progress 2 1.0/4.0"]
    assert [(t.node.id, t.seconds is None) for t in outcome.times] == [("1", True), ("2", False)]
    # The picture went up under a folder named by its content, and the prompt says so.
    ((name, content),) = stand_in.uploads.items()
    assert name.startswith("hotpath/") and name.endswith("/a.png") and content == (inputs / "a.png").read_bytes()
    assert stand_in.posted[0][1]["prompt"]["1"]["inputs"]["image"] == name


def test_a_prompt_longer_than_any_file_name_is_a_prompt(stand_in, inputs, tmp_path):
    long = {**COPY, "3": {"class_type": "PreviewAny", "inputs": {"source": "a lighthouse at dusk, " * 40}}}
    run_on_server(stand_in.url, Graph.parse(long), tmp_path / "out", inputs)
    assert stand_in.posted[0][1]["prompt"]["3"]["inputs"]["source"] == long["3"]["inputs"]["source"]
    assert len(stand_in.uploads) == 1


def test_nothing_is_overwritten_and_previews_go_apart(stand_in, tmp_path):
    kinds = {"b.png": "output", "t.png": "temp", "given.png": "input"}
    stand_in.behaviour["records"] = [{"filename": name, "type": kind} for name, kind in kinds.items()]
    for name in ("b.png", "b-2.png"):
        outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
        assert outcome.files[0].path == tmp_path / name
    assert outcome.files[1].temporary and outcome.files[1].path.parent == tmp_path / "preview"
    assert len(outcome.files) == 2


def test_results_that_are_on_this_machine_stay_where_they_are(stand_in, tmp_path):
    (tmp_path / "b.png").write_bytes(b"mine")
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path, at_hand={"output": tmp_path})
    assert outcome.files[0].path == tmp_path / "b.png" and (tmp_path / "b.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "record",
    [
        {"filename": "../../evil.png", "subfolder": "", "type": "output"},
        {"filename": "evil.png", "subfolder": "../..", "type": "output"},
        {"filename": "/tmp/evil.png", "subfolder": "", "type": "output"},
        {"filename": "..\\..\\evil.png", "subfolder": "", "type": "temp"},
    ],
)
def test_a_server_cannot_write_outside_the_folder(stand_in, tmp_path, record):
    stand_in.behaviour["records"] = [record]
    with pytest.raises(ServerError, match="refused"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path / "a" / "out")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("old", [False, True])
def test_a_lost_connection_is_waited_out(stand_in, tmp_path, old):
    """Without asking for everybody's prompts, where the server knows of single ones."""
    stand_in.behaviour.update(lose=True, old=old)
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
    assert outcome.files[0].path.is_file()
    assert [t.node.id for t in outcome.times] == ["1", "2"], "what was heard before and what was asked for, once"
    assert ("queue" in stand_in.asked) <= old


def test_a_busy_server_is_heard_to_the_end(stand_in, inputs, tmp_path, monkeypatch):
    """It answers that the run is over before it has told of it."""
    monkeypatch.setattr(server, "SOONEST", 0.02)
    stand_in.behaviour["busy"] = True
    watcher = Watcher()
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path / "out", inputs, watcher)
    assert watcher.seen == ["start 2 2/2", "progress 2 1.0/4.0"]
    assert "engine: tiny" in [text for _, text in outcome.texts]


def test_what_never_ceases_does_not_keep_a_run_that_is_over(stand_in, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "SOONEST", 0.02)
    monkeypatch.setattr(server, "LAST_WORDS", 0.3)
    stand_in.behaviour["monitor"] = True
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path / "out", inputs, Watcher())
    assert [text for _, text in outcome.texts] == ["hello"]


def test_a_connection_that_comes_back_is_heard_again(stand_in, tmp_path):
    stand_in.behaviour["lose"] = "for a moment"
    watcher = Watcher()
    outcome = run_on_server(stand_in.url, Graph.parse(COPY), tmp_path, observer=watcher)
    assert outcome.files and watcher.seen[-1] == "progress 2 3.0/4.0"
    assert len(stand_in.asked) == 2 and len(set(stand_in.asked)) == 1, "as the same client, or nothing would be heard"


def test_everybodys_prompts_are_asked_for_ever_more_rarely(stand_in, tmp_path, monkeypatch):
    """A hundred clients that wait behind a long queue must not each fetch all of it every second."""
    monkeypatch.setattr(server, "SOONEST", 0.05)
    stand_in.behaviour.update({"old": True, "waits behind others": True})
    run = ServerRun(stand_in.url, Graph.parse(COPY), tmp_path, None, None, None)

    async def waited() -> None:
        work = asyncio.ensure_future(run.execute())
        await asyncio.sleep(1.5)
        run.stop.set()
        await work

    with pytest.raises(ServerStopped):
        asyncio.run(waited())
    assert 2 <= stand_in.asked.count("queue") <= 6  # after 0.05, 0.15, 0.35, 0.75, (1.55) s, and at the end


def test_a_prompt_that_somebody_takes_out_of_the_queue_is_missed(stand_in, tmp_path):
    """The server says nothing of it to anybody."""
    stand_in.behaviour["waits behind others"] = "and is taken out"
    with pytest.raises(ServerError, match="took the run out of the queue"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)


def test_a_name_in_any_script_goes_up_as_it_is(stand_in, tmp_path):
    name = 'ein "Bild", 写真 #1.png'
    Image.new("RGB", (6, 4), "red").save(tmp_path / name)
    graph = {**COPY, "1": {"class_type": "LoadImage", "inputs": {"image": name}}}
    run_on_server(stand_in.url, Graph.parse(graph), tmp_path / "out", tmp_path)
    assert [uploaded.partition("/")[2].partition("/")[2] for uploaded in stand_in.uploads] == [name]


@pytest.mark.parametrize("old", [False, True])
def test_a_server_that_was_started_anew_does_not_know_the_run(stand_in, tmp_path, old):
    """It would be asked for ever."""
    stand_in.behaviour.update(lose="everything", old=old)
    with pytest.raises(ServerError, match=r"does not know this run any more.*Run the workflow again"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)


def test_an_error_names_node_and_inputs(stand_in, tmp_path):
    stand_in.behaviour["error"] = {
        "exception_message": "no room",
        "exception_type": "RuntimeError",
        "current_inputs": {"filename_prefix": ["copy"], "images": ["tensor(" + "0," * 100]},
    }
    with pytest.raises(ServerError) as caught:
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
    assert str(caught.value) == "SaveImage (#2) failed on the server: no room\n  its inputs: filename_prefix='copy'"


REASON = {"message": "Value not in list", "details": "image: 'a.png'", "extra_info": {"input_name": "image"}}
NODE_ERRORS = {"1": {"class_type": "LoadImage", "errors": [REASON], "dependent_outputs": ["2"]}}


def test_a_refusal_names_node_and_input(stand_in, tmp_path):
    stand_in.behaviour["refuse"] = {"error": {"message": "failed validation"}, "node_errors": NODE_ERRORS}
    with pytest.raises(ServerRefused, match=r"LoadImage \(#1\), input 'image': Value not in list"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)


def test_half_a_workflow_is_not_run(stand_in, tmp_path):
    stand_in.behaviour.update(node_errors=NODE_ERRORS, wait=True)
    with pytest.raises(ServerRefused, match="input 'image'"):
        run_on_server(stand_in.url, Graph.parse(COPY), tmp_path)
    assert ("queue", {"delete": ["p"]}) in stand_in.posted and ("interrupt", {"prompt_id": "p"}) in stand_in.posted


def test_an_older_comfyui_gets_its_names_of_inputs(stand_in, tmp_path):
    """Inputs that depend on a choice were plain ones: Save Video's `format.codec` was `codec`."""
    missing = {"type": "required_input_missing", "extra_info": {"input_name": "codec"}}
    stand_in.behaviour["refuse once"] = {"error": {}, "node_errors": {"2": {"errors": [missing]}}}
    newer = json.loads(json.dumps(COPY))
    newer["2"]["inputs"] |= {"format": "mp4", "format.codec": "h264"}
    run_on_server(stand_in.url, Graph.parse(newer), tmp_path)
    inputs = [body["prompt"]["2"]["inputs"] for name, body in stand_in.posted if name == "prompt"][-1]
    assert inputs == {**COPY["2"]["inputs"], "format": "mp4", "codec": "h264"}


def test_refusals_in_other_shapes():
    graph = Graph.parse(COPY)
    assert refusal({"error": "go away"}, graph) == "The server refused the workflow. go away"
    assert "LoadImage (#1): not found" in refusal(
        {"error": {"message": "not found", "extra_info": {"node_id": "1"}}}, graph
    )
    assert "gave no reason" in refusal({}, graph)
    assert str(failure({"node_id": "9", "node_type": "Made", "exception_type": "E"}, graph)).startswith(
        "Made (#9) failed"
    )


def test_ctrl_c_interrupts_only_our_prompt(stand_in, tmp_path):
    stand_in.behaviour["wait"] = True
    run = ServerRun(stand_in.url, Graph.parse(COPY), tmp_path, None, None, None)

    async def stopped() -> None:
        work = asyncio.ensure_future(run.execute())
        while not run.prompt_id:
            await asyncio.sleep(0.01)
        run.stop.set()
        await work

    with pytest.raises(ServerStopped):
        asyncio.run(stopped())
    assert ("interrupt", {"prompt_id": "p"}) in stand_in.posted


@pytest.mark.parametrize(
    ("moment", "told"),
    [
        ("upload", "before the workflow was queued"),
        ("in the queue", "was told to interrupt"),
        ("view", "results stay on the server"),
    ],
)
def test_ctrl_c_at_any_time(stand_in, inputs, tmp_path, moment, told):
    """One is enough, and what is left behind is said."""
    stand_in.behaviour.update({"wait at": moment, "waits behind others": moment == "in the queue"})
    run = ServerRun(stand_in.url, Graph.parse(COPY), tmp_path / "out", inputs, None, None)

    async def stopped() -> None:
        work = asyncio.ensure_future(run.execute())
        await asyncio.sleep(0.7)
        run.stop.set()
        await work

    started = time.monotonic()
    with pytest.raises(ServerStopped, match=told):
        asyncio.run(stopped())
    assert time.monotonic() - started < 10.0
    assert (("queue", {"delete": ["p"]}) in stand_in.posted) == (moment == "in the queue")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("given", "url"),
    [("127.0.0.1:8188", "http://127.0.0.1:8188"), ("https://a.example/comfy/", "https://a.example/comfy")],
)
def test_addresses(given, url):
    assert server_url(given) == url


@pytest.mark.parametrize("given", ["ftp://a", "file:///x", "http://", "javascript:alert(1)", "http://[::1"])
def test_addresses_that_are_refused(given):
    with pytest.raises(ServerError, match="not the address"):
        server_url(given)


def test_a_server_that_is_no_comfyui(tmp_path):
    with pytest.raises(ServerError, match="does not answer"):
        run_on_server(f"http://127.0.0.1:{free_port()}", Graph.parse(COPY), tmp_path)
