"""Speed and memory of ColorMNet and Deep Exemplar against the original programs, on random weights of true sizes.

    python benchmarks/colorization.py [--peers DIR] [--compile] [--long 10000] [--write]
    python benchmarks/colorization.py --tiny

The first line does everything for a card within --seconds (540): both sizes, both methods, three precisions, the peers in
the same process; what there was no time for is named. fps end to end go from uint8 frames to uint8 frames in memory;
network alone from luminance on the device to chroma on the device. --peers: a folder with checkouts `colormnet`, `dinov2`
and `deep_exemplar` of the originals; they colour --peer-frames of the same film. "near" is the share of pixels within
1/255 of our float32 in every channel. --long simulates a film of that many frames and gives the time per frame along it.
--write appends the table to benchmarks/RESULTS.md. --tiny tests the benchmark itself: networks of the demo's widths.
Weights are random: times and memory count, colours do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from colorization_models import Ours, clip, networks, peer_work, trained
from quiet import alone
from report import add_to_results, command, setting
from torch import Tensor

METHODS = ("ColorMNet", "Deep Exemplar")
HALVES = ("float16", "bfloat16")


@dataclass
class Row:
    method: str
    contestant: str
    size: str
    film_fps: float
    network_fps: float
    allocated: float | None  # MiB at the peak; not counted on a CPU, where contestants take turns in one process
    reserved: float | None
    note: str = ""
    engines: str = ""


def near(pictures: Tensor, full: Tensor) -> float:
    """The part of the pixels that are within 1/255."""
    return ((pictures.int() - full.int()).abs().amax(-1) <= 1).float().mean().item()


def timed(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of `rounds` after one round to warm up."""
    spent = []
    with alone():
        for index in range(rounds + 1):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index:
                spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def peak(work: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20


def contest_on_cpu(method: str, size: tuple[int, int], options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Ours and the original in turn, so that what else runs on the machine slows both, with the processor time of each."""
    width, height = size
    if out_of_time(options, f"{method} {width}x{height} Hotpath float32"):
        return []
    frames = clip(options.frames, height, width)
    _, network = networks(method, options.tiny)
    ours = Ours(method, network, "float32", False)
    works = {"Hotpath float32": (ours.network_only(frames), lambda: ours.film(frames))}
    note = ""
    if options.peers is not None:
        works["original float32"], note = peer_work(method, frames, options, device)[1:]
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in works}
    for turn in range(options.rounds + 1):
        for name, work in works.items():
            marks = [(time.perf_counter(), time.process_time())]
            for part in work:
                part()
                marks.append((time.perf_counter(), time.process_time()))
            (w0, c0), (w1, c1), (w2, c2) = marks
            if turn:
                spent[name].append((w1 - w0, w2 - w1, c1 - c0, c2 - c1))
    rows = []
    for name, rounds in spent.items():
        alone, film, alone_cpu, film_cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        count = len(frames)
        own = f"processor time per frame: {film_cpu / count:.2f} s end to end, {alone_cpu / count:.2f} s network alone"
        others = f"; {note}" if name.startswith("original") and note else ""
        rows.append(Row(method, name, f"{width}x{height}", count / film, count / alone, None, None, own + others))
        rows[-1].engines = ours.engines if name.startswith("Hotpath") else ""
        if options.long and name.startswith("Hotpath") and not out_of_time(options, f"{name} long"):
            tenths = " ".join(f"{t:.1f}" for t in ours.long(options.long, height, width))
            rows[-1].note += f"; {options.long} frames, ms per frame by tenths: {tenths}"
        say(rows[-1], options)
    return rows


def contest(method: str, size: tuple[int, int], options: argparse.Namespace, device: torch.device) -> list[Row]:
    width, height = size
    frames = clip(options.frames, height, width)
    name = f"{width}x{height}"
    rows: list[Row] = []
    full: Tensor | None = None
    for precision in options.precisions:
        for compiled in (False, True) if options.compile else (False,):
            label = f"Hotpath {precision}{' compiled' if compiled else ''}"
            if out_of_time(options, f"{method} {name} {label}"):
                continue
            _, network = networks(method, options.tiny)
            ours = Ours(method, network, precision, compiled)
            alone = timed(ours.network_only(frames), device, options.rounds)
            film = timed(lambda ours=ours: ours.film(frames), device, options.rounds)
            kept: list[Tensor] = []
            memory = peak(lambda ours=ours, kept=kept: kept.append(ours.film(frames)))
            rows.append(Row(method, label, name, len(frames) / film, len(frames) / alone, *memory))
            rows[-1].engines = ours.engines
            if precision == "float32" and not compiled:
                full = kept[0]
            elif full is not None and not compiled:
                half, whole = (
                    Ours(method, trained(method), kind, False).film(frames) for kind in (precision, "float32")
                )
                rows[
                    -1
                ].note = f"near: {near(half, whole):.4f} (trained; with random weights {near(kept[0], full):.4f})"
            if options.long and not compiled and precision != "bfloat16" and not out_of_time(options, f"{label} long"):
                tenths = " ".join(f"{t:.1f}" for t in ours.long(options.long, height, width))
                rows[-1].note += f" {options.long} frames, ms per frame by tenths: {tenths}"
            say(rows[-1], options)
            del ours, network
    if options.peers is not None and not out_of_time(options, f"{method} {name} original"):
        try:
            rows.append(peer_row(method, frames[: options.peer_frames], options, device, name))
        except Exception as error:  # somebody else's program on a machine that it may not know
            traceback.print_exc()
            options.left_out.append(f"{method} {name} original ({type(error).__name__}: {str(error)[:160]})")
            return rows
        say(rows[-1], options)
    return rows


def say(row: Row, options: argparse.Namespace) -> None:
    """Said and written at once: what comes later may fail."""
    print(row, flush=True)
    options.found.append(asdict(row))
    if options.json:
        options.json.write_text(json.dumps({"rows": options.found}, indent=1))


def out_of_time(options: argparse.Namespace, what: str) -> bool:
    """Whether the time is up; then `what` is put on the list of what was left out."""
    if time.monotonic() < options.deadline:
        return False
    options.left_out.append(what)
    return True


def peer_row(method: str, frames: Tensor, options: argparse.Namespace, device: torch.device, name: str) -> Row:
    label, (alone, film), note = peer_work(method, frames, options, device)
    spent = [timed(work, device, options.rounds) for work in (alone, film)]
    memory = peak(film)
    return Row(method, label, name, len(frames) / spent[1], len(frames) / spent[0], *memory, note=note)


def table(rows: list[Row]) -> str:
    lines = [
        "| method | contestant | size | end to end fps | network fps | peak allocated MiB | reserved MiB | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.method} | {r.contestant} | {r.size} | {r.film_fps:.2f} | {r.network_fps:.2f} | {mib(r.allocated)} | "
            f"{mib(r.reserved)} | {r.note.strip()} |"
        )
    return "\n".join(lines)


def mib(size: float | None) -> str:
    return "-" if size is None else f"{size:.0f}"


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["768x432", "1920x1080"] if cuda else ["256x144"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=["float32", *HALVES] if cuda else ["float32"])
    parser.add_argument("--frames", type=int, default=60 if cuda else 11)
    parser.add_argument("--rounds", type=int, default=3 if cuda else 1)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--peers", type=Path, help="folder of the originals' checkouts")
    parser.add_argument("--peer-frames", type=int, default=20, help="the originals take up to a second for one")
    parser.add_argument("--long", type=int, default=0, help="frames of a long film to simulate")
    parser.add_argument("--seconds", type=float, default=540, help="nothing is begun after this time")
    parser.add_argument("--tiny", action="store_true", help="test the benchmark itself with small networks")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/RESULTS.md")
    parser.add_argument("--json", type=Path, help="every row is written here when it is known")
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.frames, options.rounds, options.precisions = ["112x112"], 3, 1, ["float32"]
        if options.peers is not None or options.write:
            parser.error("--tiny has no peers, which come in one size only, and no results to write.")
    options.deadline, options.left_out, options.found = time.monotonic() + options.seconds, [], []
    return options


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    from hotpath import host
    from hotpath.host.headless import HeadlessHost

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host.use(HeadlessHost(device=device, show_progress=False))
    rows: list[Row] = []
    for size in options.sizes:
        width, height = (int(n) for n in size.split("x"))
        for method in options.methods:
            contested = contest if device.type == "cuda" else contest_on_cpu
            rows += contested(method, (width, height), options, device)
    text = f"## Colorization\n\n{setting(device)}.\n\n`{command()}`\n\n{table(rows)}\n"
    if options.left_out:
        text += f"\nLeft out after {options.seconds:.0f} seconds: {', '.join(options.left_out)}.\n"
    print(text)
    for row in rows:
        if row.engines:
            print(f"{row.method} {row.size} {row.contestant}: {row.engines}")
    if options.write:
        add_to_results(text)


if __name__ == "__main__":
    main()
