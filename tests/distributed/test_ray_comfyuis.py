"""Ray actors with a ComfyUI each: what an actor does on its machine, and how the run sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_ray import FakeRay
from hotpath.cli import parser
from hotpath.commands import map as command
from hotpath.distributed import ray_cluster, ray_placing, ray_worker
from hotpath.distributed.comfyui_places import FOLDER, ComfyUIs
from hotpath.distributed.jobs import BadMap
from hotpath.distributed.mapping import run_map
from hotpath.distributed.pool import Died, Finished, Ready
from hotpath.distributed.ray_placing import RayComfyUIs
from hotpath.distributed.ray_worker import ComfyUISettings, WithComfyUI
from hotpath.headless.graph import Graph
from hotpath.headless.launcher import LaunchError
from map_workflows import COPY, made
from stand_in_comfyui import standing_in

needs_ray = pytest.mark.skipif(ray_cluster.missing() is not None, reason="Ray is not installed")


@pytest.fixture
def there(monkeypatch, tmp_path):
    """A machine on which the ComfyUI that is started is one that stands in: `Place` says how that went."""

    class Place:
        fails: Exception | None = None
        opened_with: Any = None
        ends = threading.Event()
        closed = False

        def __init__(self, comfyui: Path, options: Any, folder: Path, name: str) -> None:
            Place.opened_with, self.folder = (comfyui, options), folder

        @contextlib.contextmanager
        def opened(self, unwanted: Any) -> Iterator[tuple[str, dict[str, Path]]]:
            if Place.fails is not None:
                raise Place.fails
            own = {name: self.folder / name for name in ("output", "temp")}
            for folder in own.values():
                folder.mkdir(parents=True)
            yield Place.server.url, own
            Place.closed = True

        def wait(self) -> None:
            Place.ends.wait(20)

        def ended(self) -> str | None:
            return "It was killed." if Place.ends.is_set() else None

        def kill(self) -> None:
            Place.ends.set()

    monkeypatch.setattr(ray_worker, "Started", Place)
    monkeypatch.setattr(ray_worker, "find_comfyui", lambda explicit=None: explicit or tmp_path / "found")
    with standing_in() as Place.server:
        yield Place
    Place.ends.set()


def settings(tmp_path: Path, **given: Any) -> ComfyUISettings:
    return ComfyUISettings(**{"folder": None, "output": str(tmp_path), "needed": ["LoadImage", "SaveImage"], **given})


def job(tmp_path: Path, **given: Any) -> dict[str, Any]:
    return {"id": "j", "attempt": 1, "prompt": COPY, "staging": str(tmp_path / "s"), "touched": ["1"], **given}


def test_what_an_actor_does_with_its_comfyui(there, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told: list[float] = []
    worker = WithComfyUI(settings(tmp_path, arguments=["--lowvram"]).plain(), told.append)
    answer = worker.begin()
    assert sorted(answer["nodes"]) == ["LoadImage", "SaveImage"] and answer["nodes"]["SaveImage"]["output_node"]
    folder, options = there.opened_with
    assert folder == tmp_path / "found" and list(options.arguments) == ["--lowvram"]
    assert "OMP_NUM_THREADS" not in os.environ, (
        "of an actor that holds no cores; a ComfyUI on a GPU takes what there is"
    )
    there.server.behaviour["records"] = []
    assert worker.run(job(tmp_path))["texts"] == [[True, "hello"], [True, "engine: tiny"]] and told
    assert "shared storage" in worker.run(job(tmp_path, reads=[str(tmp_path / "nothing")]))["error"]
    # It ends in the middle of a job.
    there.server.behaviour["wait"] = True
    threading.Timer(0.1, there.ends.set).start()
    assert worker.run(job(tmp_path)) == {"gone": "It was killed."}
    worker.end()
    assert there.closed


def test_why_an_actor_has_no_comfyui(there, tmp_path, monkeypatch):
    def begun(**given: Any) -> tuple[str, bool]:
        worker = WithComfyUI(settings(tmp_path, **given).plain(), lambda fraction: None)
        answer = worker.begin()
        worker.end()
        return answer["refused"], answer["final"]

    why, final = begun(needed=["SaveImage", "NobodyHasThis"])
    assert final and "does not have these nodes: NobodyHasThis. Install" in why and there.closed
    why, final = begun(sees=[str(tmp_path / "nothing")])
    assert final and "shared storage" in why
    there.fails = LaunchError("ComfyUI ended with code 1 while it started.")
    why, final = begun()
    assert not final and why.startswith("The ComfyUI on ") and why.endswith("with code 1 while it started.")
    monkeypatch.setattr(ray_worker, "find_comfyui", lambda explicit=None: None)
    why, final = begun()
    assert final and "finds no ComfyUI: name its folder there" in why


def pool(tmp_path: Path, workers: int, **answers: Any) -> RayComfyUIs:
    fake = FakeRay({"end": None, **answers})
    return RayComfyUIs(ray_placing._Shares(fake, workers, 1.0, 0.0), settings(tmp_path), tmp_path / "work")


@needs_ray
def test_the_first_says_what_nodes_there_are_and_the_others_follow(tmp_path):
    declared = {"SaveImage": {"input": {}, "output": [], "output_node": True}}
    fine = pool(tmp_path, 2, pid=1, begin={"nodes": declared}, run={"status": "done"})
    assert fine.known_nodes(lambda: None)["SaveImage"].OUTPUT_NODE and fine._ray.asked == ["pid", "begin"]
    fine.start()
    assert fine.wait(0) == [Ready(0)], "what was seen before anybody asked"
    assert [*fine.wait(0), *fine.wait(0)] == [Ready(1)]
    fine.submit(0, {"id": "j"})
    fine._asked_at[0] = time.monotonic()
    assert fine.wait(0) == [Finished(0, "j", {"status": "done"})]
    fine.close()
    assert fine._ray.asked.count("end") == 2 and fine._ray.killed == 2


@needs_ray
def test_a_comfyui_that_is_gone_is_started_again_and_none_is_told(tmp_path):
    gone = pool(tmp_path, 1, pid=1, begin={"nodes": {}}, run={"gone": "It was killed."})
    gone.start()
    gone.wait(0), gone.wait(0)
    gone.submit(0, {"id": "j"})
    gone._asked_at[0] = time.monotonic()
    assert gone.wait(0) == [Died(0, "It was killed.", "j")]
    assert gone._ray.asked == ["pid", "begin", "run", "end", "pid"], "its actor ends it before the next one begins"
    none = pool(tmp_path, 3, pid=1, begin={"refused": "There is no ComfyUI.", "final": True})
    with pytest.raises(BadMap, match=r"^There is no ComfyUI\.$"):
        none.known_nodes(lambda: None)


def test_on_a_cluster_every_machine_knows_its_own_comfyui(monkeypatch):
    def wanted(graph: Any, *words: str) -> ComfyUIs | None:
        given = parser().parse_args(["map", "flow.json", "--over", "lines.txt", "--executor", "ray", *words])
        return command._comfyui(given, Graph.parse(graph))

    monkeypatch.setattr(command, "find_comfyui", lambda explicit=None: pytest.fail("it is not looked for here"))
    sampler = {"1": {"class_type": "KSampler", "inputs": {}}}
    assert wanted(COPY) is None and wanted(sampler, "--headless") is None
    assert wanted(sampler) == ComfyUIs()
    for named, meant in (("there", Path.cwd() / "there"), ("~/ComfyUI", Path("~/ComfyUI"))):
        assert wanted(COPY, "--comfyui", named) == ComfyUIs(folder=meant)


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.xdist_group("ray")
@needs_ray
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_actors_with_comfyuis_of_which_one_is_killed(ray, pictures, request_for, comfyui_path, tmp_path):
    graph = {
        **COPY,
        "3": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "sub/inverted"}},
    }
    killed: list[int] = []

    def comfyuis() -> list[psutil.Process]:
        mine = str(tmp_path)
        return [p for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or ())]

    class Killer:
        def changed(self, status) -> None:
            if status.done == 2 and not killed:
                (process,) = comfyuis()
                killed.append(process.pid)
                os.killpg(process.pid, signal.SIGKILL)

    request = request_for(pictures, graph=graph, executor="ray", workers=1)
    request = replace(request, comfyui=ComfyUIs(folder=comfyui_path))
    outcome = run_map(request, Killer())
    assert outcome.whole and killed and outcome.workers == "1 Ray actor with 1 CPU and a ComfyUI each"
    names = ["copy_00001_.png", "sub/inverted_00001_.png"]
    assert list(made(outcome.folder)) == [f"p{i}/{name}" for i in range(5) for name in names]
    assert not (outcome.folder / ".hotpath-map" / FOLDER).exists() and not comfyuis()
