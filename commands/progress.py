"""Shows on the terminal what a run is doing, node by node."""

from __future__ import annotations

import sys

from ..headless.executor import NodeRun
from ..headless.graph import Node
from ..headless.outcome import Outcome
from .console import note, say

BAR = 30


class TerminalObserver:
    """One line per node; on a terminal, a bar while a server reports steps."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar_open = False

    def started(self, node: Node, position: int, total: int) -> None:
        self._close_bar()
        if not self.quiet:
            note(f"[{position}/{total}] {node}", "dim")

    def finished(self, run: NodeRun, position: int, total: int) -> None:
        if not self.quiet and run.cached:
            note(f"[{position}/{total}] {run.node}: unchanged", "dim")

    def progress(self, node: Node, done: float, total: float) -> None:
        if self.quiet or not sys.stderr.isatty() or total <= 0:
            return
        filled = round(BAR * min(done / total, 1.0))
        sys.stderr.write(f"\r  {'#' * filled}{'.' * (BAR - filled)} {done:g}/{total:g} ")
        sys.stderr.flush()
        self._bar_open = True

    def _close_bar(self) -> None:
        if self._bar_open:
            sys.stderr.write("\n")
            self._bar_open = False


def report(outcome: Outcome) -> None:
    """Say what came out: texts, files, and where and how long it ran."""
    for node, text in outcome.texts:
        say(f"{node.title or node.class_type} (#{node.id}):", "bold")
        say("\n".join(f"  {line}" for line in text.splitlines()))
    for file in outcome.files:
        say(f"{file.path}{'  (preview)' if file.temporary else ''}")
    ran = sum(time.seconds is not None for time in outcome.times)
    note(f"{ran} nodes in {outcome.seconds:.1f} s ({outcome.where})", "dim")
