"""Speed and memory of the text-to-image nodes against plain diffusers on equal weights, pictures compared first.

    python benchmarks/text_to_image.py                       # Z-Image-Turbo's shape, random bfloat16 weights (20 GB)
    python benchmarks/text_to_image.py --model models/diffusers/Z-Image-Turbo
    python benchmarks/text_to_image.py --tiny                # a smoke test for any machine

Prints a table and writes it, with machine, versions and settings, to --json. Every variant draws the same pictures: one
cold, then some warm, then another prompt and another size, with the graphs that the compiler made in between. Random
weights draw noise: a difference between two pictures says how far the arithmetic differs, and nothing of quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - before the pack, which it makes importable
import torch
from hotpath import host
from hotpath.cache import clear_all
from hotpath.demo.z_image_model import FULL, TINY, write_checkpoint
from hotpath.host.headless import HeadlessHost
from hotpath.text_to_image import decoding
from hotpath.text_to_image.denoising import Guidance
from hotpath.text_to_image.generation import Pipeline, Request, generate
from hotpath.text_to_image.loading import MODELS, LoadOptions
from quiet import alone
from report import processor, versions

PROMPT = "A red fox in fresh snow at the edge of a birch forest, low morning sun"
OTHER = "A lighthouse. " * 12
SEED = 7
VARIANTS = {
    "diffusers eager": None,
    "diffusers compile_repeated_blocks": None,
    "hotpath": LoadOptions(),
    "hotpath regional": LoadOptions(compile="regional"),
    "hotpath regional float8": LoadOptions(compile="regional", precision="float8"),
    "hotpath regional int8": LoadOptions(compile="regional", precision="int8"),
}


@dataclass
class Result:
    """Seconds of whole pictures, prompt in the cache where there is one; denoise: of the steps alone."""

    name: str
    cold: float = 0.0
    warm: float = 0.0
    slowest: float = 0.0
    denoise: float | None = None
    other_prompt: float = 0.0
    other_size: float = 0.0
    later_graphs: int = 0
    peak_mib: float | None = None
    psnr: float | None = None
    notes: list[str] = field(default_factory=list)


Draw = Callable[[str, int, int], tuple[torch.Tensor, float | None]]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    found = work()
    synchronize(device)
    return found, time.perf_counter() - start


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a - b).square().mean().item()
    return float("inf") if error == 0 else -10 * torch.log10(torch.tensor(error)).item()


def measure(name: str, draw: Draw, options: argparse.Namespace, device: torch.device) -> tuple[Result, torch.Tensor]:
    result = Result(name)
    width, height = options.width, options.height
    (picture, _), result.cold = timed(device, lambda: draw(PROMPT, width, height))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, steps = [], []
    with alone():
        for _ in range(options.repeats):
            (_, denoise), seconds = timed(device, lambda: draw(PROMPT, width, height))
            times.append(seconds)
            steps.append(denoise)
    result.warm, result.slowest = statistics.median(times), max(times)
    known = [s for s in steps if s is not None]
    result.denoise = statistics.median(known) if known else None
    if device.type == "cuda":
        result.peak_mib = torch.cuda.max_memory_allocated(device) / 2**20
    before = graphs()
    with alone():
        _, result.other_prompt = timed(device, lambda: draw(OTHER, width, height))
    smaller = max(64, height * 3 // 4 // 16 * 16)
    with alone():
        _, result.other_size = timed(device, lambda: draw(PROMPT, width, smaller))
    result.later_graphs = graphs() - before
    return result, picture


def library(folder: Path, options: argparse.Namespace, device: torch.device, compiled: bool) -> Draw:
    """diffusers as its documentation uses it; the steps are timed between two hooks."""
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=dtype_of(device)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)

    def draw(prompt: str, width: int, height: int) -> tuple[torch.Tensor, float | None]:
        images = pipeline(
            prompt, width=width, height=height, num_inference_steps=options.steps, guidance_scale=options.guidance,
            generator=torch.Generator("cpu").manual_seed(SEED), output_type="np",
        ).images  # fmt: skip
        return torch.from_numpy(images), None

    return draw


def ours(folder: Path, options: argparse.Namespace, load: LoadOptions) -> tuple[Draw, Pipeline]:
    pipeline = Pipeline(MODELS.get(str(folder), load, anywhere=True))

    def draw(prompt: str, width: int, height: int) -> tuple[torch.Tensor, float | None]:
        request = Request(prompt, "", width, height, options.steps, Guidance(options.guidance), SEED)
        drawn = generate(pipeline, request)
        return drawn.pictures, drawn.seconds["denoise"]

    return draw, pipeline


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def variant(name: str, folder: Path, options: argparse.Namespace, device: torch.device) -> tuple[Result, torch.Tensor]:
    torch._dynamo.reset()
    clear_all()
    load = VARIANTS[name]
    if load is None:
        return measure(name, library(folder, options, device, "compile" in name), options, device)
    draw, pipeline = ours(folder, options, load)
    result, picture = measure(name, draw, options, device)
    result.notes = [note for note in pipeline.model.notes() if "instead of" in note]
    MODELS.clear()
    return result, picture


def prompt_stages(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds until the hidden states are there: the first time, and from the cache."""
    clear_all()
    pipeline = Pipeline(MODELS.get(str(folder), LoadOptions(), anywhere=True))
    request = Request(PROMPT, "", options.width, options.height, 1, seed=SEED)
    found = {"loading and reading": generate(pipeline, request).seconds["prompts"]}
    clear_all()
    with alone():
        found["reading"] = generate(pipeline, request).seconds["prompts"]
        found["cached"] = generate(pipeline, request).seconds["prompts"]
    MODELS.clear()
    return found


