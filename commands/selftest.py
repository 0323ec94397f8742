"""`hotpath selftest`: the user's own model files, loaded, run, compared and timed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..headless.self_checks import CHECKS
from ..headless.selftest import CheckResult, Finding, run_checks
from .console import complain, note, say
from .models_folder import headless_host


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 all passed, 1 a check failed, 2 no such check, 3 there was nothing to check."""
    checks = [(name, check) for name, check in CHECKS if not options.names or any(n in name for n in options.names)]
    if not checks:
        complain(f"there is no check with that name; there are: {', '.join(name for name, _ in CHECKS)}.")
        return 2
    host = headless_host(options.models, device=options.device, show_progress=False)
    note(f"Computing on {host.device()}; models in {host.model_folders('')[0]}", "dim")
    results = run_checks(host, checks, None if options.json else _show)
    if options.json:
        say(json.dumps([_plain(result) for result in results], indent=2))
    else:
        for result in results:
            if result.absent is not None:
                say(f"skipped  {result.name}: {result.absent}", "yellow")
            elif result.failure is not None:
                say(f"FAILED   {result.name}: {result.failure}", "red")
    if not all(result.passed for result in results):
        return 1
    return 0 if any(result.findings for result in results) else 3


def _show(name: str, finding: Finding) -> None:
    say(f"{'passed ' if finding.passed else 'FAILED '}  {name}: {finding}", "green" if finding.passed else "red")


def _plain(result: CheckResult) -> dict[str, object]:
    findings = [{**asdict(finding), "passed": finding.passed} for finding in result.findings]
    return {**asdict(result), "findings": findings, "passed": result.passed}
