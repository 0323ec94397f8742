"""ComfyUI, its own TorchCompileModel, diffusers and this pack's accelerations, in one run on equal weights.

    python benchmarks/acceleration.py                 # a GPU, ten minutes; writes acceleration.json and acceleration.md
    python benchmarks/acceleration.py --only sdxl --minutes 5 --write      # appends the table to RESULTS.md
    python benchmarks/acceleration.py --only sd15_cpu     # what there is to win without a card; z_image_cpu as well
    python benchmarks/acceleration.py --tiny          # a test of itself on the CPU, with graphs that are not compiled

Z-Image's transformer (6.15 billion weights, bf16, 9 steps, cfg 1; diffusers' own class on the same tensors) and SDXL's
UNet (fp16, 8 steps, CFG, with and without InstantID), on a CPU SD 1.5's UNet and a part of Z-Image; random weights. Every
contestant first gives its latents, which are compared with ComfyUI's as PSNR over their range, for three cases: a prompt, a
second prompt of another length, a second size; graphs that the second and third needed are counted. Then all run in turn,
round after round; figures are medians. Hotpath's contestants after the first of a model use its graphs, so their warm-up
holds only what they add. Contestants for which no time is left are named as left out, and Ctrl-C ends the run with what is
known by then. Random weights show speed and equality, never quality.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from acceleration_families import CPU_FAMILIES, FAMILIES, Contestant, Family
from checkout import use_comfyui
from quiet import alone
from report import add_to_results, command, setting

GIB = 1 << 30
LEAST_ROUNDS = 3
OTHER_ROUNDS = 2  # of the second prompt and the second size


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    wait()
    start = time.perf_counter()
    out = run()
    wait()
    return time.perf_counter() - start, out


def graphs_so_far() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0


def psnr(made: torch.Tensor, expected: torch.Tensor) -> float:
    made, expected = made.float().cpu(), expected.float().cpu()
    error = (made - expected).square().mean()
    span = expected.max() - expected.min()
    return float(10 * torch.log10(span.square() / error)) if error > 0 else float("inf")


def measure(
    family: Family,
    contestants: list[Contestant],
    until: float,
    rounds: int,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Outputs first, then `rounds` rounds of every contestant in turn, or as many as fit before `until`.

    save: called whenever more is known.
    """
    references: dict[str, dict[str, torch.Tensor]] = {}
    running: list[Contestant] = []
    for contestant in contestants:
        if time.monotonic() + contestant.est + seconds_of_rounds(family, running) > until:
            contestant.left_out = "no time was left"
            continue
        try:
            with contextlib.nullcontext() if running else alone():  # all estimates of time rest on the first
                _warm(family, contestant, references)
            running.append(contestant)
        except Exception as error:
            from hotpath.host.errors import kind_and_line

            contestant.left_out = kind_and_line(error)
            traceback.print_exc()
        print(f"  {contestant.name}: {contestant.left_out or f'warm after {contestant.warm_up:.1f} s'}", flush=True)
    with alone():
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.monotonic() > until:
                break
            for case in family.cases if number < OTHER_ROUNDS else family.cases[:1]:
                for contestant in running:
                    seconds, _ = clock(lambda c=contestant, k=case: c.run(k))  # type: ignore[misc]
                    contestant.seconds.setdefault(case.name, []).append(seconds)
            save()


def seconds_of_rounds(family: Family, running: list[Contestant]) -> float:
    """What the least number of rounds will take, by the fastest case of each contestant's first runs. The first contestant's
    hold for those whose first runs took longer: they compiled, or were stopped while another stage measured."""
    firsts = [min(contestant.first.values()) for contestant in running]
    return LEAST_ROUNDS * len(family.cases) * sum(min(first, 1.5 * firsts[0]) for first in firsts)


def _warm(family: Family, contestant: Contestant, references: dict[str, dict[str, torch.Tensor]]) -> None:
    identity = "InstantID" if contestant.name.startswith("InstantID") else "plain"
    known = references.setdefault(identity, {})
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run = contestant.run = contestant.prepare()
    for case in family.cases:
        graphs = graphs_so_far()
        seconds, out = clock(lambda c=case: run(c))
        contestant.first[case.name] = seconds
        contestant.new_graphs[case.name] = graphs_so_far() - graphs
        if case is family.cases[0]:
            contestant.warm_up = time.perf_counter() - start
        assert torch.isfinite(out).all(), f"{contestant.name} gives values that are not finite"
        contestant.psnr[case.name] = psnr(out, known.setdefault(case.name, out))
    if torch.cuda.is_available():
        contestant.extra_gib = (torch.cuda.max_memory_allocated() - before) / GIB


