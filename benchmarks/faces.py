"""Speed and memory of the face engines against insightface, on random weights of the true sizes.

    python benchmarks/faces.py [--pictures 1 6] [--rounds 5] [--threads 2] [--width 1.0 --depth 100] [--write]

Peers run in the same process, in turn, round after round, so that they see the same machine: insightface on the CPU
(`get(max_num=1)`, which embeds one face, with only detection and recognition loaded), with its CUDA provider where one
is there, and this engine in torch and onnxruntime. Weights are random, so times and memory count, faces do not.
--write appends the table to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import checkout  # noqa: F401 - before the pack, which it makes importable
import numpy as np
import torch
from quiet import alone
from report import add_to_results, command, setting

WARM_RUNS = 3  # on a GPU, which records graphs in the second


@dataclass
class Contestant:
    name: str
    run: Callable[[torch.Tensor], int]  # a ComfyUI IMAGE, [B, H, W, 3] float, to the number of faces embedded
    wall: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, list[float]] = field(default_factory=dict)
    faces: dict[int, int] = field(default_factory=dict)
    note: str = ""
    waits: int | None = None
    on_cpu: bool = True

    def measure(self, pictures: torch.Tensor) -> None:
        count = len(pictures)
        wall, cpu = time.perf_counter(), time.process_time()
        self.faces[count] = self.run(pictures)
        self.wall.setdefault(count, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(count, []).append(time.process_time() - cpu)


def test_pictures(count: int, side: int) -> torch.Tensor:
    """[count, side, side, 3] versions of one photo, so that a calibrated random detector finds something in each."""
    import skimage.data
    from PIL import Image

    photo = Image.fromarray(skimage.data.astronaut()).resize((side, side))
    pixels = np.stack([np.roll(np.array(photo), 8 * i, axis=1) for i in range(count)])
    return torch.from_numpy(pixels).float().add_(0.25).div_(255)


def with_insightface(root: Path, provider: str) -> Contestant | None:
    try:
        import onnxruntime
        from insightface.app import FaceAnalysis
    except ImportError as error:
        print(f"insightface left out: {error}")
        return None
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    app = FaceAnalysis(
        "antelopev2",
        root=str(root),
        allowed_modules=["detection", "recognition"],
        providers=[provider],
        sess_options=session_options,
    )
    app.prepare(0, det_size=(640, 640))
    actual = app.det_model.session.get_providers()[0]
    if actual != provider:
        print(f"insightface with {provider} left out: it runs on {actual}")
        return None

    def run(pictures: torch.Tensor) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As the packs that use it do: bytes, then BGR, picture by picture.
            bgr = pictures.mul(255).clamp(0, 255).byte().numpy()[..., ::-1]
            return sum(len(app.get(np.ascontiguousarray(p), max_num=1)) for p in bgr)

    return Contestant(
        f"insightface, {provider.removesuffix('ExecutionProvider')}", run, on_cpu=provider.startswith("CPU")
    )


def with_ours(root: Path, engine: str, device: torch.device, precision: str = "fp32") -> Contestant | None:
    from hotpath import face

    analyser = face.load_analyser([root], engine=engine, device=device, precision=precision, remember=False)
    if analyser.detector.runner.engine != engine:
        print(f"{engine} on {device} left out: {analyser.report()}")
        return None
    options = face.DetectionOptions(sizes=(640,))

    def run(pictures: torch.Tensor) -> int:
        return sum(map(len, analyser.analyse(pictures, choose=face.FaceChoice.largest(), options=options)))

    return Contestant(f"Hotpath, {engine} {device.type} {precision}", run, on_cpu=device.type == "cpu")


def synchronisations(run: Callable[[], int]) -> int:
    """How often one call waits for the GPU, counted by torch itself."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(w.message) for w in caught)


def peak_of(file: Path, side: int, batch: int) -> int:
    """Peak bytes of one run: of the GPU's allocator, or of this process, which must then be a fresh one."""
    from hotpath.face.onnx_graph import OnnxNetwork

    network = OnnxNetwork(file)
    with torch.no_grad():
        if torch.cuda.is_available():
            network.cuda()
            torch.cuda.reset_peak_memory_stats()
            network(torch.zeros(batch, 3, side, side, device="cuda"))
            return torch.cuda.max_memory_allocated()
        # Linux; VmHWM starts anew with a process, where getrusage's peak is inherited from its parent.
        Path("/proc/self/clear_refs").write_text("5")
        network(torch.zeros(batch, 3, side, side))
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def peak_memory(root: Path, threads: int) -> str:
    """Activation bytes per picture of the two networks in float32, from two batch sizes, each in its own process."""
    lines = []
    folder = root / "models" / "antelopev2"
    for name, side, batches in (("scrfd_10g_bnkps.onnx", 640, (2, 6)), ("glintr100.onnx", 112, (16, 64))):
        peaks = []
        for batch in batches:
            asked = ["--peak", str(folder / name), str(side), str(batch), "--threads", str(threads)]
            command = [sys.executable, __file__, *asked]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout.split()[-1]))
        each = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
        lines.append(f"{name}: {each / 2**20:.1f} MiB per picture, {each / side / side:.0f} bytes per input pixel")
    return "\n".join(lines)


