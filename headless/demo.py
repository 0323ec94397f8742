"""The demo: every example workflow in API format, run on small models of our own, shown on one page.

Where a ComfyUI is found all of them run in it, isolated from its own models and nodes; else those run here whose nodes
exist without ComfyUI, and the others are listed with the reason why not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..host.headless import HeadlessHost
from ..host.whole_files import refusal_told
from .contact_sheet import Sheet, write_sheet
from .executor import Executor, NodeFailed
from .graph import Graph, Node, WorkflowError
from .interrupts import stopped_by_ctrl_c
from .launcher import LaunchError, LaunchOptions, RunningServer, launched
from .locate import PACK
from .outcome import Outcome, OutputFile, outcome_of
from .picture_strip import write_strip
from .server import run_on_server
from .server_answers import ServerError
from .server_files import PREVIEWS
from .stand_ins import StandIns
from .validation import NeedsComfyUI

MARK = ".hotpath-demo"  # in a folder that the demo made and may empty again
SUFFIX = ".api.json"
LONGEST_NAME = 200
HELD_OUT = "colorize_held_out_film"


class DemoError(RuntimeError):
    """The demo cannot begin."""


@dataclass(frozen=True)
class DemoFiles:
    """What the demo runs: workflows and what they load."""

    # Not beside the editor's files: ComfyUI lists every .json there as a template.
    workflows: Path = PACK / "example_workflows" / "api"
    inputs: Path = PACK / "demo" / "inputs"
    models: Path = PACK / "demo" / "models"
    comfy_nodes: Path = PACK / "demo" / "comfy_nodes"
    stand_ins: Path = PACK / "demo" / "stand_ins.json"
    held_out_film: bool = False  # also colour a clip whose true colours are known

    def graphs(self, only: list[str] | None = None) -> list[Path]:
        """The workflow files, sorted; `only` keeps those with one of the words in their name."""
        found = sorted(self.workflows.glob(f"*{SUFFIX}")) if self.workflows.is_dir() else []
        return [path for path in found if not only or any(word in path.name for word in only)]

    def extra_nodes(self) -> list[Path]:
        if not self.comfy_nodes.is_dir():
            return []
        return sorted(p for p in self.comfy_nodes.iterdir() if (p / "__init__.py").is_file() or p.suffix == ".py")


@dataclass
class DemoResult:
    """What became of one workflow. `state` is done, failed or skipped; `reason` says why in the last two."""

    name: str
    state: str
    outcome: Outcome
    reason: str = ""
    inputs: list[Path] = field(default_factory=list)


Announce = Callable[[str], None]


def run_demo(
    output: Path, files: DemoFiles, comfyui: Path | None, announce: Announce, only: list[str] | None = None
) -> list[DemoResult]:
    """Run every workflow into `output`/<name>, write `output`/index.html and results.json. Raises DemoError."""
    workflows = files.graphs(only)
    if not workflows:
        raise DemoError(f"there is no workflow (*{SUFFIX}) to run in {files.workflows}.")
    _prepare(output)
    results: list[DemoResult] = []
    started = time.time()
    where = "headless"
    with contextlib.ExitStack() as stack:
        server: RunningServer | None = None
        if comfyui is not None:
            where = f"ComfyUI in {comfyui}"
            announce(f"Starting {where} ...")
            # A copy, because a server writes there; a workflow in a workflow names files that nobody uploads.
            copies = Path(tempfile.mkdtemp(prefix="hotpath-demo-"))
            # What Windows does not let go at once is no reason to fail at the end.
            stack.callback(shutil.rmtree, copies, ignore_errors=True)
            inputs = copies / "input"
            with refusal_told(inputs):
                # Not copytree, which makes of what the disk says a list of texts.
                for file in filter(Path.is_file, files.inputs.rglob("*")):
                    target = inputs / file.relative_to(files.inputs)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, target)
            options = LaunchOptions(
                input_folder=inputs, models=files.models, custom_nodes=files.extra_nodes(), isolated=True
            )
            try:
                server = stack.enter_context(launched(comfyui, options))
            except LaunchError as error:
                announce(f"{error}")
                reason = f"It did not start, so the others ran without it: {error}"
                results.append(DemoResult("ComfyUI", "failed", Outcome(where), reason))
                where = "headless"
        for path in workflows:
            name = path.name.removesuffix(SUFFIX)
            announce(f"{name} ...")
            result = _run_one(name, path, output / name, files, server)
            announce(f"  {result.state}{': ' + result.reason if result.reason else ''}")
            results.append(result)
    if files.held_out_film and (not only or any(word in HELD_OUT for word in only)):
        announce(f"{HELD_OUT} ...")
        results.append(_held_out_film(output / HELD_OUT))
        announce(f"  {results[-1].state}{': ' + results[-1].reason if results[-1].reason else ''}")
    write_strip(output, results)
    write_sheet(output, Sheet(where, started, results))
    (output / "results.json").write_text(json.dumps(_as_data(results, output), indent=2) + "\n", encoding="utf-8")
    return results


def _held_out_film(output: Path) -> DemoResult:
    """Before, after and truth of a clip no training saw, as a picture strip and a film."""
    from ..demo import colorize_demo

    outcome = Outcome("headless")
    node = Node("film", "hotpath.demo.colorize_demo", {}, "grey, Deep Exemplar, ColorMNet, truth")
    started = time.perf_counter()
    try:
        picture, film, text = colorize_demo.run(output)
    except (ImportError, OSError) as error:
        return DemoResult(HELD_OUT, "skipped", outcome, f"it needs scikit-image's photographs: {error}")
    outcome.seconds = time.perf_counter() - started
    outcome.files = [OutputFile(node, picture), OutputFile(node, film)]
    outcome.texts = [(node, text.read_text(encoding="utf-8").strip())]
    return DemoResult(HELD_OUT, "done", outcome)


def _prepare(output: Path) -> None:
    """An empty folder; only one that the demo made is emptied."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARK).is_file():
            raise DemoError(f"{output} holds files that the demo did not make; choose another --output-folder.")
        for entry in output.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    with refusal_told(output / MARK):
        (output / MARK).write_text("Made by `hotpath demo`, which empties this folder when it runs again.\n")


