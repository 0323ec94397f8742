"""Attention backends against each other, at the shapes of image and video models.

    python benchmarks/attention.py                             # all shapes on the GPU; scaled down on a CPU
    python benchmarks/attention.py --shapes z_image_1024 sdxl_self --dtype float16 --repeats 20
    python benchmarks/attention.py --masks none bool --write   # appends the table to RESULTS.md
    python benchmarks/attention.py --compiled                  # also inside torch.compile

Every backend runs on the same tensors, round after round in turn; the table has the median and the fastest round, TFLOP/s
of the two products, and the cosine and largest error against float32 on a slice. A backend that cannot run says why.
`dispatcher` is this pack's `auto`, with what choosing costs per call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import checkout  # noqa: F401 - before the pack, which it makes importable
import torch
from hotpath.attention import compiled
from hotpath.attention.capabilities import AttentionCall, device_facts
from hotpath.attention.choice import MeasuredChoices
from hotpath.attention.dispatch import (
    BACKENDS,
    AttentionDispatcher,
    AttentionPolicy,
    attend,
    library_versions,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.reference import attention_reference, share_heads
from hotpath.host.errors import kind_and_line
from quiet import alone
from report import add_to_results, command, setting


@dataclass(frozen=True)
class Shape:
    """[batch, heads, queries, width] by keys; key_heads where they are shared."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    key_heads: int | None = None

    def smaller(self) -> Shape:
        """For a CPU: an eighth of the length, at most 512."""
        return Shape(
            1, min(self.heads, 4), min(self.queries // 8, 512) or 1, max(min(self.keys // 8, 512), 16), self.width,
            None if self.key_heads is None else min(self.key_heads, 2),
        )  # fmt: skip

    @property
    def operations(self) -> float:
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.width

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As models hand them over: [B, N, heads, D] in memory, seen as [B, heads, N, D]."""
        generator = torch.Generator().manual_seed(0)

        def make(length: int, heads: int) -> torch.Tensor:
            values = torch.randn(self.batch, length, heads, self.width, generator=generator)
            return values.to(device, dtype).transpose(1, 2)

        heads = self.key_heads or self.heads
        return make(self.queries, self.heads), make(self.keys, heads), make(self.keys, heads)


SHAPES = {
    "z_image_1024": Shape(1, 30, 4128, 4128, 128),
    "z_image_1536": Shape(1, 30, 9248, 9248, 128),
    "flux_1024": Shape(1, 24, 4608, 4608, 128),
    "wan_480p": Shape(1, 12, 32760, 32760, 128),
    "lumina2_1024": Shape(1, 24, 4352, 4352, 96, 8),
    "sdxl_self": Shape(2, 10, 4096, 4096, 64),
    "sdxl_deep": Shape(2, 20, 1024, 1024, 64),
    "sdxl_cross": Shape(2, 10, 4096, 77, 64),
    "qwen_vision": Shape(1, 16, 1024, 1024, 72),
}
MASKS = ("none", "bool", "float")


@dataclass
class Row:
    """One backend at one shape. milliseconds: median; fastest: of all rounds."""

    shape: str
    mask: str
    backend: str
    milliseconds: float | None = None
    fastest: float | None = None
    tflops: float | None = None
    cosine: float | None = None
    largest_error: float | None = None
    note: str = ""


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, everything it queued included."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(start_event.elapsed_time(end_event))


def accuracy(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None):
    """(cosine, largest error) of the first head of the first sample, at up to 512 queries."""
    rows = slice(0, 512)
    k, v = share_heads(k, q.shape[1])[:1, :1], share_heads(v, q.shape[1])[:1, :1]
    part = None if mask is None else mask[:1, :1, rows]
    expected = attention_reference(q[:1, :1, rows], k, v, part).double()
    got = out[:1, :1, rows].double()
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0)
    return float(cosine), float((got - expected).abs().max())


def mask_of(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if kind == "none":
        return None
    allowed = torch.rand(1, 1, shape.queries, shape.keys, generator=torch.Generator().manual_seed(1)) > 0.2
    if kind == "bool":
        return allowed.to(device)
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e4).to(device, dtype)


def measure(
    name: str, shape: Shape, kind: str, dtype: torch.dtype, device: torch.device, rounds: int, with_compiled: bool
) -> list[Row]:
    """Every backend at one shape and mask."""
    q, k, v = shape.tensors(dtype, device)
    mask = mask_of(kind, shape, dtype, device)
    call, facts = AttentionCall.of(q, k, v, mask), device_facts(device)
    rows, runs = [], {}
    for backend in BACKENDS:
        row = Row(name, kind, backend.name)
        rows.append(row)
        refusal = backend.refusal(call, facts)
        if refusal is not None:
            row.note = refusal
            continue

        def run(backend=backend) -> torch.Tensor:
            return backend.run(q, k, v, mask, None)

        try:
            row.cosine, row.largest_error = accuracy(run(), q, k, v, mask)
            runs[backend.name] = run
        except Exception as error:  # what a record cannot know shows here, and is a result
            row.note = f"fails: {kind_and_line(error, 120)}"
    auto, log = AttentionDispatcher(choices=MeasuredChoices()), AttentionLog()
    policy = AttentionPolicy()

    def choose() -> torch.Tensor:
        return auto.attend(q, k, v, mask, policy=policy, record=log)

    row = Row(name, kind, "dispatcher")
    with alone():
        row.cosine, row.largest_error = accuracy(choose(), q, k, v, mask)
    row.note = next(iter(log.events())).used
    rows.append(row)
    runs["dispatcher"] = choose
    if with_compiled:
        # Uses the pack's own dispatcher: what it has measured for this size goes into the graph.
        attend(q, k, v, mask, policy=policy)
        import torch._dynamo

        compiled.prepare()
        fast = torch.compile(lambda q, k, v, mask: attend(q, k, v, mask, policy=policy), fullgraph=True)
        row = Row(name, kind, "dispatcher, compiled")
        row.cosine, row.largest_error = accuracy(fast(q, k, v, mask), q, k, v, mask)
        rows.append(row)
        runs["dispatcher, compiled"] = lambda: fast(q, k, v, mask)

    times: dict[str, list[float]] = {backend: [] for backend in runs}
    with alone():
        for turn in range(rounds + 2):
            for backend, run in runs.items():
                elapsed = timed(run, device)
                if turn >= 2:
                    times[backend].append(elapsed)
    for row in rows:
        if times.get(row.backend):
            row.milliseconds = statistics.median(times[row.backend])
            row.fastest = min(times[row.backend])
            row.tflops = shape.operations / row.milliseconds / 1e9
    return rows


def overhead(device: torch.device) -> float:
    """Microseconds the dispatcher takes per call beside the kernel: its call minus the kernel's, on tiny tensors."""
    q, k, v = Shape(1, 1, 16, 16, 64).tensors(torch.float32, device)
    auto, log, policy = AttentionDispatcher(), AttentionLog(), AttentionPolicy("sdpa")
    kernel = auto.backends["sdpa"].run

    def seconds(run: Callable[[], object]) -> float:
        for _ in range(50):
            run()
        spans = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(500):
                run()
            spans.append((time.perf_counter() - start) / 500)
        return min(spans)

    chosen = seconds(lambda: auto.attend(q, k, v, policy=policy, record=log))
    return 1e6 * (chosen - seconds(lambda: kernel(q, k, v, None, None)))


def table(rows: list[Row]) -> str:
    lines = [
        "| shape | mask | backend | ms (fastest) | TFLOP/s | cosine | largest error | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.milliseconds is None:
            lines.append(f"| {row.shape} | {row.mask} | {row.backend} | - | - | - | - | {row.note} |")
        else:
            lines.append(
                f"| {row.shape} | {row.mask} | {row.backend} | {row.milliseconds:.3f} ({row.fastest:.3f}) | "
                f"{row.tflops:.1f} | {row.cosine:.6f} | {row.largest_error:.1e} | {row.note} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["none"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15, metavar="ROUNDS")
    parser.add_argument("--compiled", action="store_true", help="also inside torch.compile")
    parser.add_argument("--write", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    rows: list[Row] = []
    with torch.inference_mode():
        for name in options.shapes:
            shape = SHAPES[name] if device.type == "cuda" else SHAPES[name].smaller()
            for kind in options.masks:
                found = measure(name, shape, kind, dtype, device, options.repeats, options.compiled)
                rows += found
                print(f"{name} {shape}, mask {kind}")
                print(table(found))
                print(flush=True)
                if options.json:
                    options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))
        with alone():
            extra = overhead(device)
    versions = [
        f"{name} {number}" for name, number in library_versions().items() if number != "None" and name != "torch"
    ]
    heading = (
        f"{', '.join([setting(device), *versions, options.dtype])}. Median (fastest) of {options.repeats} rounds in turn. "
        f"The dispatcher adds {extra:.1f} us per call."
    )
    print(heading)
    if options.json:
        options.json.write_text(json.dumps({"about": heading, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.write:
        scaled = "" if device.type == "cuda" else " (shapes scaled down for a CPU)"
        add_to_results(f"## Attention backends{scaled}\n\n{heading}\n\n`{command()}`\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
