"""`hotpath demo`: the example workflows on small models, and a page that shows what came out."""

from __future__ import annotations

import argparse
from textwrap import shorten

from ..headless.demo import DemoError, DemoFiles, run_demo
from ..headless.locate import find_comfyui
from .console import complain, note, say, table

REPORT_WIDTH = 110  # letters on the terminal; the page has all of it


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 nothing failed, 1 a workflow failed, 2 the demo could not begin."""
    try:
        comfyui = None if options.headless else find_comfyui(options.comfyui)
        output = options.output_folder.resolve()
        results = run_demo(output, DemoFiles(held_out_film=True), comfyui, note, options.only)
    except (DemoError, FileNotFoundError) as error:
        complain(str(error))
        return 2
    rows = [
        (
            result.name,
            result.state,
            result.outcome.where,
            f"{result.outcome.seconds:.2f} s" if result.state == "done" else "-",
            shorten(result.reason or result.outcome.report(), REPORT_WIDTH, placeholder=" ..."),
        )
        for result in results
    ]
    say()
    say(table(rows, ("workflow", "state", "where", "time", "engine and report")))
    say()
    say(f"Pictures and times: {output / 'index.html'}", "bold")
    return 1 if any(result.state == "failed" for result in results) else 0
