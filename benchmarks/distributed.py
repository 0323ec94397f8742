"""How `hotpath map` scales: measured on CPU workers of this machine, and simulated for machines that are not here.

    python benchmarks/distributed.py                     measure 1 and 2 workers, local and Ray, then simulate up to 64
    python benchmarks/distributed.py --no-ray --items 24

Measured: chroma transfer onto large pictures, one per job, one thread per worker; the pictures are compared byte by byte
first. The time counts from the moment all workers are ready, as they start once, and is given with the start as well.

Simulated: the scheduler that `hotpath map` uses, on workers that only exist in time, with job times drawn from those that
were measured. It shows what dispatching, stragglers and deaths cost. It knows nothing of disks, networks and heat, and is
no measurement of any GPU; the chart says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkout import ROOT
from hotpath import host
from hotpath.distributed import ray_cluster
from hotpath.distributed.items import FolderItems
from hotpath.distributed.local_pool import LocalPool
from hotpath.distributed.mapping import MapOptions, MapRequest, run_map
from hotpath.distributed.policy import POLICIES
from hotpath.distributed.ray_pool import RayPool
from hotpath.distributed.simulation import Cluster, simulate
from hotpath.distributed.status import Status
from hotpath.headless.graph import Graph
from hotpath.host.headless import HeadlessHost
from PIL import Image
from report import setting

COLOUR = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "colours.png"}},
    "3": {"class_type": "HotpathColorTransfer", "inputs": {"luminance": ["1", 0], "colours": ["2", 0]}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "coloured"}},
}
SIZES = (1, 2, 4, 8, 16, 32, 64)
JOBS = 4000  # of a simulated run
SPEEDUP_SEEDS = 5


class Clock:
    """When all workers were ready, when the last result came, and how long the run itself waited for workers."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.ready: float | None = None
        self.done_before = 0
        self.last = 0.0
        self.waited = 0.0

    def changed(self, status: Status) -> None:
        self.last = time.perf_counter()
        if self.ready is None and status.workers == self.workers:
            self.ready, self.done_before, self.waited = self.last, status.done, 0.0

    def watch(self, pool_class: type[Any]) -> Callable[[], None]:
        """Count the seconds in the pool's `wait`; returns what undoes it."""
        wait = pool_class.wait

        def watched(pool: Any, timeout: float) -> Any:
            begin = time.perf_counter()
            try:
                return wait(pool, timeout)
            finally:
                self.waited += time.perf_counter() - begin

        pool_class.wait = watched

        def undo() -> None:
            pool_class.wait = wait

        return undo


