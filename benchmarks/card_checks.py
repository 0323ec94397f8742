"""The first stages of `card.py`: the card's own rates, the Triton kernels on true sizes, the tests that need a card.

python benchmarks/card_checks.py health|kernels|tests [--json FILE] [--tiny]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from card_kernels import CHECKS, seconds_of
from checkout import ROOT
from quiet import alone
from report import processor, versions

ROW = "row: "  # begins the line of a result
PACKAGES = (
    "torch", "triton", "transformers", "diffusers", "torchao", "numpy", "onnx", "onnxruntime", "insightface", "av",
    "scikit-image", "scenedetect", "comfy-kitchen", "comfy-aimdo", "torchsde", "sageattention",
)  # fmt: skip


def copy_rate(numbers: int, device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 9)


def health(tiny: bool) -> dict[str, Any]:
    """The two rates that bound everything else, on random data: zeros would run faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found: dict[str, Any] = {"device": processor(device), "cores": os.cpu_count()}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "compute capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory, GiB": round(total / 2**30, 1),
            "free at the start, GiB": round(free / 2**30, 1),
        }
    else:
        found["note"] = "no CUDA: these are the CPU's rates"
    with alone():
        found["copy, GB/s read and written"] = copy_rate((1 << 20) if tiny else (1 << 30), device) / 1e9
        side = 256 if tiny else 8192
        for kind in dict.fromkeys((dtype, torch.float16 if device.type == "cuda" else dtype, torch.float32)):
            a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
            rate = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b, 9) / 1e12  # type: ignore[misc]
            found[f"{side}x{side}x{side} {str(kind).removeprefix('torch.')}, TFLOP/s"] = rate
        small = torch.zeros(1, device=device)
        start = time.perf_counter()
        for _ in range(1000):
            small.add_(1)
        found["launch, us of Python"] = (time.perf_counter() - start) * 1e3
    return found | versions(*PACKAGES)


def kernels(tiny: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every kernel against its definition in higher precision, and its time beside the same in torch."""
    found: dict[str, Any] = {"wrong": 0, "rows": []}
    for check in CHECKS:
        # Each in a process of its own: after an illegal access nothing runs in the old one.
        command = [sys.executable, __file__, "kernels", "--only", check, *(["--tiny"] if tiny else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(ROW):
                    row = json.loads(line.removeprefix(ROW))
                    found["wrong"] += not row["result"].startswith("agrees")
                    found["rows"].append(row)
                    save(found)
        if process.returncode:
            found["wrong"] += 1
            found["rows"].append({"kernel": check, "result": f"ended with {process.returncode}"})
            save(found)
    return found


def kernel(check: str, tiny: bool) -> None:
    """The rows of one check, printed one by one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = CHECKS[check](device, tiny)
    while True:
        try:
            row = next(made, None)
        except Exception as error:
            traceback.print_exc()
            row = {"kernel": f"{check}, the next one", "result": f"fails: {type(error).__name__}: {str(error)[:200]}"}
        if row is None:
            return
        print(ROW + json.dumps(row), flush=True)


def tests(tiny: bool, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu` over the files that hold such tests, in several processes: one that crashes takes one file along."""
    from card_plan import gpu_tests

    files = [str(ROOT / "tests" / "test_attention_local_window.py")] if tiny else list(gpu_tests())
    report = Path(os.environ.get("TMPDIR", "/tmp")) / f"card_tests_{os.getpid()}.xml"
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--timeout=300", "-p", "no:cacheprovider", "--durations=8",
        f"--junitxml={report}", *files,
    ]  # fmt: skip
    several = min(4, (os.cpu_count() or 1) // 2, len(files))
    if several > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(several), "--dist", "loadfile"]
    process = subprocess.Popen(command, cwd=ROOT)
    found: dict[str, Any] = {}
    try:
        found["exit code"] = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(2)  # pytest then writes what it knows
        found["exit code"] = f"stopped after {seconds:.0f} s"
        process.wait(8)
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    report.unlink(missing_ok=True)
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    found |= {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": [_failure(case) for case in bad],
    }
    if len(cases) == len(skipped):
        del found["failed"]  # nothing was tested
    return found


def _failure(case: ElementTree.Element) -> str:
    found = case.find("failure")
    element = found if found is not None else case.find("error")
    message = (element.get("message") or element.text or "") if element is not None else ""
    return f"{case.get('classname')}::{case.get('name')}: {' '.join(message.split())[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("health", "kernels", "tests"))
    parser.add_argument("--only", choices=CHECKS, help="of the kernels this check alone, its rows printed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    def save(found: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    if options.what == "tests":
        found = tests(options.tiny, options.seconds)
    else:
        with torch.inference_mode():
            if options.only:
                kernel(options.only, options.tiny)
                return 0
            found = health(options.tiny) if options.what == "health" else kernels(options.tiny, save)
    save(found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
