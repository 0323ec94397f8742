"""The actor, as Ray sends it to a machine: it finds the pack there, and keeps one worker."""

from __future__ import annotations

from typing import Any

from .bootstrap import load_pack


class HotpathWorker:
    """Only the standard library may be used here before the pack is found."""

    def __init__(self, root: str, settings: dict[str, Any]) -> None:
        import importlib

        worker = importlib.import_module(load_pack(root) + ".distributed.worker")
        self._fraction = 0.0
        self._worker = worker.WorkflowWorker(worker.WorkerSettings(**settings), self._tell)

    def _tell(self, fraction: float) -> None:
        self._fraction = fraction

    def pid(self) -> int:
        import os

        return os.getpid()

    def fraction(self) -> float:
        """How much of the running job is done, 0..1."""
        return self._fraction

    def run(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._fraction = 0.0
        return dict(self._worker.run(payload))
