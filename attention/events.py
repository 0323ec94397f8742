"""What ran where, and why: one event per signature, counted per model, as a report a person can read."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

log = logging.getLogger("hotpath.attention")

LONGEST = 256  # signatures per run that a log keeps apart; a video of changing size has no end of them


@dataclass(frozen=True)
class AttentionEvent:
    """One kind of call. requested: the policy's backend. used: what computed it. reason: why that one.

    where: the signature in words. compiled: it was traced into a graph, where calls are not counted.
    """

    requested: str
    used: str
    reason: str
    where: str
    compiled: bool = False

    def sentence(self) -> str:
        return f"{self.where}: {self.used}" + (f" ({self.reason})" if self.reason else "")


class AttentionLog:
    """Events of one model and how often each happened, for the run that goes on or went last. Safe across threads.

    Copying a model's options deeply must not split the log from the attention that writes it: copies are the log itself.
    """

    def __init__(self, requested: str = "auto") -> None:
        self.requested = requested
        self.preface: tuple[str, ...] = ()
        self.number = ""  # by which compiled graphs find it, once `compiled.number_of` gave it one
        self._counts: dict[AttentionEvent, int] = {}
        self._traced: dict[AttentionEvent, int] = {}
        self._said: set[AttentionEvent] = set()
        self._uncounted = 0
        self._runs = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> AttentionLog:
        return self

    def begin(self) -> None:
        """A run starts: counts are zero. What is traced into graphs stays, since graphs outlive runs."""
        with self._lock:
            self._counts.clear()
            self._uncounted = 0
            self._runs += 1

    def note(self, event: AttentionEvent) -> None:
        """Count one call, and write a line when it is the first of its kind on this model."""
        with self._lock:
            kept = self._traced if event.compiled else self._counts
            if event not in kept and len(kept) >= LONGEST:
                self._uncounted += 1
                return
            kept[event] = kept.get(event, 0) + 1
            first = event not in self._said
            if first and len(self._said) < 4 * LONGEST:
                self._said.add(event)
        if first:
            log.info("attention: %s asked for, %s", event.requested, event.sentence())

    @property
    def calls(self) -> int:
        """Calls counted since the run began."""
        with self._lock:
            return sum(self._counts.values()) + self._uncounted

    def events(self) -> dict[AttentionEvent, int]:
        with self._lock:
            return dict(self._counts)

    def report(self) -> str:
        """The run so far: a line per signature, most calls first."""
        with self._lock:
            counts, traced, uncounted, runs = dict(self._counts), dict(self._traced), self._uncounted, self._runs
        lines = [f"Attention: {self.requested}", *self.preface]
        if not counts and not traced:
            lines.append(
                "No call came here in the last sampling: a node after this one replaces attention, TorchCompileModel goes on "
                "with a graph that it made before this choice, or this kind of model computes it without asking what a node "
                "chose, as HunyuanDiT, Ernie-Image and ACE-Step do."
                if runs
                else "Nothing was sampled yet."
            )
        for event, count in sorted(counts.items(), key=lambda item: -item[1]):
            lines.append(f"{count} calls, {event.sentence()}")
        for event, count in sorted(traced.items(), key=lambda item: -item[1]):
            lines.append(f"compiled into a graph in {count} places, {event.sentence()}")
        if uncounted:
            lines.append(f"{uncounted} calls of further sizes")
        return "\n".join(lines)
