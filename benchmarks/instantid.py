"""What InstantID costs in a sampling step, against the unpatched model and the packs people use today.

    python benchmarks/instantid.py [--sizes 1024x1024 1536x1024] [--dtypes fp16 bf16] [--rounds 7] [--json FILE] [--write]
    python benchmarks/instantid.py --half          half SDXL's width in fp32, for a CPU and 8 GB; few contestants
    python benchmarks/instantid.py --tiny          a test of this script, on the CPU, in a minute

SDXL's own layout and width with random weights, in ComfyUI's own sampler, euler, every contestant in turn in every
round; a figure is the median over rounds of the time of one step. The original pack (cubiq/ComfyUI_InstantID) and
IPAdapter_plus take part where they are found: in ComfyUI's custom_nodes, HOTPATH_PEERS, or a folder `peers` beside it.
What our patch gives is compared with what the original gives before anything is timed. On a CPU a time is processor time,
which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkout import ROOT, load, use_comfyui
from instantid_models import Contestant, Stage, contestants
from quiet import alone
from report import add_to_results, command, setting

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run: Callable[[], Any]) -> float:
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    wait()
    start = now()
    run()
    wait()
    return now() - start


def compare_first(stage: Stage, made: list[Contestant], size: tuple[int, int], steps: int) -> dict[str, float]:
    """Largest difference of our latent from the original's, as a part of its range; nothing where one of them is missing."""
    compared = ("Hotpath, 70 blocks", "original pack, 70 blocks")
    models = {c.name: c.model for c in made if c.name in compared}
    if len(models) < 2:
        return {}
    ours, original = (stage.sample(models[name], size, 4.0, steps) for name in compared)
    return {compared[0]: float((ours - original).abs().max() / original.abs().max())}


def nodes_and_memory(stage: Stage, size: tuple[int, int], steps: int) -> dict[str, float]:
    """Milliseconds of the node, and what patching holds on the device beside the model."""
    from instantid_scenarios import mask, photo

    stage.ours(weight=0.8)
    applications = {
        "re-apply, other weight": lambda i: stage.ours(weight=0.5 + i / 100),
        "re-apply, other range": lambda i: stage.ours(end_at=0.5 + i / 100),
        "re-apply, other mask": lambda i: stage.ours(mask=mask(i)),
        "new face (its embedding given)": lambda i: stage.ours(image=photo(50 + i)),
    }
    found = {
        f"{name}, ms": 1e3 * statistics.median(clock(partial(apply, i)) for i in range(20))
        for name, apply in applications.items()
    }
    if stage.originals is not None:

        def original(i: int) -> Any:
            return stage.originals.patch(weight=0.5 + i / 100, image=photo(1))

        found["original pack, its node again with another weight, ms"] = 1e3 * statistics.median(
            clock(partial(original, i)) for i in range(5)
        )
        adapter = sum(p.nbytes for p in stage.originals.instantid.parameters())
        found["original pack, adapter it computes with, MiB"] = adapter / 2**20
    attn2 = stage.ours(weight=0.8).model_options["transformer_options"]["patches_replace"]["attn2"]
    prepared = {id(d.prepared): d.prepared for patch in attn2.values() for d in patch.callback}
    found["keys and values it computes with, MiB"] = sum(p.nbytes for p in prepared.values()) / 2**20
    if torch.cuda.is_available():
        held = {}
        for name, model in (("unpatched", stage.bench.model), ("patched", stage.ours(weight=0.8))):
            stage.sample(model, size, 4.0, steps)
            torch.cuda.reset_peak_memory_stats()
            stage.sample(model, size, 4.0, steps)
            held[name] = torch.cuda.max_memory_allocated()
        found["memory while sampling beyond the unpatched peak, MiB"] = (held["patched"] - held["unpatched"]) / 2**20
        before = torch.cuda.memory_allocated()
        for i in range(200):
            model = stage.ours(weight=0.5 + i / 1000)
        del model
        found["memory after 200 re-applies, MiB more"] = (torch.cuda.memory_allocated() - before) / 2**20
    return found


def kernel(dtype: torch.dtype, device: torch.device) -> list[str]:
    """The attention alone, in microseconds, against plain SDPA + multiply + add and against moving the bytes."""
    from hotpath.attention.token_attention import attend_tokens, attend_tokens_reference

    rows = ["| queries x width, heads | fused | SDPA, multiply, add | copy of the same bytes |", "|---|---|---|---|"]
    for queries, width in ((4096, 640), (1024, 1280), (6144, 640), (1536, 1280)):
        heads = width // 64
        q, out = torch.randn(2, 2, queries, width, device=device, dtype=dtype)
        keys, values = torch.randn(2, 2, 16, width, device=device, dtype=dtype)
        table = (torch.tensor([[0, 1]], dtype=torch.int32, device=device), torch.full((1, 2), 0.8, device=device))
        # Two reads and a write are three halves of a copy's read and write.
        source = torch.randn(3 * q.numel() // 2, device=device).to(dtype)
        runs = (
            partial(attend_tokens, q, out, keys, values, *table, heads),
            partial(attend_tokens_reference, q, out, keys, values, *table, heads),
            partial(torch.empty_like(source).copy_, source),
        )
        with alone():
            times = [per_run(run, 50 if device.type == "cuda" else 3) for run in runs]
        rows.append(f"| {queries} x {width}, {heads} | " + " | ".join(f"{t * 1e6:.1f}" for t in times) + " |")
    return rows


def per_run(run: Callable[[], Any], many: int) -> float:
    def repeat() -> None:
        for _ in range(many):
            run()

    repeat()
    if not torch.cuda.is_available():
        return statistics.median(clock(repeat) / many for _ in range(7))
    spans = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Busy until Python has queued all of them: what a sampler's long queue hides is not to be timed here.
        torch.cuda._sleep(10_000_000)
        start.record()
        repeat()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1000 / many)
    return statistics.median(spans)