def _run_one(name: str, path: Path, output: Path, files: DemoFiles, server: RunningServer | None) -> DemoResult:
    outcome = Outcome("ComfyUI" if server is not None else "headless")
    inputs: list[Path] = []
    small = StandIns.read(files.stand_ins)
    try:
        if reason := small.not_here.get(name):
            return DemoResult(name, "skipped", outcome, reason)
        graph = small.apply(Graph.load(path))
        inputs = [_copied(file, output / "input") for file in _input_files(graph, files.inputs)]
        if server is not None:
            outcome = run_on_server(server.url, graph, output)
            outcome.where = "ComfyUI"
        else:
            outcome = _run_here(graph, output, files)
    except NeedsComfyUI as error:
        names = dict.fromkeys(node.class_type for node in error.missing)
        # The small stand-ins are ComfyUI's nodes too, but nobody knows them by name.
        missing = ", ".join(name for name in names if name not in small.nodes.values())
        return DemoResult(name, "skipped", outcome, f"it needs a ComfyUI for {missing}", inputs)
    except (WorkflowError, ServerError, NodeFailed, OSError) as error:
        if isinstance(error, NodeFailed):
            if _lacks_a_package(error):
                return DemoResult(name, "skipped", outcome, str(error), inputs)
            outcome.times = outcome_of(error.finished, HeadlessHost(output_folder=output, device="cpu")).times
        return DemoResult(name, "failed", outcome, str(error), inputs)
    return DemoResult(name, "done", outcome, "", inputs)


def _lacks_a_package(error: BaseException) -> bool:
    """Whether a library that is optional is at the bottom of it: then nothing failed, something is not installed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            return True
        cause = cause.__cause__
    return False


def _run_here(graph: Graph, output: Path, files: DemoFiles) -> Outcome:
    host = HeadlessHost(
        # What a workflow saves as a model must not land among ours.
        models=output / "models",
        extra_models=[files.models],
        input_folder=files.inputs,
        output_folder=output,
        temp_folder=output / PREVIEWS,
        show_progress=False,
    )
    with stopped_by_ctrl_c(host):
        return outcome_of(Executor(host, keep=False).run(graph), host)


def _input_files(graph: Graph, folder: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    for node in graph.nodes.values():
        for value in node.inputs.values():
            # A text, such as a workflow in a workflow, is longer than any file's name may be.
            named = isinstance(value, str) and 0 < len(value) < LONGEST_NAME and Path(value).name == value
            if named:
                path = folder / value
                if path.is_file() and path not in seen:
                    seen.add(path)
                    yield path


def _copied(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(source, folder / source.name))


def _as_data(results: list[DemoResult], output: Path) -> list[dict[str, object]]:
    return [
        {
            "workflow": result.name,
            "state": result.state,
            "reason": result.reason,
            "where": result.outcome.where,
            "seconds": round(result.outcome.seconds, 3),
            "nodes": [
                {
                    "id": t.node.id,
                    "class": t.node.class_type,
                    "seconds": None if t.seconds is None else round(t.seconds, 4),
                }
                for t in result.outcome.times
            ],
            "files": [
                str(f.path.relative_to(output.resolve()) if f.path.is_relative_to(output.resolve()) else f.path)
                for f in result.outcome.files
            ],
            "texts": [{"id": node.id, "class": node.class_type, "text": text} for node, text in result.outcome.texts],
        }
        for result in results
    ]
