"""What a run gave, wherever it ran: files, texts and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..host.headless import HeadlessHost
from .executor import RunResult
from .graph import Node

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif"}


@dataclass(frozen=True)
class OutputFile:
    """A file a node showed or saved; `temporary` ones are previews."""

    node: Node
    path: Path
    temporary: bool = False

    @property
    def kind(self) -> str:
        return self.kind_of(self.path)

    @staticmethod
    def kind_of(path: Path) -> str:
        """image, video or file."""
        suffix = path.suffix.lower()
        return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else "file"


@dataclass(frozen=True)
class NodeTime:
    """Seconds at a node; None when the result of an earlier run was used."""

    node: Node
    seconds: float | None


@dataclass
class Outcome:
    """The result of one workflow. `where` says what ran it, such as "headless, cpu"."""

    where: str
    seconds: float = 0.0
    times: list[NodeTime] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    texts: list[tuple[Node, str]] = field(default_factory=list)

    def report(self) -> str:
        """The first line that each node has to say, in one line."""
        first: dict[str, str] = {}
        for node, text in self.texts:
            if text.strip():
                first.setdefault(node.id, text.strip().splitlines()[0])
        return "; ".join(dict.fromkeys(first.values()))


def outcome_of(result: RunResult, host: HeadlessHost) -> Outcome:
    """The outcome of a headless run, also of one that ended early."""
    outcome = Outcome(f"headless, {host.device()}", result.seconds)
    roots = {"output": host.output_folder(), "temp": host.temp_folder(), "input": host.input_folder()}
    for run in result.runs.values():
        outcome.times.append(NodeTime(run.node, None if run.cached else run.seconds))
        for entries in run.ui.values():
            for entry in entries:
                if is_file_record(entry):
                    path = roots[entry["type"]] / entry.get("subfolder", "") / entry["filename"]
                    outcome.files.append(OutputFile(run.node, path, entry["type"] == "temp"))
        outcome.texts.extend((run.node, str(text)) for text in run.ui.get("text", []))
    return outcome


def is_file_record(entry: Any) -> bool:
    """Whether a `ui` entry names a file in one of the three folders."""
    return (
        isinstance(entry, dict) and "filename" in entry and entry.get("type", "output") in ("output", "temp", "input")
    )
