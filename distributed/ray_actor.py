"""The actor, as Ray sends it to a machine: it finds the pack there, and keeps one worker."""

from __future__ import annotations

from typing import Any

from .bootstrap import load_pack


class HotpathWorker:
    """Only the standard library may be used here before the pack is found."""

    def __init__(self, root: str, kind: str, settings: dict[str, Any]) -> None:
        self._root, self._kind, self._settings = root, kind, settings
        self._fraction = 0.0
        self._worker: Any = None

    def _tell(self, fraction: float) -> None:
        self._fraction = fraction

    def pid(self) -> int:
        import os

        return os.getpid()

    def begin(self) -> dict[str, Any]:
        """Make the worker. As `ray_worker.WORKERS` answer, or {"refused": why, "final": True} on a machine without the pack."""
        import importlib

        try:
            there = importlib.import_module(load_pack(self._root) + ".distributed.ray_worker")
        except ImportError as error:
            return {"refused": str(error), "final": True}
        self._worker = there.WORKERS[self._kind](self._settings, self._tell)
        return dict(self._worker.begin())

    def fraction(self) -> float:
        """How much of the running job is done, 0..1."""
        return self._fraction

    def run(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._fraction = 0.0
        return dict(self._worker.run(payload))

    def end(self) -> None:
        """Give back what outlives the process, such as a ComfyUI; whatever runs is broken off."""
        if self._worker is not None:
            self._worker.end()