def pictures(folder: Path, count: int) -> None:
    """Pictures of several sizes, so that jobs differ as they do in a real folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        side = int(rng.integers(500, 1100))
        blocks = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((side * 3 // 2, side), Image.Resampling.BICUBIC).save(folder / f"{i:04}.png")
    Image.fromarray(rng.integers(0, 256, (12, 18, 3), dtype=np.uint8)).resize((300, 200)).save(
        folder.parent / "colours.png"
    )


def measure(folder: Path, executor: str, workers: int) -> dict[str, Any]:
    """One run in a fresh output folder."""
    here = host.current()
    models, kinds = here.all_model_folders()
    output = folder / f"{executor}-{workers}"
    # Always processes, so that one worker is started like two.
    options = MapOptions(executor, workers, "none", threads=1, in_process=False)
    request = MapRequest(
        Graph.parse(json.loads(json.dumps(COLOUR))), FolderItems(folder / "in", folder), folder, output,
        folder / "cache", "1.image", models=models, kind_folders=kinds, options=options,
    )  # fmt: skip
    clock = Clock(workers)
    undo = clock.watch(LocalPool if executor == "local" else RayPool)
    begin = time.perf_counter()
    try:
        outcome = run_map(request, clock)
    finally:
        undo()
    whole = time.perf_counter() - begin
    assert outcome.whole and clock.ready is not None, outcome.report()
    lines = [json.loads(line) for line in outcome.results.read_text("utf-8").splitlines()]
    work = clock.last - clock.ready
    return {
        "executor": executor,
        "workers": workers,
        "whole_seconds": whole,
        # Scaled to all items: one worker may have begun before the other was there.
        "work_seconds": work * len(lines) / max(1, len(lines) - clock.done_before),
        "serial_seconds": max(0.0, work - clock.waited) / len(lines),
        "jobs": [line["seconds"] for line in lines],
        "files": {line["item"]: (output / line["files"][0]).read_bytes() for line in lines},
    }


def simulated(jobs: Sequence[float], start: float, serial: float) -> dict[str, Any]:
    """Speed-up over one worker by policy and number, and by trouble for least_busy; the mean of a few drawings."""

    def drawn(seed: int) -> list[float]:
        rng = random.Random(seed)
        return [rng.choice(list(jobs)) for _ in range(JOBS)]

    def speedup(workers: int, policy: str, **trouble: Any) -> float:
        found = []
        for seed in range(SPEEDUP_SEEDS):
            lengths = drawn(seed)
            ran = simulate(Cluster(workers, start, serial, **trouble), lengths, policy, seed)
            found.append(sum(lengths) / ran.seconds)
        return sum(found) / len(found)

    mean = sum(jobs) / len(jobs)
    troubles: dict[str, dict[str, Any]] = {
        "nothing goes wrong": {},
        "2% of jobs take 10 times as long": {"straggler": (0.02, 10.0)},
        "a worker dies every 500 jobs": {"deaths": 1 / (500 * mean)},
    }
    return {
        "policies": {p: [speedup(n, p) for n in SIZES] for p in POLICIES},
        "troubles": {name: [speedup(n, "least_busy", **kind) for n in SIZES] for name, kind in troubles.items()},
    }


def chart(path: Path, measured: Sequence[dict[str, Any]], found: dict[str, Any], note: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.2), sharey=True)
    styles = {"least_busy": "o-", "round_robin": "s--", "random": "^:"}
    for axis, title in zip(axes, ("policies", "least_busy, when things go wrong"), strict=True):
        axis.plot(SIZES, SIZES, color="0.75", linewidth=1, label="as many times as fast as there are workers")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(SIZES, [str(n) for n in SIZES])
        axis.set_yticks(SIZES, [str(n) for n in SIZES])
        axis.set_xlabel("workers (simulated)")
        axis.set_title(f"SIMULATION: {title}", fontsize=11)
        axis.grid(color="0.92")
    axes[0].set_ylabel("times as fast as one worker")
    for policy, values in found["policies"].items():
        axes[0].plot(SIZES, values, styles[policy], markersize=5, label=f"{policy}, simulated")
    base = {run["executor"]: run["work_seconds"] for run in measured if run["workers"] == 1}
    for executor, marker in (("local", "*"), ("ray", "P")):
        points = [(r["workers"], base[executor] / r["work_seconds"]) for r in measured if r["executor"] == executor]
        if points:
            label = f"{executor}: measured on CPU workers of this machine"
            axes[0].plot(
                *zip(*points, strict=True), marker, markersize=12, color="black", fillstyle="none", label=label
            )
    for style, (name, values) in zip(("o-", "s--", "^:"), found["troubles"].items(), strict=True):
        axes[1].plot(SIZES, values, style, markersize=5, label=f"{name}, simulated")
    for axis in axes:
        axis.legend(fontsize=8, loc="upper left")
    figure.text(0.5, 0.01, note, ha="center", fontsize=8, color="0.35")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=48, help="pictures to colour")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "images" / "map_scaling.png")
    options = parser.parse_args(arguments)
    logging.getLogger("hotpath").setLevel(logging.ERROR)  # simulated deaths are many
    executors = ["local"] if options.no_ray or ray_cluster.missing() else ["local", "ray"]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        pictures(folder / "in", options.items)
        before = host.use(HeadlessHost(ROOT / "demo" / "models", folder, folder / "out", "cpu", show_progress=False))
        try:
            measured = [measure(folder, e, n) for e in executors for n in options.workers]
        finally:
            host.use(before)
    files = [run.pop("files") for run in measured]
    assert all(found == files[0] for found in files), "the pictures differ between runs"
    where = setting(torch.device("cpu"))
    print(where)
    print(f"{options.items} pictures; the same bytes from every run\n")
    print("executor  workers  work s  times  with start s  median job s  scheduling ms a job")
    for run in measured:
        base = next(r for r in measured if r["executor"] == run["executor"] and r["workers"] == options.workers[0])
        times = base["work_seconds"] / run["work_seconds"]
        median = sorted(run["jobs"])[len(run["jobs"]) // 2]
        print(
            f"{run['executor']:8}  {run['workers']:7}  {run['work_seconds']:6.1f}  {times:5.2f}  "
            f"{run['whole_seconds']:12.1f}  {median:12.3f}  {run['serial_seconds'] * 1000:20.1f}"
        )
    first = measured[0]
    # The first job of a worker pays for what is made once; later ones are what a long run is made of.
    jobs = first["jobs"][1:]
    start = first["whole_seconds"] - first["work_seconds"]
    serial = first["serial_seconds"]
    found = simulated(jobs, start, serial)
    print(
        f"\nSIMULATION: {JOBS} jobs, start {start:.1f} s and {serial * 1000:.1f} ms of the scheduler per job, as measured"
    )
    print("workers                             " + "".join(f"{n:7}" for n in SIZES))
    for name, values in {**found["policies"], **found["troubles"]}.items():
        print(f"{name:36}" + "".join(f"{value:7.1f}" for value in values))
    note = (
        f"Simulated with the real scheduler and job times measured on a CPU ({JOBS} jobs, mean {sum(jobs) / len(jobs):.2f} s, "
        f"{serial * 1000:.0f} ms of scheduling each). No GPU was measured."
    )
    chart(options.chart, measured, found, note)
    print(f"\n{options.chart}")
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "measured": measured, "simulated": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
