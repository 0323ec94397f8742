"""Items, job ids and seeds: what decides a result decides its id, and nothing else does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hotpath.distributed.items import (
    BadItems,
    FolderItems,
    Item,
    JsonLinesItems,
    ListItems,
    Repeated,
    open_items,
    text_item,
)
from hotpath.distributed.jobs import BadMap, MapPlan, Target, find_target, guess_target, refuse_nested
from hotpath.distributed.mapping import run_map
from hotpath.distributed.seeds import item_seed
from hotpath.distributed.worker import TOLD_EVERY, NotShared, WorkerHost, WorkerSettings, WorkflowWorker
from hotpath.headless.catalog import available_nodes
from hotpath.headless.graph import Graph, Node, WorkflowError
from hotpath.headless.validation import InvalidWorkflow, NeedsComfyUI
from map_workflows import COPY, listed, made, picture

IMAGE = Target("1", "image")
SEEDED = {
    "1": {"class_type": "Draws", "inputs": {"prompt": "a cat", "seed": 5}},
    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}


class Draws:
    """A node with a prompt and a seed."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seed = ("INT", {"default": 0, "min": -1, "max": 1000})
        return {"required": {"prompt": ("STRING", {}), "seed": seed}}

    def draw(self, prompt: str, seed: int) -> tuple[str]:
        return (f"{prompt} {seed}",)


@pytest.fixture
def catalog() -> dict[str, Any]:
    return {**available_nodes(), "Draws": Draws}


@pytest.fixture
def plan(catalog: dict[str, Any], headless_host: Any) -> Callable[..., MapPlan]:
    def make(graph: Any = COPY, target: Target | None = IMAGE, **options: Any) -> MapPlan:
        return MapPlan(Graph.parse(graph), catalog, target, headless_host.input_folder(), **options)

    return make


def test_a_folder_in_the_order_of_names(headless_host):
    folder = headless_host.input_folder() / "in"
    for name in ("b.png", "a.png", "a.jpg", ".hidden.png", "sub/c.png", "out/d.png"):
        picture(folder / name, len(name))
    (folder / "notes.txt").write_text("no picture")
    flat = list(FolderItems(folder, headless_host.input_folder()))
    assert [(item.label, item.value) for item in flat] == [
        ("a_jpg", "in/a.jpg"),
        ("a_png", "in/a.png"),
        ("b", "in/b.png"),
    ]
    deep = FolderItems(folder, headless_host.input_folder(), recursive=True, without=folder / "out")
    assert [item.label for item in deep] == ["a_jpg", "a_png", "b", "sub/c"]
    assert deep.count() == 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_unicode_fails_alone(pictures, request_for):
    with open(os.fsencode(pictures) + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123 - bytes are no path
        file.write((pictures / "p0.png").read_bytes())
    outcome = run_map(request_for(pictures))
    assert (outcome.status.done, outcome.status.failed) == (5, 1)
    assert outcome.failures == ["in/caf\ufffd.png: in/caf\ufffd.png has a name that is not Unicode: rename it."]


@pytest.mark.parametrize("line", ['{"1.text": "\\ud800"}', '"\\ud800"', '{"\\udc80": 1}', "[" * 100_000])
def test_a_line_that_nothing_can_hold_fails_alone(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(f'{line}\n"a cat"\n')
    broken, sound = JsonLinesItems(tmp_path / "list.jsonl")
    assert sound.value == "a cat" and sound.problem is None
    assert "not Unicode" in broken.problem or "not JSON" in broken.problem
    json.dumps([broken.label, str(broken.value), broken.problem], ensure_ascii=False).encode()


def test_half_a_letter_in_a_list():
    (broken,) = ListItems("a \ud83d")
    assert "not Unicode" in broken.problem and broken.label.encode()


def test_a_link_out_of_the_input_folder_or_to_itself_is_left_out(headless_host, tmp_path):
    inputs = headless_host.input_folder()
    picture(tmp_path / "secret" / "s.png", 1)
    picture(inputs / "a.png", 2)
    (inputs / "b.png").symlink_to(tmp_path / "secret" / "s.png")
    (inputs / "c.png").symlink_to("c.png")
    assert [item.label for item in FolderItems(inputs, inputs)] == ["a"]
    with pytest.raises(BadItems, match="outside the input folder"):
        FolderItems(tmp_path / "secret", inputs)


def test_lines_and_objects(tmp_path):
    (tmp_path / "l.txt").write_text("# comment\n\n a Red cat!\nein Käfer\n", encoding="utf-8")
    lines = list(open_items(str(tmp_path / "l.txt"), tmp_path))
    assert [item.value for item in lines] == ["a Red cat!", "ein Käfer"]
    assert [item.label.rpartition("-")[0] for item in lines] == ["a-red-cat", "ein-käfer"]
    (tmp_path / "l.jsonl").write_text(
        '"x"\n{"1.image": "a.png", "name": "Anna / 1"}\n{"image": 3}\nnonsense\n{"1.a": [1]}\n'
    )
    found = list(JsonLinesItems(tmp_path / "l.jsonl"))
    assert found[0].value == "x" and found[0].problem is None
    assert found[1].inputs == {"1.image": "a.png"} and found[1].label.startswith("anna-1-")
    assert [bool(item.problem) for item in found] == [False, False, True, True, True]
    assert "line 4 is not JSON" in (found[3].problem or "")
    assert open_items(str(tmp_path / "l.jsonl"), tmp_path).count() == 5


def test_items_that_are_called_alike_keep_their_own_results(headless_host, request_for):
    """a.png beside a.jpg becomes a_png, which is what a_png.webp is called by itself."""
    folder = headless_host.input_folder() / "in"
    for i, name in enumerate(("a.png", "a.jpg", "a_png.webp")):
        picture(folder / "x.png", i).rename(folder / name)
    first = run_map(request_for(folder))
    assert sorted(made(first.folder)) == ["a_jpg.png", "a_png-2.png", "a_png.png"]
    assert len(set(made(first.folder).values())) == 3
    again = run_map(request_for(folder))
    assert (again.status.done, again.status.skipped) == (0, 3) and made(again.folder) == made(first.folder)


def test_lines_with_the_same_first_digits_keep_their_own_results(request_for):
    """As among many prompts that begin alike; the same line twice is still one job."""

    class Alike:
        kind = "text"

        def __iter__(self):
            yield from (Item("a-cat-1234abcd", text[:1], text) for text in ("one", "two", "one", "three"))

        def count(self):
            return 4

    text = {"1": {"class_type": "PreviewAny", "inputs": {"source": "nothing"}}}
    for _ in range(2):
        outcome = run_map(request_for(Alike(), graph=text, target="1.source"))
        assert outcome.whole and [line["texts"] for line in listed(outcome.folder)] == [
            ["one"], ["two"], ["one"], ["three"]
        ]  # fmt: skip
        assert sorted(made(outcome.folder).values()) == [b"one\n", b"three\n", b"two\n"]


def test_a_folder_that_cannot_be_read_is_named(pictures, headless_host, monkeypatch):
    (pictures / "closed").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadItems, match=r"The folder .*closed cannot be read: Permission denied"):
        FolderItems(pictures, headless_host.input_folder(), recursive=True).count()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_list_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadItems, match=rf"{name} cannot be read: Permission denied"):
        list(open_items(str(tmp_path / name), tmp_path))