def decoding_memory(folder: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the plan expects a decode to need beside its weights, and what it took; whole and in tiles."""
    model = MODELS.get(str(folder), LoadOptions(), anywhere=True)
    latents = torch.randn(1, model.latent_channels, options.height // 8, options.width // 8)
    found: dict[str, Any] = {"expected_mib": decoding.activation_bytes(model, options.width, options.height) / 2**20}
    for tiling in ("never", "always"):
        decoding.decode(model, latents, tiling)
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        with alone():
            (_, how), seconds = timed(device, lambda tiling=tiling: decoding.decode(model, latents, tiling))
        found[tiling] = {"how": how, "seconds": seconds}
        if device.type == "cuda":
            found[tiling]["mib"] = (torch.cuda.max_memory_allocated(device) - held) / 2**20
    MODELS.clear()
    return found


def table(results: Sequence[Result]) -> str:
    rows = [("variant", "cold s", "warm s", "slowest", "denoise", "prompt 2", "size 2", "graphs", "peak MiB", "PSNR")]
    for r in results:
        rows.append((
            r.name, f"{r.cold:.2f}", f"{r.warm:.3f}", f"{r.slowest:.3f}", "" if r.denoise is None else f"{r.denoise:.3f}",
            f"{r.other_prompt:.3f}", f"{r.other_size:.3f}", str(r.later_graphs),
            "" if r.peak_mib is None else f"{r.peak_mib:,.0f}", "" if r.psnr is None else f"{r.psnr:.1f}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def machine(device: torch.device) -> dict[str, str]:
    packages = versions("torch", "diffusers", "transformers", "torchao")
    return {"date": str(date.today()), "device": processor(device), **packages}


def keep(options: argparse.Namespace, device: torch.device, results: Sequence[Result], **more: Any) -> None:
    """Written whenever more is known: what comes later may fail."""
    if options.json:
        facts = {"machine": machine(device), "settings": {name: str(value) for name, value in vars(options).items()}}
        options.json.write_text(json.dumps({**facts, "results": [asdict(r) for r in results], **more}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; without it one of random weights is written")
    parser.add_argument("--tiny", action="store_true", help="a tiny checkpoint and small pictures")
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is written and kept")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", metavar="NAME", help="variants with NAME in their name")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    options = parser.parse_args()
    side = 128 if options.tiny else 1024
    options.width, options.height = options.width or side, options.height or side
    with tempfile.TemporaryDirectory() as work:
        here = HeadlessHost(device=options.device, show_progress=False)
        here._cache = Path(work) / "cache"
        host.use(here)
        device = here.device()
        folder = options.model
        if folder is None:
            folder = (options.folder or Path(work)) / ("tiny" if options.tiny else "full")
            if not (folder / "model_index.json").is_file():
                print(f"writing random weights to {folder} ...", flush=True)
                shape = TINY if options.tiny else FULL
                dtype = torch.float32 if options.tiny else torch.bfloat16
                write_checkpoint(folder, shape, dtype=dtype, device=str(device), padding_side="right")
                gc.collect()
        results: list[Result] = []
        reference: torch.Tensor | None = None
        for name in VARIANTS:
            if options.only and reference is not None and not any(word in name for word in options.only):
                continue
            result, picture = variant(name, folder, options, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if reference is None:
                reference = picture
            else:
                result.psnr = psnr(picture, reference)
            results.append(result)
            print(f"{name}: {result.warm:.3f} s", *result.notes, sep="\n  ", flush=True)
            keep(options, device, results)
        prompts = prompt_stages(folder, options)
        memory = decoding_memory(folder, options, device)
    print()
    print(
        f"{options.width} x {options.height}, {options.steps} steps, guidance {options.guidance}; PSNR against diffusers eager"
    )
    print(table(results))
    print("prompt:", ", ".join(f"{name} {seconds:.3f} s" for name, seconds in prompts.items()))
    print("decode:", json.dumps(memory))
    print(json.dumps(machine(device)))
    keep(options, device, results, prompt_seconds=prompts, decode=memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
