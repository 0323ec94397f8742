"""The client for a ComfyUI that runs, against a real one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hotpath.headless.graph import Graph
from hotpath.headless.server import ServerRun, ServerStopped, run_on_server
from hotpath.headless.server_answers import ServerError
from PIL import Image
from stand_in_comfyui import COPY, Watcher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def comfyui(demo_comfyui):
    return demo_comfyui


@pytest.mark.comfy
@pytest.mark.xdist_group("demo_comfyui")
class TestRealComfyUI:
    def test_a_graph_runs(self, comfyui, inputs, tmp_path):
        watcher = Watcher()
        outcome = run_on_server(comfyui.url, Graph.parse(COPY), tmp_path / "out", inputs, watcher)
        (saved,) = outcome.files
        assert Image.open(saved.path).size == (6, 4) and "prompt" in Image.open(saved.path).info
        assert [entry.split()[1] for entry in watcher.seen if entry.startswith("start")] == ["1", "2"]
        again = run_on_server(comfyui.url, Graph.parse(COPY), tmp_path / "out", inputs)
        assert all(t.seconds is None for t in again.times)  # the same content has the same name, so nothing ran

    def test_our_nodes_are_there(self, comfyui):
        import urllib.request

        with urllib.request.urlopen(f"{comfyui.url}/object_info") as answer:
            known = json.load(answer)
        from hotpath.nodes import NODE_CLASS_MAPPINGS

        assert set(NODE_CLASS_MAPPINGS) <= set(known)

    def test_bad_graphs(self, comfyui, tmp_path):
        graph = {
            **COPY,
            "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": -8, "batch_size": 1, "color": 0}},
        }
        with pytest.raises(ServerError, match=r"EmptyImage \(#1\), input 'height': .*smaller than min"):
            run_on_server(comfyui.url, Graph.parse(graph), tmp_path)
        graph = {**COPY, "1": {"class_type": "NobodyHasThis", "inputs": {}}}
        with pytest.raises(ServerError, match=r"NobodyHasThis \(#1\)"):
            run_on_server(comfyui.url, Graph.parse(graph), tmp_path)

    def test_a_node_that_fails(self, comfyui, inputs, tmp_path):
        graph = json.loads(json.dumps(COPY))
        graph["2"]["inputs"]["filename_prefix"] = "../../out"
        with pytest.raises(
            ServerError, match=r"(?s)SaveImage \(#2\) failed on the server: .*filename_prefix='../../out'"
        ) as caught:
            run_on_server(comfyui.url, Graph.parse(graph), tmp_path, inputs)
        assert "Traceback" not in str(caught.value)

    def test_an_interrupt(self, comfyui, inputs, tmp_path):
        graph = Graph.parse({"1": COPY["1"], "2": {"class_type": "Slow", "inputs": {"image": ["1", 0]}}})
        watcher = Watcher()
        run = ServerRun(comfyui.url, graph, tmp_path, inputs, watcher, None)

        async def stopped() -> None:
            work = asyncio.ensure_future(run.execute())
            while not any(entry.startswith("progress 2") for entry in watcher.seen):
                await asyncio.sleep(0.05)
            run.stop.set()
            await work

        started = time.monotonic()
        with pytest.raises(ServerStopped):
            asyncio.run(asyncio.wait_for(stopped(), 60))
        assert time.monotonic() - started < 30
        # And it takes the next one.
        assert run_on_server(comfyui.url, Graph.parse(COPY), tmp_path / "out", inputs).files

    def test_a_queue_and_a_connection_that_breaks(self, comfyui, inputs, tmp_path):
        """Who comes back hears on; a prompt that waits can be stopped at once, and is missed when somebody removes it."""

        class Breaks(ServerRun):
            connections = 0

            async def _listen(self, socket):
                self.connections, self.loop = self.connections + 1, asyncio.get_running_loop()
                if self.connections == 1:
                    self.loop.call_later(0.5, lambda: asyncio.ensure_future(socket.close()))
                return await super()._listen(socket)

        slow = Graph.parse({"1": COPY["1"], "2": {"class_type": "Slow", "inputs": {"image": ["1", 0]}}})
        watcher = Watcher()
        long = Breaks(comfyui.url, slow, tmp_path, inputs, watcher, None)
        ended: list[BaseException] = []

        def run_it() -> None:
            try:
                asyncio.run(long.execute())
            except BaseException as error:
                ended.append(error)

        def wait_for(condition) -> None:
            end = time.monotonic() + 30
            while not condition():
                assert time.monotonic() < end and not ended
                time.sleep(0.02)

        async def queued(until) -> None:
            run = ServerRun(comfyui.url, Graph.parse(COPY), tmp_path, inputs, None, None)

            async def then() -> None:
                while not run.prompt_id:
                    await asyncio.sleep(0.02)
                await until(run)

            task = asyncio.ensure_future(then())
            await run.execute()
            await task

        async def stop(run) -> None:
            run.stop.set()

        async def remove(run) -> None:
            await run.session.post(f"{comfyui.url}/queue", json={"delete": [run.prompt_id]})

        thread = threading.Thread(target=run_it)
        thread.start()
        wait_for(lambda: watcher.seen and watcher.seen[-1].startswith("progress 2"))
        with pytest.raises(ServerStopped):
            asyncio.run(queued(stop))
        with pytest.raises(ServerError, match="somebody took the run out of the queue"):
            asyncio.run(queued(remove))
        wait_for(lambda: long.connections == 2)
        heard = len(watcher.seen)
        wait_for(lambda: len(watcher.seen) > heard + 2)
        long.loop.call_soon_threadsafe(long.stop.set)
        thread.join(30)
        assert isinstance(ended[0], ServerStopped)

    def test_a_name_in_another_script(self, comfyui, tmp_path):
        """As long as a name can be, which no longer fits when it is quoted on its way."""
        name = "写" * 80 + " 1.png"
        Image.new("RGB", (6, 4), "red").save(tmp_path / name)
        graph = Graph.parse({**COPY, "1": {"class_type": "LoadImage", "inputs": {"image": name}}})
        assert run_on_server(comfyui.url, graph, tmp_path / "out", tmp_path).files

    def test_ctrl_c_on_the_command_line(self, comfyui, inputs, tmp_path):
        graph = {"1": COPY["1"], "2": {"class_type": "Slow", "inputs": {"image": ["1", 0]}}}
        (tmp_path / "wf.json").write_text(json.dumps(graph))
        command = [sys.executable, str(ROOT), "run", str(tmp_path / "wf.json"), "--server", comfyui.url]
        process = subprocess.Popen(
            [*command, "--input-folder", str(inputs)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Slow" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130, rest
        assert "Traceback" not in "".join(lines) + rest and "told to interrupt" in rest