def step_table(made: list[Contestant], cases: list[str]) -> list[str]:
    rows = ["| | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for contestant in made:
        cells = []
        for case in cases:
            middle = statistics.median(contestant.seconds[case])
            base_name = (
                "unpatched" + contestant.name[contestant.name.rindex(", ") :]
                if "compile" in contestant.name
                else "unpatched"
            )
            base = next(statistics.median(c.seconds[case]) for c in made if c.name == base_name)
            cells.append(f"{middle * 1e3:.2f} ms, {middle / base:.3f}x")
        rows.append(f"| {contestant.name} | " + " | ".join(cells) + " |")
    return rows


def as_record(made: list[Contestant], costs: dict[str, float], differences: dict[str, float]) -> dict[str, Any]:
    steps = {c.name: {case: statistics.median(times) for case, times in c.seconds.items()} for c in made}
    return {"steps": steps, "costs": costs, "differences": differences}


def run(options: argparse.Namespace) -> str:
    import comfy.model_management

    until = time.monotonic() + options.seconds

    device = comfy.model_management.get_torch_device()
    text, record = [], {}

    def keep() -> None:
        """Whenever more is known: what comes later may fail."""
        record[dtype_name] = as_record(made, costs, differences)
        if options.json:
            options.json.write_text(json.dumps({"machine": setting(device), "results": record}, indent=1))

    for dtype_name in options.dtypes:
        stage = Stage(DTYPES[dtype_name], options.tiny, options.half)
        made = contestants(stage, options.compile, options.half)
        if options.contestants:
            made = [c for c in made if c.name.startswith("unpatched") or c.name in options.contestants]
        sizes = [tuple(int(n) for n in size.split("x")) for size in options.sizes]
        with alone():  # kernels are tuned
            differences, costs = compare_first(stage, made, sizes[0], 2), {}
        cases = []
        for size in sizes:
            for cfg in (4.0, 1.0):
                case = f"{size[0]}x{size[1]}, {'CFG' if cfg > 1 else 'no CFG'}"
                cases.append(case)
                for contestant in made:  # loads, compiles, tunes
                    stage.sample(contestant.model, size, cfg, 2)
                with alone():
                    for number in range(options.rounds):
                        if number >= 3 and time.monotonic() > until:
                            break
                        for contestant in made:
                            seconds = clock(partial(stage.sample, contestant.model, size, cfg, options.steps))
                            contestant.seconds.setdefault(case, []).append(seconds / options.steps)
                keep()
        with alone():
            costs = nodes_and_memory(stage, sizes[0], options.steps)
        keep()
        text += [f"### {dtype_name}, a sampling step", "", *step_table(made, cases), ""]
        text += [
            f"- Difference from the original's latent, {name}: {value:.2e} of its range"
            for name, value in differences.items()
        ]
        text += [f"- {name}: {value:.2f}" for name, value in costs.items()]
        text += [
            "",
            f"Token attention alone, batch 2, microseconds, {dtype_name}:",
            "",
            *kernel(stage.dtype, device),
            "",
        ]
    return "\n".join(
        [
            "## InstantID: what 70 patched blocks cost",
            "",
            f"{setting(device)}. Median of {options.rounds} rounds of {options.steps} steps, "
            "contestants in turn; the factor is against the unpatched model, compiled the same way.",
            "",
            f"`{command()}`",
            "",
            *text,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", help="1024x1024 1536x1024, with --half 256x256")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="fp16 bf16, with --half fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1e9, help="after these a case ends with its third round")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="these alone, and the unpatched model")
    parser.add_argument("--compile", nargs="*", default=["core", "Hotpath"], choices=["core", "Hotpath"])
    parser.add_argument("--half", action="store_true", help="half SDXL's width, without compiling: for a CPU")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--tiny", action="store_true", help="small widths, two steps: to see that this script works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.dtypes, options.rounds, options.steps = ["128x128"], ["fp32"], 2, 2
        options.compile = []
    options.sizes = options.sizes or (["256x256"] if options.half else ["1024x1024", "1536x1024"])
    options.dtypes = options.dtypes or (["fp32"] if options.half else ["fp16", "bf16"])
    if options.threads:
        torch.set_num_threads(options.threads)
    use_comfyui(on_cpu=not torch.cuda.is_available())
    load("hotpath_demo", ROOT / "demo" / "comfy_nodes" / "hotpath_demo")
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    with torch.inference_mode():
        text = run(options)
    print(text)
    if options.write:
        add_to_results(text)


if __name__ == "__main__":
    main()
