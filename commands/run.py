"""`hotpath run`: a workflow here, on a server, or in a ComfyUI that is started for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..headless.executor import Executor, NodeFailed, RunStopped
from ..headless.graph import Graph, WorkflowError
from ..headless.interrupts import stopped_by_ctrl_c
from ..headless.launcher import LaunchError, LaunchOptions, launched
from ..headless.locate import find_comfyui
from ..headless.outcome import outcome_of
from ..headless.server import ServerStopped, run_on_server
from ..headless.server_answers import ServerError, ServerRefused
from ..headless.server_files import PREVIEWS
from ..headless.validation import NeedsComfyUI
from .console import complain, note
from .models_folder import headless_host
from .progress import TerminalObserver, report

INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C
FAILED, REFUSED = 1, 2


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 a node or the server failed, 2 the workflow was refused before it ran, 130 stopped."""
    observer = TerminalObserver(options.quiet)
    try:
        graph = Graph.load(options.workflow)
        for assignment in options.set or ():
            graph.set_input(assignment)
        if options.server:
            report(run_on_server(options.server, graph, options.output_folder, options.input_folder, observer))
            return 0
        if options.comfyui is None:
            try:
                return _run_here(graph, options, observer)
            except NeedsComfyUI:
                comfyui = None if options.headless else find_comfyui()
                if comfyui is None:
                    raise
        else:
            comfyui = find_comfyui(options.comfyui)
            assert comfyui is not None
        return _run_in_comfyui(comfyui, graph, options, observer)
    except (WorkflowError, FileNotFoundError, ServerRefused) as error:
        complain(str(error))
        return REFUSED
    except (ServerError, LaunchError) as error:
        complain(str(error))
        return FAILED
    except (ServerStopped, KeyboardInterrupt) as stop:
        note(str(stop) or "Stopped.", "yellow")
        return INTERRUPTED


def _run_here(graph: Graph, options: argparse.Namespace, observer: TerminalObserver) -> int:
    host = headless_host(
        options.models,
        input_folder=options.input_folder or Path.cwd(),
        output_folder=options.output_folder,
        device=options.device,
        show_progress=not options.quiet,
        temp_folder=options.output_folder / PREVIEWS,
    )
    executor = Executor(host, observer=observer, keep=False)
    with stopped_by_ctrl_c(host):
        try:
            result = executor.run(graph)
        except NodeFailed as failed:
            report(outcome_of(failed.finished, host))
            complain(str(failed))
            return FAILED
        except RunStopped as stopped:
            report(outcome_of(stopped.finished, host))
            note(str(stopped), "yellow")
            return INTERRUPTED
    report(outcome_of(result, host))
    return 0


def _run_in_comfyui(comfyui: Path, graph: Graph, options: argparse.Namespace, observer: TerminalObserver) -> int:
    note(f"Starting the ComfyUI in {comfyui} for this run ...", "dim")
    output: Path = options.output_folder.resolve()
    launch = LaunchOptions(
        input_folder=options.input_folder.resolve() if options.input_folder else None,
        output_folder=output,
        models=options.models,
    )
    with launched(comfyui, launch) as server:
        report(run_on_server(server.url, graph, output, observer=observer, at_hand={"output": output}))
    return 0