def table(contestants: list[Contestant], counts: list[int]) -> str:
    head = "| engine | " + " | ".join(f"{n} picture{'s' if n > 1 else ''}: wall, CPU" for n in counts) + " |"
    lines = [head, "|---" * (len(counts) + 1) + "|"]
    for c in contestants:
        cells = [
            f"{min(c.wall[n]) * 1000:.1f} ms, {min(c.cpu[n]) * 1000:.1f} ms ({c.faces[n]} faces)"
            if n in c.wall
            else "-"
            for n in counts
        ]
        lines.append(f"| {c.name}{c.note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_rows(contestants: list[Contestant]) -> list[dict[str, object]]:
    """Medians in milliseconds, by number of pictures."""
    return [
        {
            "name": c.name,
            "milliseconds": {str(n): 1000 * statistics.median(times) for n, times in c.wall.items()},
            "fastest": {str(n): 1000 * min(times) for n, times in c.wall.items()},
            "faces": {str(n): found for n, found in c.faces.items()},
            "waits": c.waits,
        }
        for c in contestants
    ]


def versions() -> list[str]:
    """Of the engines that were there, whichever package brought them."""
    found = []
    for name in ("onnxruntime", "insightface"):
        module = sys.modules.get(name)
        if module is not None:
            found.append(f"{name} {module.__version__}")
    return found


def main() -> None:
    from hotpath.demo.face_networks import random_model_folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=0, help="of every engine on the CPU; 0 leaves torch its own number"
    )
    parser.add_argument("--cpu-rounds", type=int, help="of the engines on the CPU; as many as of all without it")
    parser.add_argument("--cpu-most", type=int, default=1 << 30, help="pictures that engines on the CPU get at most")
    parser.add_argument("--json", type=Path, help="write medians here")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--depth", type=int, default=100, choices=(18, 50, 100))
    parser.add_argument("--memory", action="store_true", help="measure activations instead of time")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/RESULTS.md")
    parser.add_argument("--peak", nargs=3, metavar=("FILE", "SIDE", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_of(Path(options.peak[0]), int(options.peak[1]), int(options.peak[2])))
        return

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shown = test_pictures(1, 640).permute(0, 3, 1, 2).mul(255)
        random_model_folder(root, (shown - 127.5) / 128, width=options.width, depth=options.depth)
        gc.collect()
        if options.memory:
            print(peak_memory(root, options.threads))
            return
        cpu = torch.device("cpu")
        made = [
            with_insightface(root, "CPUExecutionProvider"),
            with_ours(root, "torch", cpu),
            with_ours(root, "onnxruntime", cpu),
        ]
        gpu: list[Contestant | None] = []
        if torch.cuda.is_available():
            cuda = torch.device("cuda", torch.cuda.current_device())
            gpu = [with_ours(root, "torch", cuda, p) for p in ("fp32", "fp16", "bf16")]
            made += [with_insightface(root, "CUDAExecutionProvider"), with_ours(root, "onnxruntime", cuda), *gpu]
        contestants = [c for c in made if c is not None]
        batches = {n: test_pictures(n, options.side) for n in options.pictures}
        cpu_rounds = options.rounds if options.cpu_rounds is None else options.cpu_rounds

        def takes(contestant: Contestant, count: int, number: int) -> bool:
            return not contestant.on_cpu or (count <= options.cpu_most and number < cpu_rounds)

        for contestant in contestants:  # warm up: allocate, tune, load the recogniser
            for count, pictures in batches.items():
                for _ in range(1 if contestant.on_cpu else WARM_RUNS):
                    if takes(contestant, count, 0):
                        contestant.run(pictures)
        with alone():
            for number in range(options.rounds):
                for count, pictures in batches.items():
                    for contestant in contestants:
                        if takes(contestant, count, number):
                            contestant.measure(pictures)
        for contestant in filter(None, gpu):
            largest = batches[max(options.pictures)]
            waits = synchronisations(lambda c=contestant, p=largest: c.run(p))
            contestant.waits, contestant.note = waits, f" ({waits} waits for the GPU per call)"
        where = setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if options.json:
            options.json.write_text(json.dumps({"machine": where, "rows": as_rows(contestants)}, indent=1))
        text = (
            f"## Faces: detect and embed, pictures of {options.side}x{options.side}\n\n"
            f"{', '.join([where, *versions()])}. Best of {options.rounds} rounds, warm; CPU is processor time over all "
            f"threads.\n\n`{command()}`\n\n"
            f"{table(contestants, options.pictures)}\n"
        )
        print(text)
        if options.write:
            add_to_results(text)


if __name__ == "__main__":
    main()