def table(family: Family, contestants: list[Contestant]) -> str:
    first, prompt, size = (case.name for case in family.cases)
    where = ", ".join(f"{case.name} {case.width}x{case.height}, {case.tokens} tokens" for case in family.cases)
    lines = [
        f"### {family.title}",
        "",
        f"{where}. Seconds for all steps, medians; PSNR is the lowest of the three cases. PSNR and x for InstantID are "
        "against InstantID in plain ComfyUI."
        if any(c.name == "InstantID" for c in contestants)
        else f"{where}. Seconds for all steps, medians; PSNR is the lowest of the three cases.",
        "",
        "Contestants of Hotpath after the first share its graphs; their warm-up is what they add.",
        "",
        "| | warm-up s | s | per step ms | x ComfyUI | second prompt s | second size s | graphs: first, then new | PSNR dB "
        "| peak beyond the weights GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    stock: dict[str, float] = {}
    for c in contestants:
        seconds = c.median(first)
        if c.left_out or seconds is None:
            lines.append(f"| {c.name} | left out: {c.left_out or 'stopped'} |" + " |" * 8)
            continue
        base = stock.setdefault("InstantID" if c.name.startswith("InstantID") else "plain", seconds)
        new = c.new_graphs[prompt] + c.new_graphs[size]
        lines.append(
            f"| {c.name} | {c.warm_up:.1f} | {seconds:.3f} | {1000 * seconds / family.steps:.1f} | {seconds / base:.2f} "
            f"| {c.median(prompt) or 0:.3f} | {c.median(size) or 0:.3f} | {c.new_graphs[first]}, {new} "
            f"| {min(c.psnr.values()):.1f} | {c.extra_gib:.1f} |"
        )
    return "\n".join(lines)


def as_dict(family: Family, contestants: list[Contestant]) -> dict[str, Any]:
    kept = ("name", "warm_up", "first", "new_graphs", "psnr", "seconds", "extra_gib", "left_out", "notes")
    return {
        "title": family.title,
        "steps": family.steps,
        "cases": [vars(case) for case in family.cases],
        "contestants": [{name: getattr(contestant, name) for name in kept} for contestant in contestants],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*FAMILIES, *CPU_FAMILIES], help="one model; the last two are for a CPU")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="these alone, and ComfyUI")
    parser.add_argument("--minutes", type=float, default=9.3, help="no contestant begins after its share of these")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for acceleration.json and acceleration.md")
    parser.add_argument("--json", type=Path, help="instead of acceleration.json")
    parser.add_argument("--write", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU: a test of this script")
    options = parser.parse_args()
    start = time.monotonic()
    use_comfyui(on_cpu=options.tiny or not torch.cuda.is_available())
    on_a_card = options.tiny or torch.cuda.is_available()
    chosen = [options.only] if options.only else list(FAMILIES if on_a_card else CPU_FAMILIES)
    file = options.json or options.out / "acceleration.json"
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    tables: list[str] = []
    stopped = False
    for number, name in enumerate(chosen):
        left = start + 60 * options.minutes - time.monotonic()
        until = time.monotonic() + left / (len(chosen) - number)
        print(f"{name}: {until - time.monotonic():.0f} s", flush=True)
        with torch.inference_mode():
            family, contestants = {**FAMILIES, **CPU_FAMILIES}[name](options.tiny)
            if options.contestants:
                contestants = [c for c in contestants if c.name in ("ComfyUI", *options.contestants)]

            def save(family: Family = family, contestants: list[Contestant] = contestants) -> None:
                file.write_text(json.dumps({"families": [*results, as_dict(family, contestants)]}, indent=1))

            try:
                measure(family, contestants, until, options.rounds, save)
            except KeyboardInterrupt:
                stopped = True
        save()
        tables.append(table(family, contestants))
        results.append(as_dict(family, contestants))
        if stopped:
            break
        del family, contestants, save
        if torch.cuda.is_available():
            import comfy.model_management

            comfy.model_management.unload_all_models()
            torch.cuda.empty_cache()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    where = setting(device)
    text = "\n\n".join(["## Acceleration of native models", f"{where}.", f"`{command()}`", *tables]) + "\n"
    file.write_text(json.dumps({"where": where, "command": command(), "families": results}, indent=1))
    (options.out / "acceleration.md").write_text(text)
    print(text)
    if options.write:
        add_to_results(text)


if __name__ == "__main__":
    main()
