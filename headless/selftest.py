"""Checks of the user's own model files: load, run, compare the fast path with the reference path, time it.

A family's check is a generator function over the host that yields one `Finding` per comparison. It raises `Absent` when
its model files are not here. `CHECKS` lists them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .. import host as hosts
from ..host import Host
from ..host.device_work import wait_for

Result = TypeVar("Result")


class Absent(Exception):
    """What is to be checked is not on this machine; the message says what is missing and where it belongs."""


@dataclass(frozen=True)
class Finding:
    """One comparison. `error` is the largest difference found and `limit` what is still right, in the unit named."""

    what: str
    error: float
    limit: float
    unit: str = "relative difference"
    seconds: float | None = None
    reference_seconds: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN too

    def __str__(self) -> str:
        times = ""
        if self.seconds is not None:
            times = f", {self.seconds * 1000:.1f} ms"
            if self.reference_seconds is not None:
                times += f" (reference {self.reference_seconds * 1000:.1f} ms)"
        return f"{self.what}: {self.unit} {self.error:.2g} (limit {self.limit:.2g}){times}"


Check = Callable[[Host], Iterator[Finding]]


@dataclass(frozen=True)
class CheckResult:
    """A family's check: its findings, and why it was not made (`absent`) or broke off (`failure`)."""

    name: str
    findings: tuple[Finding, ...] = ()
    absent: str | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and all(finding.passed for finding in self.findings)


def run_checks(
    host: Host, checks: Sequence[tuple[str, Check]], on_finding: Callable[[str, Finding], None] | None = None
) -> list[CheckResult]:
    """Run `checks`, each for itself: one that breaks does not stop the others."""
    results = []
    before = hosts.use(host)
    try:
        for name, check in checks:
            findings: list[Finding] = []
            absent = failure = None
            try:
                for finding in check(host):
                    findings.append(finding)
                    if on_finding is not None:
                        on_finding(name, finding)
            except Absent as reason:
                absent = str(reason)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            results.append(CheckResult(name, tuple(findings), absent, failure))
    finally:
        hosts.use(before)
    return results


def timed(work: Callable[[], Result], device: torch.device, repeats: int = 3) -> tuple[Result, float]:
    """The result, and the shortest time of `repeats` runs after one to warm up, with the device's work included."""
    result = work()
    best = float("inf")
    for _ in range(repeats):
        wait_for(device)
        started = time.perf_counter()
        result = work()
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return result, best


def relative_difference(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest reference value."""
    reference = reference.float().cpu()
    return float((result.float().cpu() - reference).abs().max() / reference.abs().max().clamp_min(1e-12))
