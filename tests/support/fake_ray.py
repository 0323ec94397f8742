"""Ray's calls, answered at once: for what a real cluster does only when something breaks."""

from __future__ import annotations

from typing import Any

METHODS = ("pid", "begin", "run", "fraction", "end")


class FakeRay:
    """answers: by the name of a method what an actor answers, or raises; without one it waits. asked: those methods."""

    class Call:
        def __init__(self, name: str, fake: FakeRay) -> None:
            self.name, self.fake = name, fake

        def remote(self, *_: Any) -> tuple[str, int]:
            self.fake.asked.append(self.name)
            return self.name, len(self.fake.asked)

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.killed = answers, 0
        self.asked: list[str] = []

    def remote(self, **_: Any):
        fake = self

        class Actor:
            pid, begin, run, fraction, end = (fake.Call(name, fake) for name in METHODS)

        class Handle:
            remote = staticmethod(lambda *_: Actor())

        return lambda _: Handle

    def wait(self, references, num_returns, timeout):
        there = [r for r in references if self.answers.get(r[0]) is not None]
        return there[:num_returns], []

    def get(self, reference):
        answer = self.answers[reference[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor, no_restart):
        self.killed += 1