def test_a_list_is_read_as_it_is_needed(tmp_path):
    (tmp_path / "l.txt").write_text("".join(f"line {i}\n" for i in range(50_000)))
    lines = iter(ListItems(file=tmp_path / "l.txt"))
    assert [next(lines).value for _ in range(3)] == ["line 0", "line 1", "line 2"]


def test_an_id_is_made_of_what_decides_the_result(plan, headless_host):
    one, copy = picture(headless_host.input_folder() / "a.png", 1), headless_host.input_folder() / "b.png"
    copy.write_bytes(one.read_bytes())
    first, second = (
        plan().job(item) for item in FolderItems(headless_host.input_folder(), headless_host.input_folder())
    )
    assert first.id == second.id, "the same picture under another name is the same job"
    other = json.loads(json.dumps(COPY))
    other["2"]["inputs"]["filename_prefix"] = "else"
    titled = json.loads(json.dumps(COPY))
    titled["1"]["_meta"] = {"title": "My picture"}
    item = next(iter(FolderItems(headless_host.input_folder(), headless_host.input_folder())))
    assert plan(other).job(item).id != first.id
    assert plan(titled).job(item).id == first.id
    picture(copy, 2)
    assert plan().job(item).id == first.id


def test_a_file_that_travels_along_is_part_of_the_id(plan, headless_host):
    graph = {
        **COPY,
        "3": {"class_type": "LoadImage", "inputs": {"image": "reference.png"}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    reference = picture(headless_host.input_folder() / "sub" / "reference.png", 1)
    for seed, name in enumerate(("sub/reference.png", "sub\\reference.png", "sub/reference.png [input]"), 2):
        graph["3"]["inputs"]["image"] = name
        before = plan(graph).key
        assert plan(graph).key == before
        picture(reference, seed)
        assert plan(graph).key != before, name


@pytest.mark.parametrize("name", ["sub/a.png", "sub\\a.png", "sub/a.png [input]"])
def test_a_file_that_a_list_names_is_part_of_the_id(plan, headless_host, name):
    """Or a picture that was edited since would be said to be done."""
    file = picture(headless_host.input_folder() / "sub" / "a.png", 1)
    listed = [text_item(name), Item("a", "c", inputs={"1.image": name})]
    before = [plan().job(item) for item in listed]
    assert [plan().job(item).id for item in listed] == [job.id for job in before]
    assert all(job.payload(file, 1)["reads"] == [str(file.resolve())] for job in before)
    picture(file, 2)
    after = [plan().job(item) for item in listed]
    assert all(old.id != new.id for old, new in zip(before, after, strict=True))
    assert plan().job(text_item("a prompt")).files == ()


def test_seeds_follow_from_the_item_and_nothing_else(plan, catalog):
    target = Target("1", "prompt")
    jobs = {text: plan(SEEDED, target).job(text_item(text)) for text in ("a", "b")}
    seeds = {text: job.prompt["1"]["inputs"]["seed"] for text, job in jobs.items()}
    assert seeds["a"] != seeds["b"] and all(0 <= seed <= 1000 for seed in seeds.values())
    assert plan(SEEDED, target).job(text_item("a")).prompt == jobs["a"].prompt
    fixed = plan(SEEDED, target, seeds="workflow").job(text_item("a"))
    assert fixed.prompt["1"]["inputs"]["seed"] == 5 and fixed.id != jobs["a"].id
    wished = plan(SEEDED, target).job(Item("n", "c", "a", {"1.seed": 7}))
    assert wished.prompt["1"]["inputs"]["seed"] == 7
    assert {item_seed(5, "1", "x", 0, 1000) for _ in range(3)} == {item_seed(5, "1", "x", 0, 1000)}
    assert item_seed(5, "1", "x") != item_seed(6, "1", "x") != item_seed(6, "2", "x")


def test_where_an_item_goes(catalog):
    graph = Graph.parse(COPY)
    assert guess_target(graph, catalog, "picture") == Target("1", "image")
    assert find_target(graph, catalog, "LoadImage.image") == Target("1", "image")
    with pytest.raises(BadMap, match="no input of the workflow takes a video: name one as"):
        guess_target(graph, catalog, "video")
    two = {**COPY, "3": {"class_type": "LoadImage", "inputs": {"image": "y.png"}}}
    with pytest.raises(BadMap, match=r"could go into 1\.image \(LoadImage\), 3\.image"):
        guess_target(Graph.parse(two), catalog, "picture")
    with pytest.raises(WorkflowError, match="linked to another node"):
        find_target(graph, catalog, "2.images")
    with pytest.raises(WorkflowError, match="has no input 'nothing'"):
        find_target(graph, catalog, "1.nothing")


def test_what_no_item_could_run_with_is_refused(plan, headless_host):
    item = Item("a", "c", "not there.png")
    plan().check(item)  # this item fails by itself
    wrong = json.loads(json.dumps(COPY))
    wrong["2"]["inputs"] = {"filename_prefix": "x"}
    with pytest.raises(InvalidWorkflow, match="'images': it is required"):
        plan(wrong).check(item)
    with pytest.raises(NeedsComfyUI, match="KSampler"):
        plan({**COPY, "9": {"class_type": "KSampler", "inputs": {}}}).check(item)
    nested = {**COPY, "9": {"class_type": "HotpathMap", "inputs": {}}}
    with pytest.raises(BadMap, match="maps a workflow itself"):
        refuse_nested(Graph.parse(nested))


def test_a_folder_or_list_that_is_not_there(tmp_path):
    with pytest.raises(BadItems, match="There is no list"):
        open_items(str(tmp_path / "no.txt"), tmp_path)
    with pytest.raises(BadItems, match="There is no file"):
        open_items(str(tmp_path / "no.png"), tmp_path)
    with pytest.raises(BadItems, match="There is no folder"):
        FolderItems(tmp_path / "no", Path(tmp_path))


def test_progress_of_a_job_is_that_of_its_nodes_and_is_told_a_few_times_a_second(tmp_path, monkeypatch):
    told: list[float] = []
    now = 100.0
    monkeypatch.setattr("hotpath.distributed.worker.time.monotonic", lambda: now)
    worker, node = WorkerHost(WorkerSettings(str(tmp_path)), told.append, lambda: None), Node("1", "X", {})
    worker.progress(4).update(1)  # of a job whose nodes are not known yet
    for position, steps, waits in ((1, 5, 0.6), (1, 5, 1.5), (3, 0, 1.5), (4, 20, 1.5)):
        now += waits * TOLD_EVERY
        worker.started(node, position, 4)
        now += waits * TOLD_EVERY
        worker.progress(10).update(steps)
    assert told == [0.25, 0.125, 0.0, 0.125, 0.5, 0.5, 0.75, 1.0]


def test_a_worker_that_does_not_see_the_folders_says_so(tmp_path):
    missing = str(tmp_path / "not shared")
    with pytest.raises(NotShared, match=r"does not see .*not shared\. Workers of other machines need"):
        WorkflowWorker(WorkerSettings(str(tmp_path), sees=[str(tmp_path), missing]))


def test_items_that_are_repeated_have_names_and_contents_of_their_own():
    once, again = list(ListItems("a\nb")), list(Repeated(ListItems("a\nb"), 3))
    assert again[0] == once[0] and again[3] == once[1], "the result of a run without repeats is one of them"
    assert [item.label for item in again[:3]] == [once[0].label, f"{once[0].label}-v2", f"{once[0].label}-v3"]
    assert len({item.content for item in again}) == 6 and {item.value for item in again} == {"a", "b"}
    assert Repeated(ListItems("a\nb"), 3).count() == 6


def test_what_would_give_the_same_is_not_repeated(pictures, request_for):
    with pytest.raises(BadMap, match="the same 3 times: no seed in it differs"):
        run_map(request_for(pictures, repeat=3))
    with pytest.raises(BadMap, match="1 or more"):
        request_for(pictures, repeat=0)
